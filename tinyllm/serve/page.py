"""The page at ``/``: its files, and what a browser lets them do.

The page is one HTML file and two scripts, served as they are. It shows text that a model wrote, which may be
hostile: the scripts build elements and text nodes only, and the Content-Security-Policy below makes the
browser refuse any script, style, image, frame or connection but the page's own, should they fail to.
"""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

FILES = {"/": ("index.html", "text/html"), "/page.js": ("page.js", "text/javascript")}
FILES |= {"/look.js": ("look.js", "text/javascript")}
ABOUT = "/tinyllm/about"

OPEN_PATHS = (*FILES, ABOUT)  # that need no API key: the page asks for it

STYLE = re.compile(rb"<style>(.*?)</style>", re.DOTALL)


def policy(html: bytes) -> str:
    """The Content-Security-Policy of the page: it may load its own two scripts, and talk to this server.

    Its one style sheet is in the file, and is allowed by its hash; nothing may set HTML from a string.
    """
    styles = [base64.b64encode(hashlib.sha256(text).digest()).decode() for text in STYLE.findall(html)]
    return "; ".join(
        [
            "default-src 'none'",
            "script-src 'self'",
            "style-src " + " ".join(f"'sha256-{digest}'" for digest in styles),
            "img-src data:",  # the icon
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        ]
    )


def page_routes(watching: bool = False) -> list[Route]:
    """The page's files, and ``GET /tinyllm/about``, by which it adapts to the server.

    ``model`` is the model's name or None; ``chat``, whether it has a chat template; ``ends``, the ids that
    end an answer; ``max_tokens``, the most tokens of an answer; ``watch``, whether runs are watched.
    """
    folder = files("tinyllm.serve") / "page"
    contents = {path: (folder / name).read_bytes() for path, (name, _) in FILES.items()}
    headers = {
        "Content-Security-Policy": policy(contents["/"]),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cache-Control": "no-cache",
    }

    async def file(request: Request) -> Response:
        path = request.scope["path"]
        return Response(contents[path], media_type=FILES[path][1], headers=headers)

    async def about(request: Request) -> JSONResponse:
        engine = request.app.state.engine
        found = {"model": None, "watch": watching}
        if engine is not None:
            chat, most = engine.tokenizer.chat_template is not None, request.app.state.limits.max_tokens
            found |= {"model": engine.name, "chat": chat, "ends": engine.stop_ids, "max_tokens": most}
        return JSONResponse(found, headers={"Cache-Control": "no-store"})

    return [*(Route(path, file, methods=["GET"]) for path in FILES), Route(ABOUT, about, methods=["GET"])]
