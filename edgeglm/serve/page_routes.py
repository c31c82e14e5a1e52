"""The search page: one answer, which fetches nothing but this server's own JSON and pictures.

Its policy allows the one style and the one script that are in it, by their digests, and no markup made
from text, so that nothing in a file's name can run (W3C, "Content Security Policy Level 3").
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from edgeglm.serve.service import Service

OPEN_PATHS = ("/",)
"""The page holds nothing that a token protects; what it asks for does."""
_PARTS = Path(__file__).with_name("page")
_SCRIPTS = ("asking", "theme", "searching", "results", "inputs", "facts", "charts", "start")
"""In this order they are one script, and share its names."""


def routes(_: Service) -> Sequence[BaseRoute]:
    """Return the route of the page, which is the same for every bundle."""
    body, headers = page()
    etag = headers["etag"]

    async def search_page(request: Request) -> Response:
        if request.headers.get("if-none-match") == etag:
            return Response(status_code=304, headers=headers)
        return Response(body, media_type="text/html", headers=headers)

    return [Route("/", search_page)]


@lru_cache(maxsize=1)
def page() -> tuple[bytes, dict[str, str]]:
    """Return the page and its headers."""
    style = (_PARTS / "page.css").read_text("utf-8")
    script = "\n".join((_PARTS / f"{name}.js").read_text("utf-8") for name in _SCRIPTS)
    frame = (_PARTS / "page.html").read_text("utf-8")
    body = frame.replace("/*STYLE*/", style).replace("/*SCRIPT*/", script).encode()
    policy = "; ".join(
        (
            "default-src 'none'",
            f"style-src {_source(style)}",
            f"script-src {_source(script)}",
            "img-src 'self' blob: data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )
    return body, {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "cache-control": "no-cache",
        "etag": f'"{hashlib.sha256(body).hexdigest()[:32]}"',
    }


def _source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
