"""Running the application: its socket, its signals, its end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
import sys

import uvicorn

from tinyllm.errors import Error
from tinyllm.serve.connection import Connection

GRACE = 5.0  # seconds that answers in progress have to finish after the first signal
SIGNALS = signal.SIGINT, signal.SIGTERM
BACKLOG = 256


def bound(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 stands for any free one. Raises ``Error`` if that is impossible."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        problem = f"host {host!r} is unknown ({getattr(error, 'strerror', None) or 'not a name'})"
        raise Error(f"{problem}: give 127.0.0.1, or 0.0.0.0 for all networks") from None
    listening = socket.socket(family, kind, protocol)
    try:
        if sys.platform != "win32":  # there it would allow two servers on one port
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(BACKLOG)  # now, or two servers could be bound to the same port
    except OSError as error:
        listening.close()
        reason = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
        remedy = "choose another with --port, or 0 for any free one"
        raise Error(f"port {port} of {host} {reason}: {remedy}") from None
    return listening


class Server(uvicorn.Server):
    """uvicorn's server for an application of ``create_app``, which leaves signals alone."""

    def __init__(self, app):
        kinds = dict(http=Connection, ws="none", loop="asyncio", lifespan="on")
        quiet = dict(log_config=None, access_log=False, server_header=False)
        super().__init__(uvicorn.Config(app, timeout_graceful_shutdown=int(2 * GRACE), **kinds, **quiet))
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
        self.engine = app.state.engine

    @contextlib.contextmanager
    def capture_signals(self):
        yield

    def stop(self) -> None:
        """Accept no new request and give answers in progress ``GRACE`` seconds; none at the second call.

        An answer that is not complete then ends with an error, which tells its client so. Must be called in
        the event loop.
        """
        first, self.should_exit = not self.should_exit, True
        if self.engine is None:
            return
        if not first:
            self.engine.close()
        else:
            self.engine.drain()
            asyncio.get_running_loop().call_later(GRACE, self.engine.close)


def serve(app, listening: socket.socket, on_start=lambda: None) -> int:
    """Serve until SIGINT or SIGTERM, stop, and return the first signal's number."""
    return asyncio.run(_serve(app, listening, on_start))


async def _serve(app, listening: socket.socket, on_start) -> int:
    server, loop, received = Server(app), asyncio.get_running_loop(), []

    def handle(number: int, _) -> None:
        received.append(number)
        loop.call_soon_threadsafe(server.stop)

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        on_start()
        await server.serve(sockets=[listening])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return received[0]
