"""POST /v1/completions: continue texts or token ids, without a template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from endside.engine.request import Token
from endside.serve.answers import Choice, events, whole
from endside.serve.errors import ApiError
from endside.serve.routes.chat import STREAM_HEADERS
from endside.serve.schema import CompletionRequest
from endside.serve.state import State, new_id
from endside.stream import Piece, Stream

if TYPE_CHECKING:
    from fastapi import FastAPI

Prompt = str | list[int]


@dataclass
class TextShape:
    """Chunks and choices of plain text. heads: what `echo` puts before each answer."""

    model: str
    table: Sequence[bytes]
    heads: Sequence[str]
    logprobs: bool = False
    id: str = field(default_factory=lambda: new_id("cmpl"))
    kind: str = "text_completion"
    chunk_kind: str = "text_completion"

    def begin(self, choice: Choice) -> dict[str, Any] | None:
        """The prompt, where it is to be echoed."""
        head = self.heads[choice.index]
        return self._choice(choice, head, (), None) if head else None

    def part(self, choice: Choice, piece: Piece, tokens: Sequence[Token]) -> dict[str, Any] | None:
        """New text."""
        if not piece.text and not self.logprobs:
            return None
        return self._choice(choice, piece.text, tokens, None)

    def end(self, choice: Choice) -> list[dict[str, Any]]:
        """How it ended."""
        return [self._choice(choice, "", (), choice.reason)]

    def whole(self, choice: Choice) -> dict[str, Any]:
        """The text."""
        text = self.heads[choice.index] + choice.text
        return self._choice(choice, text, choice.tokens, choice.reason)

    def _choice(
        self, choice: Choice, text: str, tokens: Sequence[Token], reason: str | None
    ) -> dict[str, Any]:
        listed = None
        if self.logprobs:
            shown = [self.table[one.id].decode("utf-8", "replace") for one in tokens]
            offsets, at = [], len(self.heads[choice.index])
            for one in shown:
                offsets.append(at)
                at += len(one)
            listed = {
                "tokens": shown,
                "token_logprobs": [one.logprob for one in tokens],
                "top_logprobs": [
                    {self.table[id].decode("utf-8", "replace"): value for id, value in one.top}
                    for one in tokens
                ],
                "text_offset": offsets,
            }
        return {"index": choice.index, "text": text, "finish_reason": reason, "logprobs": listed}


def add_to(app: FastAPI, state: State) -> None:
    """The route."""
    from fastapi import Request
    from fastapi.responses import JSONResponse, StreamingResponse

    async def complete(body: CompletionRequest, request: Request) -> Any:
        _check(body)
        prompts = _prompts(body.prompt)
        options = {
            **body.options(),
            "max_tokens": body.max_tokens, "logprobs": body.logprobs, "regex": body.regex,
            "grammar": body.grammar, "json_schema": body.json_schema,
        }  # fmt: skip

        def make(prompt: Prompt, seed: int) -> Stream:
            return state.llm.stream(prompt, seed=seed, **options)

        jobs = await state.jobs(body, prompts, make)
        heads = [
            _text(state, one) if body.echo else "" for one in prompts for _ in range(body.n or 1)
        ]
        shape = TextShape(
            state.model, state.llm.engine.token_bytes or (), heads, body.logprobs is not None
        )
        if not body.stream:
            return JSONResponse(await whole(shape, jobs, state.runner, request))
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        sent = events(shape, jobs, state.runner, with_usage=with_usage)
        return StreamingResponse(sent, media_type="text/event-stream", headers=STREAM_HEADERS)

    complete.__annotations__ = {"body": CompletionRequest, "request": Request}
    app.post("/v1/completions", dependencies=list(state.guard))(complete)


def _check(body: CompletionRequest) -> None:
    if body.suffix:
        raise ApiError(400, "suffix is not supported: put it into the prompt", param="suffix")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise ApiError(400, "best_of other than n is not supported: leave it out", param="best_of")


def _prompts(given: Any) -> list[Prompt]:
    """One prompt or several, each a text or token ids."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise ApiError(400, "the prompt is empty: give some text to continue", param="prompt")
    if isinstance(given[0], int):
        return [given]
    if len(given) > 64:
        raise ApiError(400, f"{len(given)} prompts: at most 64 in one request", param="prompt")
    return list(given)


def _text(state: State, prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else state.llm.tokenizer.decode(prompt)
