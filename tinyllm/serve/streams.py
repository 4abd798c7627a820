"""Server-sent events, and clients that go away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from starlette.responses import Response


@contextlib.asynccontextmanager
async def watched(receive: Callable, on_gone: Callable[[], None]):
    """Within this block, whose request's body has been read, call ``on_gone`` when the client disconnects."""

    async def watch():
        while (await receive())["type"] != "http.disconnect":
            pass
        on_gone()

    watcher = asyncio.ensure_future(watch())
    try:
        yield
    finally:
        watcher.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watcher


class EventStream(Response):
    """The texts of ``events``, each as one event.

    Calls ``cancel`` when the client is gone, and in any case at the end.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], cancel: Callable[[], None]):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.events, self.cancel = events, cancel

    async def __call__(self, scope, receive, send) -> None:
        try:
            async with watched(receive, self.cancel):
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                async for event in self.events:
                    await send(_body(f"data: {event}\n\n".encode(), more=True))
                    await asyncio.sleep(0)  # the event loop may know now that the client is gone
                await send(_body(b"", more=False))
        finally:
            self.cancel()
            await self.events.aclose()


def _body(data: bytes, more: bool) -> dict:
    return {"type": "http.response.body", "body": data, "more_body": more}
