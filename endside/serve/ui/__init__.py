"""The web chat at `/`: one page, its scripts and styles, and a route that renders markdown.

Everything the page loads comes from this folder or from the server's own API; nothing is built or
fetched from elsewhere. A strict content security policy holds it to that: no inline script or
style, no foreign host, no frame around it. Conversations live in the browser alone.

    GET  /                 the page             GET /ui/static/NAME   its modules and styles
    POST /ui/render        {"text"} -> {"html", "tail", "settled"} (endside.serve.ui.markdown)
    GET  /ui/info          what the page shows about the model: the caller's `info`

The page needs no key; what it calls under /v1 and /ui/render does where the server has keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from endside.serve.ui.markdown import LONGEST_TEXT

if TYPE_CHECKING:
    from fastapi import FastAPI, Response

POLICY = "; ".join(
    [
        "default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self' data:",
        "connect-src 'self'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
    ]
)  # fmt: skip
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


def mount(app: FastAPI, info: Callable[[], dict[str, Any]], guard: Sequence[Any] = ()) -> None:
    """Adds the page and its routes. guard: dependencies of those that need a key."""
    from fastapi import Body, Response
    from fastapi.concurrency import run_in_threadpool

    from endside.serve.ui.markdown import render

    pages = _pages()

    def page(name: str) -> Response:
        if name not in pages:
            return Response(f"there is no {name}", 404, HEADERS, "text/plain")
        content, kind = pages[name]
        return Response(content, 200, HEADERS, kind)

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return page("index.html")

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        return page("icon.svg")

    @app.get("/ui/static/{name}", include_in_schema=False)
    async def static(name: str) -> Response:
        return page(name)

    @app.get("/ui/info", include_in_schema=False, dependencies=list(guard))
    async def about() -> dict[str, Any]:
        return info()

    @app.post("/ui/render", include_in_schema=False, dependencies=list(guard))
    async def rendered(text: str = Body(embed=True, max_length=LONGEST_TEXT)) -> dict[str, Any]:
        done = await run_in_threadpool(render, text)
        return {"html": done.html, "tail": done.tail, "settled": done.settled}


def _pages() -> dict[str, tuple[bytes, str]]:
    """Every file of the page by name, read once: a request's path never reaches the disk."""
    found = {}
    for file in files("endside.serve.ui").joinpath("static").iterdir():
        kind = KINDS.get("." + file.name.rpartition(".")[2])
        if kind is not None:
            found[file.name] = (file.read_bytes(), kind)
    return found
