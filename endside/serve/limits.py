"""What a request may bring, checked before anything reads it: size, time, encoding, depth of JSON.

A body is read here once, up to the limit, and handed on whole. Python's parser stops at its own
recursion limit, so a nested bomb costs a millisecond and is refused like any other bad JSON.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, NoReturn

from endside.serve.errors import ApiError, response_of

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

SECONDS = 60.0  # for a whole body to arrive


class Limits:
    """ASGI middleware. largest: bytes of a body."""

    def __init__(self, app: App, *, largest: int) -> None:
        self.app = app
        self.largest = largest

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Pass a checked request on, or answer it with an error."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(SECONDS):
                body = await self._read(scope, receive)
            _check(body)
        except TimeoutError:
            late = ApiError(408, f"the body did not arrive in {SECONDS:.0f} seconds: send it again")
            await response_of(late)(scope, receive, send)
            return
        except ApiError as error:
            await response_of(error)(scope, receive, send)
            return
        await self.app(scope, _replay(body, receive), send)

    async def _read(self, scope: MutableMapping[str, Any], receive: Receive) -> bytes:
        headers = dict(scope["headers"])
        announced = headers.get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > self.largest:
            self._too_large()
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ApiError(400, "the client left before its request was complete")
            part = message.get("body", b"")
            parts.append(part)
            size += len(part)
            more = message.get("more_body", False)
            if size > self.largest:
                self._too_large()
        return b"".join(parts)

    def _too_large(self) -> NoReturn:
        raise ApiError(
            413, f"the body is larger than {self.largest:,} bytes: send less, or start the server "
            "with a larger --max-body",
        )  # fmt: skip


def _check(body: bytes) -> None:
    """Raises ApiError unless the body is JSON that a parser gets through."""
    try:
        json.loads(body.decode("utf-8"), parse_constant=_constant)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8: byte {error.start} cannot be read") from error
    except RecursionError as error:
        raise ApiError(400, "the JSON is nested too deeply: flatten it") from error
    except ValueError as error:
        raise ApiError(400, f"the body is no JSON: {error}") from error


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body as one message, then what comes after it: the news that the client has left."""
    sent = False

    async def again() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
