"""POST /v1/chat/completions.

A required tool call (`tool_choice` "required" or a name) is written under a grammar: a JSON object
with the tool's name and arguments that fit its schema, told to the client as a tool call. It needs
no knowledge of the model's own format and cannot fail to parse. "auto" leaves the model to its own
format, which `endside.answer` reads.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from endside.engine.request import Token
from endside.serve.answers import Choice, call, events, whole
from endside.serve.errors import ApiError
from endside.serve.schema import ChatRequest, NamedTool
from endside.serve.state import State, new_id
from endside.stream import Piece, Stream

if TYPE_CHECKING:
    from fastapi import FastAPI

ANY_OBJECT = {"type": "object"}


@dataclass
class ChatShape:
    """Chunks and choices of a chat."""

    model: str
    table: Sequence[bytes]
    forced: bool = False  # the content is a tool call in JSON
    logprobs: bool = False
    id: str = field(default_factory=lambda: new_id("chatcmpl"))
    kind: str = "chat.completion"
    chunk_kind: str = "chat.completion.chunk"

    def begin(self, choice: Choice) -> dict[str, Any]:
        """Who speaks."""
        return self._chunk(choice, {"role": "assistant", "content": ""})

    def part(self, choice: Choice, piece: Piece, tokens: Sequence[Token]) -> dict[str, Any] | None:
        """New text, thought and calls."""
        delta: dict[str, Any] = {}
        if piece.reasoning:
            delta["reasoning_content"] = piece.reasoning
        if piece.text and not self.forced:
            delta["content"] = piece.text
        if piece.tool_calls:
            delta["tool_calls"] = choice.calls[-len(piece.tool_calls) :]
        listed = self._listed(tokens)
        if not delta and listed is None:
            return None
        return self._chunk(choice, delta, listed)

    def end(self, choice: Choice) -> list[dict[str, Any]]:
        """A forced call, which is complete only now, and how it ended."""
        last = []
        if self.forced:
            made = _forced_call(choice)
            if made is not None:
                choice.calls.append(made)
                last.append(self._chunk(choice, {"tool_calls": [made]}))
        return [*last, {**self._chunk(choice, {}), "finish_reason": choice.reason}]

    def whole(self, choice: Choice) -> dict[str, Any]:
        """The message."""
        content: str | None = choice.text
        if self.forced:
            made = _forced_call(choice)
            choice.calls += [] if made is None else [made]
            content = None if made is not None else content
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if choice.calls and not choice.text:
            message["content"] = None
        if choice.reasoning:
            message["reasoning_content"] = choice.reasoning
        if choice.calls:
            message["tool_calls"] = [
                {name: value for name, value in one.items() if name != "index"}
                for one in choice.calls
            ]
        return {
            "index": choice.index, "message": message, "finish_reason": choice.reason,
            "logprobs": self._listed(choice.tokens),
        }  # fmt: skip

    def _chunk(
        self, choice: Choice, delta: dict[str, Any], listed: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        return {"index": choice.index, "delta": delta, "finish_reason": None, "logprobs": listed}

    def _listed(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        return {"content": [self._one(token) for token in tokens]}

    def _one(self, token: Token) -> dict[str, Any]:
        top = [_spelled(self.table[one], value) for one, value in token.top]
        return {**_spelled(self.table[token.id], token.logprob), "top_logprobs": top}


def _spelled(data: bytes, value: float | None) -> dict[str, Any]:
    # JSON has no infinity; this is what OpenAI writes for a token that cannot come.
    number = -9999.0 if value is None or value < -9999.0 else value
    return {"token": data.decode("utf-8", "replace"), "logprob": number, "bytes": list(data)}


def _forced_call(choice: Choice) -> dict[str, Any] | None:
    """The call that the grammar made the model write; None where it was cut off."""
    try:
        found = json.loads(choice.text)
    except ValueError:
        return None
    arguments = json.dumps(found["arguments"], ensure_ascii=False)
    return call(len(choice.calls), new_id("call"), found["name"], arguments)


def add_to(app: FastAPI, state: State) -> None:
    """The route."""
    from fastapi import Request
    from fastapi.responses import JSONResponse, StreamingResponse

    async def complete(body: ChatRequest, request: Request) -> Any:
        tools, schema = _tools(body)
        options = _options(body, schema)
        think = body.chat_template_kwargs and body.chat_template_kwargs.enable_thinking

        def make(messages: list[dict[str, Any]], seed: int) -> Stream:
            return state.llm.stream(messages, think=think, tools=tools, seed=seed, **options)

        jobs = await state.jobs(body, [body.messages], make)
        table = state.llm.engine.token_bytes or ()
        shape = ChatShape(
            state.model, table, forced=schema is not None, logprobs=bool(body.logprobs)
        )
        if not body.stream:
            return JSONResponse(await whole(shape, jobs, state.runner, request))
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        sent = events(shape, jobs, state.runner, with_usage=with_usage)
        return StreamingResponse(sent, media_type="text/event-stream", headers=STREAM_HEADERS)

    complete.__annotations__ = {"body": ChatRequest, "request": Request}
    app.post("/v1/chat/completions", dependencies=list(state.guard))(complete)


STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def _options(body: ChatRequest, schema: dict[str, Any] | None) -> dict[str, Any]:
    options = body.options()
    options["max_tokens"] = body.max_completion_tokens or body.max_tokens
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    if body.logprobs:
        options["logprobs"] = body.top_logprobs or 0
    options["thinking_budget"] = body.thinking_budget
    options["regex"], options["grammar"] = body.regex, body.grammar
    form = body.response_format
    if form is not None and form.type == "json_object":
        options["json_schema"] = ANY_OBJECT
    elif form is not None and form.type == "json_schema":
        if form.json_schema is None or form.json_schema.schema_ is None:
            raise ApiError(
                400, "response_format json_schema has no schema: give json_schema.schema",
                param="response_format",
            )  # fmt: skip
        options["json_schema"] = form.json_schema.schema_
    if schema is not None:
        if options.get("json_schema") is not None:
            raise ApiError(
                400, "a required tool call and a response_format contradict each other: give one",
                param="tool_choice",
            )  # fmt: skip
        options["json_schema"] = schema
    return options


def _tools(body: ChatRequest) -> tuple[list[dict[str, Any]] | None, dict[str, Any] | None]:
    """The tools the model is told of, and the schema of the call it must make, if it must."""
    choice, tools = body.tool_choice, body.tools or None
    for at, tool in enumerate(tools or ()):
        function = tool.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ApiError(
                400, f"tools.{at}: a tool is {{type, function: {{name, …}}}}", param="tools"
            )
    if choice in (None, "auto"):
        return tools, None
    if choice == "none":
        return None, None
    known = {tool["function"]["name"]: tool["function"] for tool in tools or ()}
    if isinstance(choice, NamedTool):
        if choice.function.name not in known:
            raise ApiError(
                400, f"tool_choice names {choice.function.name!r}, which is not among the tools",
                param="tool_choice",
            )  # fmt: skip
        known = {choice.function.name: known[choice.function.name]}
    if not known:
        raise ApiError(400, "tool_choice asks for a call, but there are no tools", param="tools")
    return tools, {"anyOf": [_call_schema(one) for one in known.values()]}


def _call_schema(function: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            "name": {"const": function["name"]},
            "arguments": function.get("parameters") or ANY_OBJECT,
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }
