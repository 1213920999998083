"""The application: routes, checks around them, the web chat."""

from __future__ import annotations

import time
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

from endside import __version__
from endside.serve import auth, errors, limits
from endside.serve.log import event
from endside.serve.routes import chat, completions, others
from endside.serve.runner import Runner
from endside.serve.state import State

if TYPE_CHECKING:
    from fastapi import FastAPI

    from endside.serve.limits import App, Receive, Send


def build(
    runner: Runner,
    *,
    model: str,
    keys: tuple[bytes, ...] = (),
    cors: tuple[str, ...] = (),
    largest_body: int = 32 << 20,
) -> FastAPI:
    """The ASGI application around a running engine. cors: origins that browsers may ask from."""
    from fastapi import Depends, FastAPI, Request

    from endside.serve import ui

    app = FastAPI(
        title="endside", version=__version__, docs_url=None, redoc_url=None,
        openapi_url="/openapi.json",
    )  # fmt: skip

    async def needs_key(request: Request) -> None:
        auth.check(request.headers.get("authorization"), keys)

    needs_key.__annotations__ = {"request": Request}
    state = State(runner.llm, runner, model, (Depends(needs_key),))
    errors.add_to(app)
    for routes in (chat, completions, others):
        routes.add_to(app, state)
    ui.mount(app, state.info, state.guard)
    app.add_middleware(limits.Limits, largest=largest_body)
    if cors:
        from starlette.middleware.cors import CORSMiddleware

        app.add_middleware(
            CORSMiddleware, allow_origins=list(cors), allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )  # fmt: skip
    app.add_middleware(Log, runner=runner)
    return app


class Log:
    """ASGI middleware: one line and one count for every request."""

    def __init__(self, app: App, *, runner: Runner) -> None:
        self.app = app
        self.runner = runner

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Pass the request on and note how it ended."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, status = time.perf_counter(), 0

        async def noting(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noting)
        finally:
            # The pattern, not the path: a stranger's paths must not become labels without end.
            route = getattr(scope.get("route"), "path", "other")
            self.runner.metrics.requests.labels(route, str(status)).inc()
            if route not in ("/health", "/metrics"):
                seconds = round(time.perf_counter() - begun, 3)
                event(
                    "request", method=scope["method"], route=route, status=status, seconds=seconds
                )
