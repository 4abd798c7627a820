"""A client's connection, and the replies that uvicorn gives without asking the application."""

from __future__ import annotations

import json
import math

import h11
from starlette.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from tinyllm.serve.errors import APIError

CONNECTIONS = 512  # at once
HEAD_TIMEOUT = 30.0  # seconds in which the first line and the headers of a request must arrive
SEND_TIMEOUT = 60.0  # seconds without a byte read, after which a client is given up


class Connection(H11Protocol):
    """uvicorn's connection with limits on the time that a client takes, and with errors in JSON.

    The time of a request's head begins with the connection, or with the first byte of a further request:
    until then the connection is idle, and uvicorn closes it after 5 seconds. The rest of a body that nobody
    reads, because its request was answered before it came, has as much time.

    A client that does not read any of what is sent to it is given up, too, also while the connection closes.
    """

    head_timer = send_timer = None

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # ``pause_writing`` whenever something waits
        if len(self.connections) > CONNECTIONS:
            self.app = refuse
        self.wait_for_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        answered = self.conn.our_state is h11.DONE  # before the whole body came
        if self.conn.their_state is not h11.IDLE and not answered:  # the head is complete, or wrong
            self.stop_waiting()
        elif self.head_timer is None and self.timeout_keep_alive_task is None:  # uvicorn has ended its own
            self.wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self.stop_waiting()
        if self.send_timer is not None:
            self.send_timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.wait_for_reader()

    def resume_writing(self) -> None:
        self.send_timer.cancel()
        super().resume_writing()

    def wait_for_reader(self, before: float = math.inf) -> None:
        """Wait as long as what is left to send becomes less."""
        left = self.transport.get_write_buffer_size()
        if left < before:
            self.send_timer = self.loop.call_later(SEND_TIMEOUT, self.wait_for_reader, left)
        else:
            self.transport.abort()

    def wait_for_head(self) -> None:
        self.head_timer = self.loop.call_later(HEAD_TIMEOUT, self.give_up)

    def stop_waiting(self) -> None:
        if self.head_timer is not None:
            self.head_timer.cancel()
            self.head_timer = None

    def give_up(self) -> None:
        """Close the connection, with an error if part of a request has arrived."""
        if self.conn.trailing_data[0] and not self.transport.is_closing():
            self.fail(APIError(408, f"the headers did not arrive in {HEAD_TIMEOUT:g} seconds"))
        self.transport.close()

    def send_400_response(self, msg: str) -> None:
        self.fail(APIError(400, "this is not a request of HTTP/1.1 that the server can read"))

    def fail(self, error: APIError) -> None:
        """Send an error of the connection itself, unless its request was answered, and close it."""
        body = json.dumps(error.body).encode()
        headers = [
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(body))),
            ("Connection", "close"),
        ]
        head = h11.Response(status_code=error.status, headers=headers)
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            for event in (head, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event))
        self.transport.close()


async def refuse(scope, receive, send) -> None:
    """The application of a connection that is one too many."""
    error = APIError(503, "there are too many connections: try again later", code="busy", retry_after=5)
    await JSONResponse(error.body, error.status, error.headers | {"Connection": "close"})(
        scope, receive, send
    )
