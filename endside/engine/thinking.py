"""A thought before the answer: where it ends, and ending it when its budget is spent.

Reasoning models write `<think> ... </think>` (older ones `<|thought_start|> ... <|thought_end|>`)
and then the answer. The opener stands at the end of the prompt or is the model's first words.
Markers are found in the bytes of the tokens, wherever the token borders fall.

After `budget` tokens of thought the closing marker is forced, as the tokenizer writes it between
line ends, so that the model finds itself where a thought of its own would have ended. Two things
may take some tokens more: a character that has begun is finished (at most three), and a marker
that has begun is completed instead of a second one. Forced tokens are part of the answer: they
pass through the model and are counted.

A constraint is for the answer alone. `strict` keeps what it could not check out of its way: an end
id within the thought, and a token that ends the marker and begins the answer. It also writes the
line ends that follow a marker, because the constraint would not let the model write them.

Not here: showing the thought (`endside.answer`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from endside.errors import UserError

GRACE = 3  # tokens that an unfinished character may take; UTF-8 has at most 4 bytes
_TAIL = 32  # bytes looked back; longer than any marker


@dataclass(frozen=True)
class Thinking:
    """What a request says about its thought."""

    token_bytes: Sequence[bytes] = field(repr=False)  # those of the markers among them
    spell: Callable[[str], Sequence[int]]  # a text that may hold markers -> ids
    marks: Mapping[str, str]  # opener -> closer, the usual one first
    budget: int | None = None  # tokens of thought; None: as many as the model likes
    opened: bool = False  # the prompt ends inside a thought
    begin: bool = False  # write the opener first
    strict: bool = False  # a constraint follows the thought

    def __post_init__(self) -> None:
        budget = self.budget
        if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int)):
            raise UserError(f"thinking_budget is {budget!r}: give a whole number of tokens")
        if budget is not None and budget < 0:
            raise UserError(f"thinking_budget is {budget}: give 0 or more tokens")

    def start(self, stop_ids: frozenset[int] = frozenset()) -> Thought:
        """A new answer, ended by any of stop_ids."""
        return Thought(self, stop_ids)


class Thought:
    """Follows the thought of one answer."""

    def __init__(self, rules: Thinking, stop_ids: frozenset[int]) -> None:
        self.rules = rules
        self.stop_ids = stop_ids
        self._marks = {opener.encode(): closer.encode() for opener, closer in rules.marks.items()}
        self.spent = 0  # tokens of thought so far, the markers' not among them
        self._closer: bytes | None = next(iter(self._marks.values())) if rules.opened else None
        self._over = False  # the answer has begun
        self._closing = False  # the closing marker is in the queue
        self._tail = b""
        self._queue: list[int] = []
        if rules.opened:
            self._check_budget()
        elif rules.begin:
            self._queue = [*rules.spell(next(iter(rules.marks)) + "\n")]
        elif rules.strict:
            self._over = True

    @property
    def open(self) -> bool:
        """Whether the next token still belongs to the thought or its markers."""
        return bool(self._queue) or (self._closer is not None and not self._over)

    def forced(self) -> int | None:
        """The token that must come now, None where the model chooses."""
        return self._queue[0] if self._queue else None

    @property
    def coming(self) -> tuple[int, ...]:
        """All tokens that are settled already: a draft that is always right."""
        return tuple(self._queue)

    def restrict(self, logits: np.ndarray) -> np.ndarray:
        """logits (V,) float32 without what a `strict` thought may not hold."""
        if not self.rules.strict or not self.open:
            return logits
        banned = [*self.stop_ids, *self._crossing()]
        if banned:
            logits = logits.copy()
            logits[banned] = -np.inf
        return logits

    def push(self, token: int) -> None:
        """The answer's next token, forced or chosen."""
        forced = bool(self._queue)
        if forced:
            assert token == self._queue[0], f"token {token} instead of the forced {self._queue[0]}"
            del self._queue[0]
        data = self.rules.token_bytes[token]
        text = self._tail + data
        self._tail = text[-_TAIL:]
        if self._over:
            return
        if self._closer is None:
            self._look_for_opener(text)
        elif self._closer in text:
            self._close(after=text[text.index(self._closer) + len(self._closer) :])
        else:
            assert not forced or self._queue or not self._closing, "token_bytes lack the marker"
            self.spent += not forced
            if not self._queue:
                self._check_budget()

    def _look_for_opener(self, text: bytes) -> None:
        head = text.lstrip()
        for opener, closer in self._marks.items():
            if head.startswith(opener):
                self._closer = closer
                self._tail = head[len(opener) :]
                if not self._queue:
                    self._check_budget()
                return
        self._over = not any(opener.startswith(head) for opener in self._marks)

    def _close(self, after: bytes) -> None:
        self._over = True
        if self.rules.strict and not self._queue and not after:
            self._queue = [*self.rules.spell("\n\n")]

    def _check_budget(self) -> None:
        budget = self.rules.budget
        if budget is None or self.spent < budget:
            return
        if _unfinished(self._tail) and self.spent < budget + GRACE:
            return
        assert self._closer is not None, "only an open thought has a budget to spend"
        begun = _overlap(self._tail, self._closer)
        rest = self._closer[begun:].decode("ascii") + "\n\n"
        self._closing = True
        self._queue = [*self.rules.spell(rest if begun else "\n" + rest)]

    def _crossing(self) -> list[int]:
        """Tokens that complete the closing marker and go on with more than white space."""
        if self._closer is None:
            return []
        begun = _overlap(self._tail, self._closer)
        if not begun:
            return []
        rest = self._closer[begun:]
        table = enumerate(self.rules.token_bytes)
        return [at for at, one in table if one.startswith(rest) and one[len(rest) :].strip()]


def _overlap(text: bytes, marker: bytes) -> int:
    """Bytes of the marker that the text ends with already."""
    sizes = range(min(len(text), len(marker) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(marker[:size])), 0)


def _unfinished(text: bytes) -> bool:
    """Whether the text ends within a UTF-8 character."""
    for back, byte in enumerate(reversed(text[-4:]), 1):
        if byte & 0xC0 != 0x80:
            size = 1 if byte < 0xC0 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return back < size
    return False
