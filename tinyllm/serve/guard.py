"""Who may ask, and the access log."""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from tinyllm.serve.errors import APIError, internal

log = logging.getLogger("tinyllm.serve")

POLLED = "/tinyllm/runs"  # an open page asks for it again and again: not logged


class Guard:
    """Middleware that refuses requests, answers for defects, and logs each request without its content.

    - With an ``api_key``, a request for anything but ``open_paths`` needs it: ``Authorization: Bearer KEY``.
    - A browser sends the requests of any page that its user visits, also to a server on the user's own
      machine, and names the page's origin. Only pages of this server and of ``origins`` may do that.
    - A page can have a name that resolves to 127.0.0.1 (DNS rebinding), and is then of this server. So unless
      ``hosts`` is empty, a request must be for one of them.
    """

    def __init__(
        self,
        app,
        api_key: str | None = None,
        origins: Sequence[str] = (),
        hosts: Sequence[str] = (),
        open_paths: Sequence[str] = (),
    ):
        self.app, self.api_key = app, api_key
        self.origins, self.hosts, self.open_paths = origins, hosts, open_paths

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.monotonic(), None

        async def noted(message):
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            try:
                error = self._refusal(scope)
                if error is None:
                    await self.app(scope, receive, noted)
            except Exception:  # Starlette would answer without the headers of CORS
                if status is not None:
                    raise
                log.exception("a request failed")
                error = internal()
            if error is not None:
                await JSONResponse(error.body, error.status, error.headers)(scope, receive, noted)
        finally:
            note = scope.get("state", {}).get("note", "")
            seconds = time.monotonic() - started
            client = (scope.get("client") or ["-"])[0]
            path = ascii(scope["path"][:200])[1:-1]
            shown = "gone" if status is None else status
            level = logging.DEBUG if path == POLLED else logging.INFO
            method = ascii(scope["method"])[1:-1]
            log.log(level, "%s %s %s %s %.2f s %s", client, method, path, shown, seconds, note)

    def _refusal(self, scope) -> APIError | None:
        headers = Headers(scope=scope)
        host, origin = headers.get("host", "").lower(), headers.get("origin")
        if self.hosts and _part(f"//{host}", "hostname") not in self.hosts:
            return APIError(403, "this server has another host name", code="wrong_host")
        own = origin is not None and host != "" and _part(origin.lower(), "netloc") == host
        if origin is not None and not own and not {origin, "*"} & set(self.origins):
            return APIError(403, "pages of another origin may not use this server", code="wrong_origin")
        if self.api_key is not None and scope["path"] not in self.open_paths:
            kind, _, key = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(
                key.strip().encode(), self.api_key.encode()
            ):
                return APIError(
                    401, "the API key is missing or wrong: send Authorization: Bearer KEY",
                    code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
                )  # fmt: skip
        return None


def _part(url: str, name: str) -> str:
    """A part of a URL that a header contains; "" if it has none, or is not a URL."""
    try:
        return getattr(urlsplit(url), name) or ""
    except ValueError:
        return ""
