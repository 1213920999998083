"""An executor without a model: logits are a fixed function of the whole history, pages are counted.

It fails the test on every misuse of the protocol: an unknown sequence, more tokens than reserved, a
sequence closed twice.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from endside.engine.executor import Full

PAGE = 64


class FakeExecutor:
    """Implements `Executor`; `calls` records (verb, sequence count, tokens) of every run."""

    name = "fake"
    row_exact = True
    page = PAGE
    feature_layers: tuple[int, ...] = ()

    def __init__(self, *, vocab_size: int = 32, context: int = 256, capacity: int = 1024) -> None:
        self.vocab_size, self.context, self.capacity = vocab_size, context, capacity
        self.free = capacity // PAGE
        self.calls: list[tuple[str, int, int]] = []
        self._tokens: dict[int, list[int]] = {}
        self._room: dict[int, int] = {}
        self._draft: dict[int, tuple[list[int], list[int]]] = {}
        self._next = 0

    def open(self, tokens: int) -> int:
        pages = -(-tokens // PAGE)
        if pages > self.free:
            raise Full(f"{pages} pages")
        self.free -= pages
        self._next += 1
        self._tokens[self._next], self._room[self._next] = [], tokens
        return self._next

    def length(self, seq: int) -> int:
        return len(self._tokens[seq]) + len(self._draft.get(seq, ((), ()))[0])

    def fork(self, seq: int, tokens: int, length: int | None = None) -> int:
        assert seq not in self._draft, "a draft is undecided"
        fork = self.open(tokens)
        self._tokens[fork] = self._tokens[seq][:length]
        return fork

    def shrink(self, seq: int, tokens: int) -> None:
        self.trim(seq, tokens)
        self.free += -(-self._room[seq] // PAGE) - -(-tokens // PAGE)
        self._room[seq] = tokens

    def room(self, closing: Iterable[int] = ()) -> int:
        return (self.free + sum(-(-self._room[seq] // PAGE) for seq in closing)) * PAGE

    def prefill(self, seq: int, tokens: np.ndarray, *, logits: str = "last") -> np.ndarray | None:
        assert seq not in self._draft, "a draft is undecided"
        self.calls.append(("prefill", 1, len(tokens)))
        rows = [self._append(seq, int(token)) for token in tokens]
        return {"none": None, "last": rows[-1], "all": np.stack(rows)}[logits]

    def decode(self, seqs: list[int], tokens: np.ndarray) -> np.ndarray:
        assert len(set(seqs)) == len(seqs) == len(tokens), "one token for each sequence"
        self.calls.append(("decode", len(seqs), len(seqs)))
        return np.stack(
            [self._append(seq, int(one)) for seq, one in zip(seqs, tokens, strict=True)]
        )

    def verify(self, seq: int, tokens: np.ndarray, parents: np.ndarray) -> np.ndarray:
        assert seq not in self._draft, "the last draft is undecided"
        self.calls.append(("verify", 1, len(tokens)))
        paths: list[list[int]] = []
        for token, parent in zip(tokens.tolist(), parents.tolist(), strict=True):
            paths.append([*(paths[parent] if parent >= 0 else []), token])
        deepest = len(self._tokens[seq]) + max(map(len, paths))
        assert deepest <= self._room[seq], "a draft deeper than what is reserved"
        self._draft[seq] = (tokens.tolist(), parents.tolist())
        return np.stack(
            [history_logits([*self._tokens[seq], *path], self.vocab_size) for path in paths]
        )

    def accept(self, seq: int, rows: list[int]) -> None:
        tokens, parents = self._draft.pop(seq)
        assert [parents[row] for row in rows] == [-1, *rows][: len(rows)], "no path from the root"
        self._tokens[seq] += [tokens[row] for row in rows]

    def trim(self, seq: int, length: int) -> None:
        self._draft.pop(seq, None)
        assert length <= len(self._tokens[seq]), "trim forgets, it does not invent"
        del self._tokens[seq][length:]

    def close(self, seq: int) -> None:
        del self._tokens[seq]
        self.free += -(-self._room.pop(seq) // PAGE)

    def set_inputs(self, rows: np.ndarray) -> None:
        self.inputs = rows

    def attention(self, length: int) -> tuple[str, int]:
        return "dense", length

    def _append(self, seq: int, token: int) -> np.ndarray:
        history = self._tokens[seq]
        history.append(token)
        assert len(history) <= self._room[seq], "more tokens than reserved"
        return history_logits(history, self.vocab_size)


def history_logits(history: list[int], vocab_size: int) -> np.ndarray:
    """(V,) float32, different for every history."""
    key = hash(tuple(history)) & 0xFFFFFFFF
    return np.random.default_rng(key).normal(size=vocab_size).astype(np.float32) * 3
