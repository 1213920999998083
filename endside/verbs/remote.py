"""`endside run --server URL`: the same prompts and chats, answered by a server that runs already.

The model stays loaded there, so an answer begins at once and several people share one copy. It
speaks the OpenAI API with our additions (top_k, grammar, ...), over the standard library's HTTP
client: any server of that API answers plain chats, `endside serve` acts on every flag. What
belongs to loading a model (--quant, --context, ...) is refused here rather than passed over.

MODEL may be left out: the first word is taken as the model's name only where the server has a
model of that name. A key is read from the variable ENDSIDE_API_KEY, not from a flag, because other
people of the machine can read flags.
"""

from __future__ import annotations

import http.client
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from endside.answer import ToolCall
from endside.engine.executors import Plan
from endside.errors import UserError
from endside.stream import Piece, Usage

if TYPE_CHECKING:
    from endside.verbs.run import Run

KEY = "ENDSIDE_API_KEY"
PATIENCE = 660.0  # seconds without a byte; a server lets an answer take 600 unless told otherwise


@dataclass(frozen=True)
class Timing:
    """Seconds as the client saw them, waiting in the server's queue included."""

    first_s: float  # from asking to the first text
    total_s: float


@dataclass(frozen=True)
class Answer:
    """What a server gave; `--json` prints it."""

    text: str
    reasoning: str
    tool_calls: tuple[ToolCall, ...]
    finish_reason: str
    usage: Usage
    timings: Timing
    model: str
    server: str

    def stats(self) -> str:
        """The line of `--stats`."""
        times, usage = self.timings, self.usage
        decode = times.total_s - times.first_s
        speed = (usage.completion_tokens - 1) / decode if decode > 0 else 0.0
        return (
            f"[{self.model} at {self.server}] prompt {usage.prompt_tokens} tokens; first text "
            f"after {times.first_s:.2f} s; answer {usage.completion_tokens} tokens at "
            f"{max(speed, 0.0):.1f}/s; ended by {self.finish_reason}"
        )


class Server:
    """A running server, and the model there that is asked."""

    def __init__(self, url: str) -> None:
        place = urlsplit(url if "//" in url else f"http://{url}")
        if place.scheme not in ("http", "https") or not place.hostname:
            raise UserError(f"--server {url}: give an address such as http://127.0.0.1:8000")
        try:
            port = place.port
        except ValueError as error:
            raise UserError(f"--server {url}: {error}") from error
        self.url = url.rstrip("/")
        self._path = place.path.rstrip("/").removesuffix("/v1")
        kind = (
            http.client.HTTPSConnection if place.scheme == "https" else http.client.HTTPConnection
        )
        self._open = lambda: kind(place.hostname or "", port, timeout=PATIENCE)
        self.model, self.talks = "", True

    def settle(self, flags: Run) -> Run:
        """Find the model; the flags with the words of the line in their places."""
        _check(flags)
        names = [one["id"] for one in self._get("/v1/models")["data"]]
        if not names:
            raise UserError(f"{self.url} serves no model")
        if flags.model in names:
            self.model = flags.model
        elif flags.prompt is not None:
            raise UserError(f"{self.url} has no model {flags.model!r}: it has {', '.join(names)}")
        else:
            self.model = names[0]
            flags = replace(flags, prompt=flags.model, model=None)
            if flags.prompt is not None and flags.file is not None:
                raise UserError("both a prompt and --file are given: give one")
        try:
            self.talks = bool(self._get("/ui/info").get("chat", True))
        except UserError:
            self.talks = True  # not ours: chats are what servers of this API are for
        return flags

    def ask(self, messages: list[dict[str, Any]], options: Mapping[str, Any]) -> Stream:
        """The answer to a conversation."""
        body = _common(options)
        schema = options.get("json_schema")
        if schema is not None:
            form = {"name": "answer", "schema": _object(schema)}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        if options.get("think") is not None:
            body["chat_template_kwargs"] = {"enable_thinking": options["think"]}
        body |= {"thinking_budget": options.get("thinking_budget"), "messages": messages}
        return self._stream("/v1/chat/completions", body)

    def complete(self, prompt: str, options: Mapping[str, Any]) -> Stream:
        """The text that continues `prompt`."""
        body, schema = _common(options), options.get("json_schema")
        if schema is not None:
            body["json_schema"] = _object(schema)
        return self._stream("/v1/completions", {**body, "prompt": prompt})

    def _stream(self, path: str, body: dict[str, Any]) -> Stream:
        given = {name: value for name, value in body.items() if value not in (None, ())}
        given |= {"model": self.model, "stream": True, "stream_options": {"include_usage": True}}
        return Stream(self, path, json.dumps(given).encode())

    def _get(self, path: str) -> dict[str, Any]:
        with self.request("GET", path) as answer:
            try:
                return json.loads(answer.read())
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise UserError(f"{self.url}{path} is no answer of an API: {error}") from error

    @contextmanager
    def request(
        self, method: str, path: str, body: bytes | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        """An answer with status 200, still to be read. Raises UserError for any other."""
        headers = {"Content-Type": "application/json"}
        if os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {os.environ[KEY]}"
        line = self._open()
        try:
            try:
                line.request(method, self._path + path, body, headers)
                answer = line.getresponse()
                if answer.status != 200:
                    raise UserError(f"{self.url}: {_reason(answer)}")
            except (OSError, http.client.HTTPException) as error:
                raise UserError(
                    f"no server answers at {self.url} ({error or type(error).__name__}): start one "
                    "with `endside serve MODEL`"
                ) from error
            yield answer
        finally:
            line.close()


class Stream(Iterator[Piece]):
    """An answer while it comes; asking begins with the first piece."""

    def __init__(self, server: Server, path: str, body: bytes) -> None:
        self._server = server
        self._pieces: list[Piece] = []
        self._reason = "cancelled"
        self._usage = Usage(0, 0)
        self._begun = self._first = self._ended = 0.0
        self._reading = self._read(path, body)

    def __next__(self) -> Piece:
        return next(self._reading)

    def close(self) -> None:
        """Hang up: the server stops computing."""
        self._reading.close()

    def result(self) -> Answer:
        """Read to the end; the whole answer, after `close` what there is of it."""
        for _ in self:
            pass
        return Answer(
            text="".join(one.text for one in self._pieces),
            reasoning="".join(one.reasoning for one in self._pieces),
            tool_calls=tuple(call for one in self._pieces for call in one.tool_calls),
            finish_reason=self._reason,
            usage=self._usage,
            timings=Timing(self._first - self._begun, self._ended - self._begun),
            model=self._server.model,
            server=self._server.url,
        )

    def _read(self, path: str, body: bytes) -> Iterator[Piece]:
        self._begun = self._first = self._ended = time.monotonic()
        with self._server.request("POST", path, body) as answer:
            for chunk in _chunks(answer, self._server.url):
                self._ended = time.monotonic()
                if chunk.get("usage"):
                    found = chunk["usage"]
                    self._usage = Usage(found["prompt_tokens"], found["completion_tokens"])
                for choice in chunk.get("choices", ()):
                    self._reason = choice.get("finish_reason") or self._reason
                    piece = _piece(choice)
                    if piece is not None:
                        self._first = self._first if self._pieces else self._ended
                        self._pieces.append(piece)
                        yield piece


def _check(flags: Run) -> None:
    """Refuse what acts only where a model is loaded here."""
    plan = Plan()
    given = [
        one.name for one in fields(Plan) if getattr(flags.plan, one.name) != getattr(plan, one.name)
    ]
    given += [name for name in ("session", "control") if getattr(flags, name)]
    if given:
        names = ", ".join("--" + name.replace("_", "-") for name in given)
        raise UserError(
            f"{names}: only for a model that is loaded here; leave it out with --server"
        )


def _common(options: Mapping[str, Any]) -> dict[str, Any]:
    names = (
        "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty",
        "presence_penalty", "frequency_penalty", "logit_bias", "seed", "stop", "regex", "grammar",
    )  # fmt: skip
    return {name: options.get(name) for name in names}


def _object(schema: Any) -> Any:
    try:
        return json.loads(schema) if isinstance(schema, str) else schema
    except ValueError as error:
        raise UserError(f"--json-schema is no JSON: {error}") from error


def _reason(answer: http.client.HTTPResponse) -> str:
    """What a server says about a request it refuses."""
    data = answer.read(100_000)
    try:
        said = json.loads(data)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        said = f"answers {answer.status} {answer.reason}"
    later = answer.headers.get("Retry-After")
    also = f" (in about {later} s)" if later else ""
    key = f"; the key is read from the variable {KEY}" if answer.status == 401 else ""
    return f"{said}{also}{key}"


def _chunks(answer: http.client.HTTPResponse, url: str) -> Iterator[dict[str, Any]]:
    """The objects of a stream of events. Raises UserError where it breaks off."""
    broken = UserError(f"{url} went away in the middle of the answer: ask again")
    try:
        for line in answer:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            chunk = json.loads(data)
            if "error" in chunk:
                raise UserError(f"{url}: {chunk['error'].get('message', chunk['error'])}")
            yield chunk
    except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
        raise broken from error
    raise broken


def _piece(choice: dict[str, Any]) -> Piece | None:
    """The news of a chunk's choice, a chat's or a text's."""
    delta = choice.get("delta") or {}
    text = delta.get("content") or choice.get("text") or ""
    thought = delta.get("reasoning_content") or ""
    calls = tuple(
        ToolCall(one["id"], one["function"]["name"], one["function"]["arguments"])
        for one in delta.get("tool_calls") or ()
    )
    return Piece(text, (), thought, calls) if text or thought or calls else None
