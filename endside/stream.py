"""An answer as it comes, and what there is of it in the end: Stream, Piece, Generation.

Text is decoded from the bytes of the tokens, so a piece never holds half a character, and what a
stop string may still take back is not shown. The answer to a conversation goes through a reader
(`endside.answer`), which parts the thought and the tool calls from it.
"""

from __future__ import annotations

import codecs
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from endside.answer import Content, Event, Reader, Reasoning, ToolCall
from endside.engine.engine import Engine
from endside.engine.request import Handle, Request


@dataclass(frozen=True)
class Piece:
    """Text that can be shown now, and the tokens sampled since the last piece."""

    text: str
    token_ids: tuple[int, ...]
    reasoning: str = ""  # of a chat's thought
    tool_calls: tuple[ToolCall, ...] = ()  # whole ones


@dataclass(frozen=True)
class Usage:
    """Tokens counted; the end token is one of the completion's."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Timings:
    """Seconds and rates. Prefill runs until the first token is there; decode makes the others."""

    load_s: float
    prefill_s: float
    prefill_tokens_per_s: float
    decode_s: float
    decode_tokens_per_s: float


@dataclass(frozen=True)
class Attended:
    """How the last token attended: "dense" or "sparse", and how many keys it saw."""

    mode: str
    visible_tokens: int


@dataclass(frozen=True)
class Speculative:
    """What drafting did: tokens of the answer for each pass of the model, 1 without any."""

    draft: str  # "none", "lookup", ...
    mean_accepted: float
    passes: int
    drafted: int  # tokens that were guessed and verified


@dataclass(frozen=True)
class Generation:
    """A finished answer; `dataclasses.asdict` gives the object that `endside run --json` prints."""

    text: str  # a chat's answer without its thought and tool calls; else everything
    reasoning: str  # a chat's thought
    tool_calls: tuple[ToolCall, ...]
    token_ids: tuple[int, ...]  # everything sampled, an end token included
    finish_reason: str  # "stop", "length" or "cancelled"
    usage: Usage
    timings: Timings
    attention: Attended
    speculative: Speculative
    executor: str
    seed: int  # the one given, or the one drawn: the same seed gives the same text
    peak_memory_bytes: int  # of the whole process so far


class Stream(Iterator[Piece]):
    """An answer while it is written: iterate it, or ask for its `result`.

    It starts with the first piece. `close`, or leaving a `with` block, cancels what is still
    running and frees its memory, so an interrupted answer costs nothing; one that is merely dropped
    is cancelled too, and freed by the engine's next step.
    """

    def __init__(
        self,
        engine: Engine,
        request: Request,
        *,
        reader: Reader | None = None,
        load_s: float = 0.0,
    ) -> None:
        self._engine = engine
        self._request = request
        self._load_s = load_s
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        self._reader = reader
        self._pieces: list[Piece] = []
        self._seen = 0  # tokens of the handle that were read
        self._given = 0  # of these, tokens that are in some piece
        self.handle: Handle | None = None

    def start(self) -> Handle:
        """Queue the request now, to run beside others; otherwise the first piece does it."""
        if self.handle is None:
            self.handle = self._engine.submit(self._request)
        return self.handle

    def __next__(self) -> Piece:
        handle = self.start()
        while handle.token(self._seen) is not None:
            piece = self._take()
            if piece is not None:
                return piece
        piece = self._rest()
        if piece is None:
            raise StopIteration
        return piece

    def ready(self) -> list[Piece]:
        """The pieces of tokens that are there already: for readers that do not step the engine."""
        pieces = []
        while self._seen < self.start().ready:
            piece = self._take()
            if piece is not None:
                pieces.append(piece)
        return pieces

    def _take(self) -> Piece | None:
        """One more token; the piece that it completes, if it does."""
        handle = self.start()
        token = handle.token(self._seen)
        assert token is not None, "asked for a token that is not there"
        self._seen += 1
        last = token.finish_reason is not None
        events = self._events(self._decode(token.text, final=last), last=last)
        return self._piece(events) if events or last else None

    def _rest(self) -> Piece | None:
        """What was held back when the answer ended without a last token: it was cancelled."""
        events = self._events(self._decode(b"", final=True), last=True)
        return self._piece(events) if events else None

    def _piece(self, events: list[Event]) -> Piece:
        handle, first = self.start(), self._given
        self._given = self._seen
        piece = Piece(
            "".join(one.text for one in events if isinstance(one, Content)),
            tuple(handle.token_ids[first : self._seen]),
            "".join(one.text for one in events if isinstance(one, Reasoning)),
            tuple(one for one in events if isinstance(one, ToolCall)),
        )
        self._pieces.append(piece)
        return piece

    def _events(self, text: str, *, last: bool) -> list[Event]:
        if self._reader is None:
            return [Content(text)] if text else []
        events = self._reader.push(text)
        return events + self._reader.finish() if last else events

    def result(self) -> Generation:
        """Run to the end and return the whole answer; after `close`, what there is of it."""
        for _ in self:
            pass
        handle, executor = self.start(), self._engine.executor
        prompt, answer = len(self._request.tokens), len(handle.token_ids)
        times = handle.times
        prefill_s = times.first - times.started if answer else 0.0
        decode_s = times.finished - times.first if answer else 0.0
        # The last token was sampled and not run: the token before it attended last.
        seen = max(prompt, prompt + answer - 1)
        return Generation(
            text="".join(one.text for one in self._pieces),
            reasoning="".join(one.reasoning for one in self._pieces),
            tool_calls=tuple(call for one in self._pieces for call in one.tool_calls),
            token_ids=tuple(handle.token_ids),
            finish_reason=handle.finish_reason or "cancelled",
            usage=Usage(prompt, answer),
            timings=Timings(
                load_s=self._load_s,
                prefill_s=prefill_s,
                prefill_tokens_per_s=prompt / prefill_s if answer else 0.0,
                decode_s=decode_s,
                decode_tokens_per_s=(answer - 1) / decode_s if answer > 1 else 0.0,
            ),
            attention=Attended(*executor.attention(seen)),
            speculative=Speculative(
                draft=self._engine.drafts.name if self._engine.drafts else "none",
                mean_accepted=answer / handle.runs if handle.runs else 0.0,
                passes=handle.runs,
                drafted=handle.drafted,
            ),
            executor=executor.name,
            seed=handle.seed,
            peak_memory_bytes=peak_memory(),
        )

    def close(self) -> None:
        """Cancel what is still running and free its memory; without effect on a finished answer."""
        handle = self.start()
        if not handle.done:
            handle.cancel()
            self._engine.release()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # Collection may strike inside a step, so this only leaves a mark.
        if self.handle is not None:
            self.handle.cancel()


def peak_memory() -> int:
    """The most main memory this process has held, in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
