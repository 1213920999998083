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

The answer to a conversation is read as it comes (`endside.answer`): `text` is what it says,
`reasoning` the thought before that, `tool_calls` what it wants done. The text of a plain prompt is
everything that was written.

`json_schema`, `regex` or `grammar` shape an answer (`endside.engine.grammar`): every token fits;
a thought before it is left free. `thinking_budget` closes the thought after that many tokens.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from endside import chat
from endside.answer import Reader
from endside.checkpoint import cache_root
from endside.engine.drafts import drafts_of
from endside.engine.engine import Engine
from endside.engine.executor import Full
from endside.engine.executors import Plan, create
from endside.engine.grammar import Grammar, Vocabulary
from endside.engine.request import Request, SamplingConfig
from endside.engine.thinking import Thinking
from endside.engine.treesize import LazySize
from endside.errors import UserError
from endside.stream import Generation, Piece, Stream

if TYPE_CHECKING:
    import numpy as np

    from endside.checkpoint import Checkpoint
    from endside.engine.draft import Drafts
    from endside.engine.executor import Executor
    from endside.tokenizer import Tokenizer

__all__ = ["LLM", "Generation", "Piece", "Shape", "Stream"]

Config = TypeVar("Config")
Message = Mapping[str, Any]


@dataclass(frozen=True)
class Shape:
    """What an answer must look like. At most one of the first three."""

    json_schema: str | Mapping[str, Any] | None = None  # its text, or what that parses to
    regex: str | None = None  # the whole answer matches it
    grammar: str | None = None  # context-free, in Lark's syntax
    thinking_budget: int | None = None  # tokens of thought at most; None: the model decides

    def __post_init__(self) -> None:
        if len(self.given) > 1:
            raise UserError(f"{' and '.join(self.given)} shape the same answer: give one")

    @property
    def given(self) -> list[str]:
        """Names of the constraints that are set."""
        names = ("json_schema", "regex", "grammar")
        return [one for one in names if getattr(self, one) is not None]

    def grammar_of(self, vocabulary: Vocabulary) -> Grammar | None:
        """The compiled constraint, None without one."""
        made = {"json_schema": Grammar.json_schema, "regex": Grammar.regex, "grammar": Grammar.lark}
        return next((made[one](getattr(self, one), vocabulary) for one in self.given), None)


class LLM:
    """A loaded model. Options are the fields of `endside.engine.executors.Plan`."""

    def __init__(self, model: str | Path, **options: Any) -> None:
        """Load a folder, .gguf file or hub name. UserError, and nothing is kept, if it is wrong.

        options: executor="auto", attention="auto", device="auto", dtype="auto", quant="none",
        group=128, head="auto", kv="auto", context=None, capacity=None, threads=None, max_batch=8,
        draft="auto".
        """
        from endside.models import open_model
        from endside.tokenizer import Tokenizer

        begin = time.perf_counter()
        plan = _build(Plan, options, "LLM")
        checkpoint = open_model(model, verify=False)  # `create` verifies
        tokenizer = Tokenizer.load(checkpoint.folder, whole=False)
        executor = create(checkpoint, plan)
        self._join(
            _engine(
                executor, tokenizer, plan.max_batch, drafts_of(plan, executor, checkpoint.folder)
            ),
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

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The tokens that a constraint may use: those that print, control tokens left out."""
        table = self.tokenizer.token_bytes(self.engine.executor.vocab_size)
        for one in self.tokenizer.control_tokens.values():
            table[one] = b""
        return Vocabulary(table)

    def generate(self, prompt: str | Sequence[int], **options: Any) -> Generation:
        """Continue a text, or token ids as they are.

        options: the fields of SamplingConfig and of Shape.
        """
        return self.stream(prompt, **options).result()

    def chat(
        self,
        messages: Sequence[Message],
        *,
        think: bool | None = None,
        tools: list[dict[str, Any]] | None = None,
        control: bool = False,
        **options: Any,
    ) -> Generation:
        """Answer a conversation of {"role", "content"} messages in the model's own template."""
        if not messages:
            raise UserError("the conversation is empty: give at least one message")
        return self.stream(
            list(messages), think=think, tools=tools, control=control, **options
        ).result()

    def stream(
        self,
        prompt: str | Sequence[int] | Sequence[Message],
        *,
        think: bool | None = None,
        tools: list[dict[str, Any]] | None = None,
        control: bool = False,
        **options: Any,
    ) -> Stream:
        """The answer to a text, token ids or messages, piece by piece.

        control: names of control tokens, written out in the text, become these tokens.
        options: the fields of SamplingConfig and of Shape.

        Everything that can be refused is refused here, before the first piece is asked for.
        """
        own = {one.name for one in fields(Shape)} & options.keys()
        shape = Shape(**{name: options.pop(name) for name in own})
        config = _build(SamplingConfig, options, "sampling", also=Shape)
        talks = not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)
        if talks:
            ids = self.render(prompt, think=think, tools=tools, control=control)
        elif think is None and tools is None and shape.thinking_budget is None:
            ids = self.encode(prompt, control=control)
        else:
            raise UserError(
                "think, tools and thinking_budget belong to a chat: give messages, not a prompt"
            )
        constraint = shape.grammar_of(self.vocabulary) if shape.given else None
        reader, thinking = None, None
        if talks:
            opened = chat.opens_reasoning(self.tokenizer, ids)
            reader = Reader(opened=opened, tools=tools, read_calls=constraint is None)
            thinking = self._thinking(shape, opened=opened, begin=bool(think) and not opened)
        request = Request(
            ids,
            config.with_defaults(self.generation_config),
            self.stop_ids,
            constraint=constraint,
            thinking=thinking,
        )
        self.engine.check(request)
        return Stream(self.engine, request, reader=reader, load_s=self.load_s)

    def _thinking(self, shape: Shape, *, opened: bool, begin: bool) -> Thinking | None:
        """The rules of a thought, None where the model needs none. begin: it should think."""
        strict = bool(shape.given)
        if shape.thinking_budget is None and not strict:
            return None
        return Thinking(
            self.engine.token_bytes or (),
            partial(chat.spell, self.tokenizer),
            chat.OPENERS,
            budget=shape.thinking_budget,
            opened=opened,
            begin=begin and strict,
            strict=strict,
        )

    def generate_many(
        self, prompts: Sequence[str | Sequence[int]], **options: Any
    ) -> list[Generation]:
        """`generate` for several prompts at once; each answer is the one it would get alone."""
        streams = [self.stream(prompt, **options) for prompt in prompts]
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
        if not messages:
            raise UserError("the conversation is empty: give at least one message")
        ids = chat.render(self.tokenizer, list(messages), tools=tools, think=think, control=control)
        return tuple(ids)

    def save_session(self, path: str | Path, notes: dict[str, Any] | None = None) -> int:
        """Write the keys of the latest finished conversation to a file -> tokens they stand for.

        notes: what JSON can say, given back by `load_session`.
        """
        from endside.engine import session

        return len(session.save(Path(path), self.engine.prefixes, notes or {}).tokens)

    def load_session(self, path: str | Path) -> dict[str, Any]:
        """Read such a file: prompts that begin with its tokens start behind them -> its notes.

        UserError when it is damaged, or was saved with another model or other options.
        """
        from endside.engine import session

        return session.load(Path(path), self.engine.prefixes).notes

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
            seq = self.engine.prefixes.reserve(len(request.tokens))
        except Full:
            raise UserError("running requests fill the cache: let them end first") from None
        tokens, size = np.array(request.tokens, dtype=np.int64), self.engine.prefill_chunk
        try:
            chunks = [tokens[at : at + size] for at in range(0, len(tokens), size)]
            rows = [executor.prefill(seq, one, logits="all") for one in chunks]
            return np.concatenate([part for part in rows if part is not None])
        finally:
            executor.close(seq)


def _engine(
    executor: Executor, tokenizer: Tokenizer, max_batch: int, drafts: Drafts | None = None
) -> Engine:
    table = tokenizer.token_bytes(executor.vocab_size, shown=chat.ANSWER_MARKS)
    asked = drafts.inputs if drafts is not None else None
    questions = 0 if asked is None else len(asked)
    size = LazySize(executor, cache_root() / "verify", questions=questions) if drafts else None
    return Engine(executor, table, max_batch=max_batch, drafts=drafts, size=size)


def _build(
    kind: type[Config], values: dict[str, Any], where: str, *, also: type | None = None
) -> Config:
    """also: a dataclass whose names the user may have meant as well."""
    names = [one.name for one in fields(kind)]  # type: ignore[arg-type]
    known = names + [one.name for one in fields(also)] if also else names
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
