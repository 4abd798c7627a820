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

GRACE = 5.0  # seconds that answers in progress have to finish after the first signal
SIGNALS = (signal.SIGINT, signal.SIGTERM)
BACKLOG, CONNECTIONS = 256, 512


def bound(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 stands for any free one. Raises ``Error`` if that is impossible."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
        if sys.platform != "win32":  # there it would allow two servers on one port
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with _named(host, port):
            made.bind(address)
            made.listen(BACKLOG)  # now, or two servers could be bound to the same port
    except socket.gaierror as error:
        raise Error(
            f"host {host!r} is unknown ({error.strerror}): give 127.0.0.1, or 0.0.0.0 for all networks"
        ) from None
    return made


@contextlib.contextmanager
def _named(host: str, port: int):
    try:
        yield
    except OSError as error:
        reason = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
        raise Error(
            f"port {port} of {host} {reason}: choose another with --port, or 0 for any free one"
        ) from None


class _Server(uvicorn.Server):
    """Signals are handled by ``serve``."""

    @contextlib.contextmanager
    def capture_signals(self):
        yield


def serve(app, listening: socket.socket, on_start=lambda: None) -> int | None:
    """Serve until a signal arrives, and return its number.

    On the first one, no new request is accepted and answers in progress have ``GRACE`` seconds to finish;
    then, or on the second signal, they are ended with an error, which tells clients that they are incomplete.
    """
    return asyncio.run(_serve(app, listening, on_start))


async def _serve(app, listening: socket.socket, on_start) -> int | None:
    options = dict(http="h11", ws="none", loop="asyncio", lifespan="on", log_config=None, access_log=False)
    config = uvicorn.Config(
        app,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=int(2 * GRACE),
        **options,
    )
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    server, engine, loop, received = _Server(config), app.state.engine, asyncio.get_running_loop(), []

    def stop(number: int) -> None:
        received.append(number)
        server.should_exit = True
        engine.drain()
        if len(received) > 1:
            engine.close()
        else:
            loop.call_later(GRACE, engine.close)

    def handle(number: int, _) -> None:
        loop.call_soon_threadsafe(stop, number)

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        on_start()
        await server.serve(sockets=[listening])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return received[0] if received else None
