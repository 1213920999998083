"""From running jobs to responses: whole ones, or server-sent events while they are written.

Chat and plain completions differ in the shape of a chunk and of a choice; a `Shape` knows these,
and everything about waiting, leaving clients, errors and counting stands here once.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from endside.engine.request import Token
from endside.errors import UserError
from endside.serve.errors import ApiError, as_api_error, body_of
from endside.serve.runner import Job, Runner
from endside.stream import Piece

if TYPE_CHECKING:
    from fastapi import Request

QUIET = 10.0  # seconds without a piece until a comment shows that the stream lives


@dataclass
class Choice:
    """One of the answers to a request, as far as it has come."""

    index: int
    job: Job
    text: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    thought: int = 0  # tokens of reasoning

    def take(self, piece: Piece) -> list[Token]:
        """Add a piece; its tokens."""
        start = len(self.tokens)
        tokens = self.job.handle.tokens(start, start + len(piece.token_ids))
        self.tokens += tokens
        self.text += piece.text
        self.reasoning += piece.reasoning
        for one in piece.tool_calls:
            self.calls.append(call(len(self.calls), one.id, one.name, one.arguments))
        if piece.reasoning and not piece.text:
            self.thought += len(tokens)
        return tokens

    @property
    def reason(self) -> str:
        """finish_reason in OpenAI's words."""
        found = self.job.handle.finish_reason or "stop"
        if self.calls and found == "stop":
            return "tool_calls"
        return found if found in ("stop", "length") else "stop"


def call(index: int, id: str, name: str, arguments: str) -> dict[str, Any]:
    """A tool call as it stands in a chunk."""
    function = {"name": name, "arguments": arguments}
    return {"index": index, "id": id, "type": "function", "function": function}


class Shape(Protocol):
    """What differs between the routes."""

    kind: str  # of the whole object; a chunk's is chunk_kind
    chunk_kind: str
    id: str
    model: str

    def begin(self, choice: Choice) -> dict[str, Any] | None:
        """The first chunk's choice of a stream, None where there is none."""
        ...

    def part(self, choice: Choice, piece: Piece, tokens: Sequence[Token]) -> dict[str, Any] | None:
        """A chunk's choice for a piece that was taken already; None: nothing to say."""
        ...

    def end(self, choice: Choice) -> list[dict[str, Any]]:
        """The last chunks' choices; the very last has the finish_reason."""
        ...

    def whole(self, choice: Choice) -> dict[str, Any]:
        """The choice of a whole response."""
        ...


def usage(choices: Sequence[Choice]) -> dict[str, Any]:
    """Tokens counted. The prompt of several choices counts once."""
    handles = [one.job.handle for one in choices]
    prompts = {one.request.tokens: one for one in handles}
    prompt = sum(map(len, prompts))
    answer = sum(len(one.token_ids) for one in handles)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {"cached_tokens": sum(one.reused for one in prompts.values())},
        "completion_tokens_details": {"reasoning_tokens": sum(one.thought for one in choices)},
    }


def _object(shape: Shape, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": shape.id, "object": kind, "created": int(time.time()), "model": shape.model,
        "choices": choices,
    }  # fmt: skip


async def whole(
    shape: Shape, jobs: Sequence[Job], runner: Runner, request: Request
) -> dict[str, Any]:
    """The response when all answers are there; cancels them when the client leaves."""
    choices = [Choice(index, job) for index, job in enumerate(jobs)]
    reading = asyncio.gather(*(_read(one) for one in choices))
    leaving = asyncio.create_task(_left(request))
    try:
        await asyncio.wait([reading, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not reading.done():
            raise ApiError(499, "the client has left")
        await reading
    finally:
        leaving.cancel()
        reading.cancel()
        for job in jobs:
            runner.cancel(job)
    made = _object(shape, shape.kind, [shape.whole(one) for one in choices])
    return {**made, "usage": usage(choices)}


async def _read(choice: Choice) -> None:
    while pieces := await choice.job.pieces():
        for piece in pieces:
            choice.take(piece)


async def _left(request: Request) -> None:
    """Returns when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def events(
    shape: Shape, jobs: Sequence[Job], runner: Runner, *, with_usage: bool
) -> AsyncIterator[bytes]:
    """Server-sent events of a streamed response; leaving it early cancels the answers."""
    choices = [Choice(index, job) for index, job in enumerate(jobs)]
    line: asyncio.Queue[dict[str, Any] | Exception | None] = asyncio.Queue()
    readers = [asyncio.create_task(_follow(shape, one, line)) for one in choices]
    open_ends = len(readers)
    try:
        while open_ends:
            try:
                found = await asyncio.wait_for(line.get(), QUIET)
            except TimeoutError:
                yield b": still working\n\n"
                continue
            if found is None:
                open_ends -= 1
            elif isinstance(found, Exception):
                yield _event(body_of(_api_error(found)))
                return
            else:
                yield _event(_object(shape, shape.chunk_kind, [found]))
        if with_usage:
            yield _event({**_object(shape, shape.chunk_kind, []), "usage": usage(choices)})
        yield b"data: [DONE]\n\n"
    finally:
        for reader in readers:
            reader.cancel()
        for job in jobs:
            runner.cancel(job)


async def _follow(shape: Shape, choice: Choice, line: asyncio.Queue[Any]) -> None:
    """Put every chunk of one answer into the line, then None; or what went wrong."""
    try:
        _put(line, shape.begin(choice))
        while pieces := await choice.job.pieces():
            for piece in pieces:
                tokens = choice.take(piece)
                _put(line, shape.part(choice, piece, tokens))
        for chunk in shape.end(choice):
            _put(line, chunk)
    except (UserError, ApiError) as error:
        line.put_nowait(error)
        return
    line.put_nowait(None)


def _put(line: asyncio.Queue[Any], chunk: dict[str, Any] | None) -> None:
    if chunk is not None:
        line.put_nowait(chunk)


def _api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    assert isinstance(error, UserError), f"an error of no known kind: {error!r}"
    return as_api_error(error)


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode("utf-8", "replace") + b"\n\n"
