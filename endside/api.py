"""LLM: a model, its tokenizer and an engine, joined for Python.

    llm = LLM("openbmb/MiniCPM4-0.5B", context=8192)
    llm.generate("Once", max_tokens=64)               the whole answer: Generation
    llm.chat([{"role": "user", "content": "Hi"}])     rendered with the chat template
    for piece in llm.stream("Once"): ...              as it is written: Piece
    llm.logits([1, 2, 3])                             (T, V) float32

Values left out are those of the model's generation_config.json, else greedy decoding; without
`max_tokens` an answer ends at an end token or where the context is full. Generation stops at every
end id that the tokenizer, generation_config.json or config.json names: models with two of them
(MiniCPM4: </s> and <|im_end|>) rarely list both in one place.

Text is decoded from the bytes of the tokens, so a piece never holds half a character, and what a
stop string may still take back is not shown.
"""

from __future__ import annotations

import codecs
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from endside.engine.engine import Engine
from endside.engine.executor import Full
from endside.engine.executors import Plan, create
from endside.engine.request import Handle, Request, SamplingConfig
from endside.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from endside.checkpoint import Checkpoint
    from endside.engine.executor import Executor
    from endside.tokenizer import Tokenizer

Config = TypeVar("Config")
Message = Mapping[str, Any]


@dataclass(frozen=True)
class Piece:
    """Text that can be shown now, and the tokens sampled since the last piece."""

    text: str
    token_ids: tuple[int, ...]


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
class Generation:
    """A finished answer; `dataclasses.asdict` gives the object that `endside run --json` prints."""

    text: str
    token_ids: tuple[int, ...]  # everything sampled, an end token included
    finish_reason: str  # "stop", "length" or "cancelled"
    usage: Usage
    timings: Timings
    attention: Attended
    executor: str
    seed: int  # the one given, or the one drawn: the same seed gives the same text
    peak_memory_bytes: int  # of the whole process so far


class LLM:
    """A loaded model. Options are the fields of `endside.engine.executors.Plan`."""

    def __init__(self, model: str | Path, **options: Any) -> None:
        """Load a local folder or a hub name. Raises UserError, and nothing is kept, if it is wrong.

        options: executor="auto", attention="auto", device="auto", dtype="auto", quant="none",
        group=128, head="auto", kv="auto", context=None, capacity=None, threads=None, max_batch=8.
        """
        from endside.checkpoint import Checkpoint, resolve
        from endside.tokenizer import Tokenizer

        begin = time.perf_counter()
        plan = _build(Plan, options, "LLM")
        checkpoint = Checkpoint.open(resolve(model), verify=False)  # `create` verifies
        tokenizer = Tokenizer.load(checkpoint.folder, whole=False)
        executor = create(checkpoint, plan)
        self._join(
            _engine(executor, tokenizer, plan.max_batch),
            tokenizer,
            generation=checkpoint.generation,
            stop_ids=_stop_ids(checkpoint, tokenizer),
        )
        self.load_s = time.perf_counter() - begin

    @classmethod
    def of(
        cls,
        executor: Executor,
        tokenizer: Tokenizer,
        *,
        generation: dict[str, Any] | None = None,
        max_batch: int = 8,
    ) -> LLM:
        """An LLM around a model that is in memory already, such as one just trained."""
        llm = cls.__new__(cls)
        engine = _engine(executor, tokenizer, max_batch)
        stop_ids = frozenset(tokenizer.eos_ids)
        llm._join(engine, tokenizer, generation=generation or {}, stop_ids=stop_ids)
        return llm

    def _join(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        *,
        generation: dict[str, Any],
        stop_ids: frozenset[int],
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.generation_config = generation
        self.stop_ids = stop_ids
        self.load_s = 0.0

    @property
    def context(self) -> int:
        """Tokens that fit, prompt and answer together."""
        return self.engine.executor.context

    def generate(self, prompt: str | Sequence[int], **sampling: Any) -> Generation:
        """Continue a text, or token ids as they are. sampling: the fields of SamplingConfig."""
        return self.stream(prompt, **sampling).result()

    def chat(
        self,
        messages: Sequence[Message],
        *,
        think: bool | None = None,
        tools: list[dict[str, Any]] | None = None,
        control: bool = False,
        **sampling: Any,
    ) -> Generation:
        """Answer a conversation of {"role", "content"} messages in the model's own template."""
        ids = self.render(messages, think=think, tools=tools, control=control)
        return self.stream(ids, **sampling).result()

    def stream(
        self,
        prompt: str | Sequence[int] | Sequence[Message],
        *,
        think: bool | None = None,
        tools: list[dict[str, Any]] | None = None,
        control: bool = False,
        **sampling: Any,
    ) -> Stream:
        """The answer to a text, token ids or messages, piece by piece.

        control: names of control tokens, written out in the text, become these tokens.

        Everything that can be refused is refused here, before the first piece is asked for.
        """
        if not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping):
            ids = self.render(prompt, think=think, tools=tools, control=control)
        elif think is None and tools is None:
            ids = self.encode(prompt, control=control)
        else:
            raise UserError("think and tools belong to a chat: give messages, not a prompt")
        config = _build(SamplingConfig, sampling, "sampling")
        request = Request(ids, config.with_defaults(self.generation_config), self.stop_ids)
        self.engine.check(request)
        return Stream(self.engine, request, load_s=self.load_s)

    def generate_many(
        self, prompts: Sequence[str | Sequence[int]], **sampling: Any
    ) -> list[Generation]:
        """`generate` for several prompts at once; each answer is the one it would get alone."""
        streams = [self.stream(prompt, **sampling) for prompt in prompts]
        for stream in streams:
            stream.start()
        try:
            return [stream.result() for stream in streams]
        finally:
            for stream in streams:
                stream.close()

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` works: the model has a template, or the tokens of the usual one."""
        from endside import chat

        return chat.can_chat(self.tokenizer)

    def encode(self, prompt: str | Sequence[int], *, control: bool = False) -> tuple[int, ...]:
        """Token ids of a text, with the model's begin token; ids are returned as they are.

        control: names of control tokens in the text become these tokens, else they stay text.
        """
        if len(prompt) == 0:
            raise UserError("the prompt is empty: give some text to continue")
        if isinstance(prompt, str):
            return tuple(self.tokenizer.encode(prompt, bos=True, control=control))
        if not all(hasattr(one, "__index__") for one in prompt):
            raise UserError("a prompt is a text, a list of token ids or a list of messages")
        return tuple(int(one) for one in prompt)

    def render(
        self,
        messages: Sequence[Message],
        *,
        think: bool | None = None,
        tools: list[dict[str, Any]] | None = None,
        control: bool = False,
    ) -> tuple[int, ...]:
        """Token ids of a conversation that asks for the next answer."""
        from endside import chat

        if not messages:
            raise UserError("the conversation is empty: give at least one message")
        ids = chat.render(self.tokenizer, list(messages), tools=tools, think=think, control=control)
        return tuple(ids)

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits after each of the token ids, (T, V) float32."""
        import numpy as np

        executor = self.engine.executor
        request = Request(tuple(ids))
        if len(request.tokens) > self.context:
            raise UserError(
                f"{len(request.tokens):,} tokens, cache holds {self.context:,}: "
                "raise context or give fewer"
            )
        self.engine.check_ids(request)
        self.engine.release()
        try:
            seq = executor.open(len(request.tokens))
        except Full:
            raise UserError("running requests fill the cache: let them end first") from None
        tokens, size = np.array(request.tokens, dtype=np.int64), self.engine.prefill_chunk
        try:
            chunks = [tokens[at : at + size] for at in range(0, len(tokens), size)]
            rows = [executor.prefill(seq, one, logits="all") for one in chunks]
            return np.concatenate([part for part in rows if part is not None])
        finally:
            executor.close(seq)


class Stream(Iterator[Piece]):
    """An answer while it is written: iterate it, or ask for its `result`.

    It starts with the first piece. `close`, or leaving a `with` block, cancels what is still
    running and frees its memory, so an interrupted answer costs nothing; one that is merely dropped
    is cancelled too, and freed by the engine's next step.
    """

    def __init__(self, engine: Engine, request: Request, *, load_s: float = 0.0) -> None:
        self._engine = engine
        self._request = request
        self._load_s = load_s
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        self._texts: list[str] = []
        self._seen = 0  # tokens of the handle that are in some piece
        self.handle: Handle | None = None

    def start(self) -> Handle:
        """Queue the request now, to run beside others; otherwise the first piece does it."""
        if self.handle is None:
            self.handle = self._engine.submit(self._request)
        return self.handle

    def __next__(self) -> Piece:
        handle, first = self.start(), self._seen
        while (token := handle.token(self._seen)) is not None:
            self._seen += 1
            text = self._decode(token.text, final=token.finish_reason is not None)
            if text or token.finish_reason is not None:
                self._texts.append(text)
                return Piece(text, tuple(handle.token_ids[first : self._seen]))
        raise StopIteration

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
            text="".join(self._texts),
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


def _engine(executor: Executor, tokenizer: Tokenizer, max_batch: int) -> Engine:
    return Engine(executor, tokenizer.token_bytes(executor.vocab_size), max_batch=max_batch)


def peak_memory() -> int:
    """The most main memory this process has held, in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _build(kind: type[Config], values: dict[str, Any], where: str) -> Config:
    known = [one.name for one in fields(kind)]  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            near = get_close_matches(name, known, n=1, cutoff=0.0)
            raise UserError(f"{where} has no option {name!r}: did you mean {near[0]}?")
    return kind(**values)


def _stop_ids(checkpoint: Checkpoint, tokenizer: Tokenizer) -> frozenset[int]:
    """Every end id that the tokenizer or the folder's two configuration files name."""
    found = set(tokenizer.eos_ids)
    for source in (checkpoint.generation, checkpoint.config):
        written = source.get("eos_token_id")
        ids = written if isinstance(written, list) else [written]
        found.update(one for one in ids if isinstance(one, int))
    return frozenset(found)
