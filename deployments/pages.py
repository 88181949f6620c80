"""The page at `/`: a chat that shows what happens to it, and the cluster; it reads what applications read.

Knows files and HTTP; nothing of what the page shows.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi.responses import Response

_FOLDER = Path(__file__).parent / "page"
_FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def pages() -> dict[str, Callable[[], Awaitable[Response]]]:
    """Endpoints by path. Raises OSError where the files are not there."""
    return {path: _answering(_FOLDER / name, kind) for path, (name, kind) in _FILES.items()}


def _answering(file: Path, kind: str) -> Callable[[], Awaitable[Response]]:
    content = file.read_bytes()

    async def page() -> Response:
        return Response(content, headers=_HEADERS, media_type=f"{kind}; charset=utf-8")

    return page
