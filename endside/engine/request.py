"""What a caller asks for and what it gets back: SamplingConfig, Request, Token, Handle.

A value left None was not chosen by the user. `SamplingConfig.with_defaults` fills it from the
model's generation_config.json, and what that file leaves open is greedy decoding (temperature 0)
with every filter off. Rules for that file: `do_sample: false` is temperature 0; `do_sample: true`
without a temperature is temperature 1; without `do_sample` a written temperature counts as chosen.
Filters the file does not write are off, also where another library has a default of its own.

Contradictions are refused, not guessed at: a filter (top_k, top_p, min_p) given by the user while
the temperature is 0 could never act, because greedy decoding keeps one token anyway. Neutral
values (top_p 1, top_k 0, min_p 0) are always accepted, and so is a seed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from endside.errors import UserError

if TYPE_CHECKING:
    from endside.engine.grammar import Grammar
    from endside.engine.thinking import Thinking


MOST_LOGPROBS = 20  # as OpenAI's servers allow


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen and when to end. None: not chosen by the user."""

    max_tokens: int | None = None  # new tokens at most; None: until the context is full
    temperature: float | None = None  # 0: the most likely token always
    top_p: float | None = None  # smallest set of tokens whose probability reaches this; 1: off
    top_k: int | None = None  # that many most likely tokens; 0: off
    min_p: float | None = None  # at least this share of the best token's probability; 0: off
    repetition_penalty: float | None = None  # > 1 makes tokens of prompt and answer rarer; 1: off
    presence_penalty: float | None = None  # off the logit of a token the answer has; 0: off
    frequency_penalty: float | None = None  # the same for every time it has it; 0: off
    logit_bias: Mapping[int, float] | None = None  # token id -> added to its logit
    logprobs: int | None = None  # report log-probabilities, with so many alternatives
    seed: int | None = None  # None: fresh entropy; the seed used is reported in the result
    stop: tuple[str, ...] = ()  # the answer ends before the first of these

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", _texts(self.stop))
        _whole("max_tokens", self.max_tokens, least=1)
        _whole("top_k", self.top_k, least=0)
        _whole("seed", self.seed, least=0)
        _within("temperature", self.temperature, least=0.0)
        _within("top_p", self.top_p, least=0.0, most=1.0, open_below=True)
        _within("min_p", self.min_p, least=0.0, most=1.0)
        _within("repetition_penalty", self.repetition_penalty, least=0.0, open_below=True)
        _within("presence_penalty", self.presence_penalty, least=-2.0, most=2.0)
        _within("frequency_penalty", self.frequency_penalty, least=-2.0, most=2.0)
        object.__setattr__(self, "logit_bias", _bias(self.logit_bias))
        _whole("logprobs", self.logprobs, least=0)
        if self.logprobs is not None and self.logprobs > MOST_LOGPROBS:
            raise UserError(f"logprobs is {self.logprobs}: at most {MOST_LOGPROBS} alternatives")
        if self.temperature == 0:
            self._refuse_filters("temperature 0")

    @property
    def greedy(self) -> bool:
        """True when the most likely token is always taken."""
        return not self.temperature

    def _refuse_filters(self, why: str) -> None:
        neutral = {"top_p": 1, "top_k": 0, "min_p": 0}
        for name, off in neutral.items():
            value = getattr(self, name)
            if value is not None and value != off and not (name == "top_k" and value == 1):
                raise UserError(
                    f"{name} {value} cannot act with {why}, which always takes the most likely "
                    f"token: raise the temperature or leave {name} out"
                )

    def with_defaults(self, generation_config: dict[str, Any] | None = None) -> SamplingConfig:
        """Fill what the user left open from the model's generation_config.json, else greedy."""
        file = generation_config or {}
        temperature = self.temperature if self.temperature is not None else _file_temperature(file)
        if not temperature:
            self._refuse_filters("temperature 0 (the model's default)")
        # A filter of the file is dropped when the user asked for greedy: he did not contradict it.
        filters = ("top_p", "top_k", "min_p") if temperature else ()
        found = {}
        for name in (*filters, "repetition_penalty"):
            if getattr(self, name) is None and file.get(name) is not None:
                found[name] = file[name]
        if self.max_tokens is None and file.get("max_new_tokens") is not None:
            found["max_tokens"] = file["max_new_tokens"]
        try:
            return replace(self, temperature=temperature, **found)
        except UserError as error:
            raise UserError(f"generation_config.json: {error}") from None


def _file_temperature(file: dict[str, Any]) -> float:
    if file.get("do_sample") is False:
        return 0.0
    written = file.get("temperature")
    if written is None:
        return 1.0 if file.get("do_sample") else 0.0
    return written


def _texts(stop: object) -> tuple[str, ...]:
    if isinstance(stop, str):
        stop = (stop,)
    if stop is not None and not isinstance(stop, (list, tuple)):
        raise UserError(f"stop {stop!r} is no text: give a string or a list of strings")
    texts = []
    for text in stop or ():
        if not isinstance(text, str) or not text:
            raise UserError(f"stop {text!r} is no text: give strings of at least one character")
        texts.append(text)
    return tuple(texts)


def _bias(bias: object) -> dict[int, float] | None:
    """Token ids as numbers (JSON writes them as text) with values within -100 and 100."""
    if not bias:
        return None
    if not isinstance(bias, Mapping):
        raise UserError(f"logit_bias {bias!r} is no map from token ids to numbers")
    found = {}
    for key, value in bias.items():
        token = int(key) if isinstance(key, str) and key.isdecimal() else key
        if isinstance(token, bool) or not isinstance(token, Integral) or token < 0:
            raise UserError(f"logit_bias has {key!r}: give token ids, whole numbers of at least 0")
        _within(f"logit_bias of token {token}", value, least=-100.0, most=100.0)
        found[int(token)] = float(value)
    return found


def _whole(name: str, value: object, *, least: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise UserError(f"{name} is {value!r}: give a whole number of at least {least}")


def _float(value: object) -> float:
    """The value as a float; NaN for what is no number, infinity for one that is too large."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _within(
    name: str, value: object, *, least: float, most: float = math.inf, open_below: bool = False
) -> None:
    if value is None:
        return
    number = _float(value)
    good = math.isfinite(number) and least <= number <= most
    if not good or (open_below and number == least):
        low = f"above {least:g}" if open_below else f"at least {least:g}"
        high = "" if most == math.inf else f" and at most {most:g}"
        raise UserError(f"{name} is {value!r}: give a finite number {low}{high}")


@dataclass(frozen=True)
class Request:
    """Token ids to continue. `sampling` has its defaults filled in; any of `stop_ids` ends it."""

    tokens: tuple[int, ...]
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    stop_ids: frozenset[int] = frozenset()
    constraint: Grammar | None = None  # the answer, once its thought is over, fits this
    thinking: Thinking | None = None  # None: the thought ends where the model ends it

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", tuple(int(token) for token in self.tokens))
        object.__setattr__(self, "stop_ids", frozenset(self.stop_ids))
        if not self.tokens:
            raise UserError("the prompt is empty: give at least one token to continue")


@dataclass(frozen=True)
class Token:
    """One sampled token of one request, as `Engine.step` reports it."""

    request: int  # number of the handle
    id: int
    text: bytes  # what may be shown now: withheld bytes of an open stop string come later or never
    finish_reason: str | None = None  # set on the last token: "stop" or "length"
    logprob: float | None = None  # where the request asked for logprobs
    top: tuple[tuple[int, float], ...] = ()  # most likely tokens and theirs, best first


@dataclass(frozen=True)
class Times:
    """Seconds on the clock of time.perf_counter; 0.0 until it has happened."""

    submitted: float = 0.0
    started: float = 0.0  # the first chunk of the prompt is run
    first: float = 0.0  # the first token is there
    finished: float = 0.0


class Handle:
    """A running request: iterate it for its tokens; `cancel` ends it.

    Iterating steps the engine whenever no token is waiting, so other requests advance as well.
    `cancel` only leaves a mark (any thread may call it); the next step gives the pages back.
    """

    def __init__(self, number: int, request: Request, seed: int, step: Callable[[], list[Token]]):
        self.number = number
        self.request = request
        self.seed = seed
        self.token_ids: list[int] = []  # everything sampled, the ending token included
        self.finish_reason: str | None = None  # "stop", "length" or "cancelled"
        self.error: Exception | None = None
        self.reused = 0  # prompt tokens that the prefix cache had
        self.runs = 0  # passes of the model that brought tokens: fewer than tokens with a draft
        self.drafted = 0  # tokens guessed and verified in them
        self.times = Times(submitted=time.perf_counter())
        self._step = step
        self._ready: list[Token] = []

    @property
    def done(self) -> bool:
        """True when no further token will come."""
        return self.finish_reason is not None or self.error is not None

    def __iter__(self) -> Iterator[Token]:
        index = 0
        while (token := self.token(index)) is not None:
            yield token
            index += 1

    def token(self, index: int) -> Token | None:
        """The token of that number, counted from 0, stepping until it is there; None past the end.

        Unlike an iterator it can be asked again after an interrupt.
        """
        while index >= len(self._ready):
            if self.error is not None:
                raise self.error
            if self.done:
                return None
            self._step()
        return self._ready[index]

    @property
    def ready(self) -> int:
        """How many tokens are there; does not step the engine."""
        return len(self._ready)

    def tokens(self, start: int, stop: int) -> list[Token]:
        """Those of the tokens that are there."""
        return self._ready[start:stop]

    def cancel(self) -> None:
        """End the request where it is; without effect on a finished one."""
        if not self.done:
            self.finish("cancelled")

    def mark(self, name: str) -> None:
        """Write the present time into `times`."""
        self.times = replace(self.times, **{name: time.perf_counter()})

    def deliver(self, token: Token) -> None:
        """Engine only: one more token."""
        if not self.token_ids:
            self.mark("first")
        self.token_ids.append(token.id)
        self._ready.append(token)
        if token.finish_reason is not None:
            self.finish(token.finish_reason)

    def finish(self, reason: str) -> None:
        """Engine only: no further token will come."""
        self.finish_reason = reason
        self.mark("finished")

    def fail(self, error: Exception) -> None:
        """Engine only: the request cannot go on; iterating it raises `error`."""
        self.error = error
        self.mark("finished")
