"""Examples become batches: best-fit rows in a seeded order, from a cursor that can be saved.

An epoch takes every example as often as its source's weight says (the part behind the point is
drawn), lays them into rows of T + 1 tokens, the longest first and each where it leaves the least
room, and shuffles the rows. Examples of a row are documents of their own: they do not see each
other, positions start anew, and no target crosses from one to the next. What is left of a row is
filled with a document that nothing is learned from.

Epoch e is drawn from (seed, e), so the state of the reader is an epoch and a row of it, the same
for any number of processes. Examples and the rows of one epoch are held in memory.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from endside.data.conversations import Example
from endside.data.loader import PADDING, TokenBatch, check_units
from endside.dist import World


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Numbers of the items in each row; no row is longer than `capacity`."""
    order = sorted(range(len(lengths)), key=lambda item: -lengths[item])
    rows: list[list[int]] = []
    room: list[int] = []  # amounts that some open row has left, rising, each once
    open_rows: dict[int, list[int]] = {}  # amount left -> numbers of rows
    for item in order:
        assert lengths[item] <= capacity, "examples that do not fit were sorted out before"
        at = bisect_left(room, lengths[item])
        if at == len(room):
            row, left = len(rows), capacity
            rows.append([])
        else:
            left = room[at]
            row = open_rows[left].pop()
            if not open_rows[left]:
                del room[at]
        rows[row].append(item)
        left -= lengths[item]
        if not open_rows.setdefault(left, []):
            insort(room, left)
        open_rows[left].append(row)
    return rows


def stack(rows: Iterable[Sequence[Example]], seq_len: int, filler: int = 0) -> TokenBatch:
    """Rows of examples as one batch of T + 1 tokens; `filler` is the token of the empty rest."""
    tokens, documents, masks = [], [], []
    for row in rows:
        line = np.full(seq_len + 1, filler, np.int64)
        owner = np.full(seq_len + 1, PADDING, np.int64)
        mask = np.zeros(seq_len + 1, np.bool_)
        at = 0
        for number, example in enumerate(row):
            span = slice(at, at + len(example))
            line[span], owner[span], mask[span] = example.ids, number, example.mask
            at += len(example)
        tokens.append(line)
        documents.append(owner)
        masks.append(mask)
    parts = (torch.from_numpy(np.stack(part)) for part in (tokens, documents, masks))
    return TokenBatch(*parts)


class ConversationRows:
    """An endless iterator over batches of packed examples, that can be saved and restored.

    batch: rows of this process; base: the weights that adapters belong to, kept in the state so
    that a checkpoint of adapters says it.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch: int,
        seq_len: int,
        weights: Sequence[float] = (1.0,),
        seed: int = 0,
        base: str = "",
        world: World | None = None,
    ) -> None:
        self._examples, self._weights = examples, np.array(weights)
        self._batch, self._seq_len, self._seed = batch, seq_len, seed
        self._world = world or World()
        self._units = {"data": _identity(examples, weights), "seq_len": seq_len, "seed": seed}
        self._units |= {"base": base} if base else {}
        self._epoch, self._row = 0, 0  # of the next row, counted over all processes
        self._rows = self._draw(0)

    def __iter__(self) -> ConversationRows:
        return self

    def __next__(self) -> TokenBatch:
        rows = [self._take() for _ in range(self._batch * self._world.size)]
        own = rows[self._world.rank * self._batch :][: self._batch]
        return stack([[self._examples[item] for item in row] for row in own], self._seq_len)

    def _take(self) -> list[int]:
        while self._row == len(self._rows):
            self._epoch, self._row = self._epoch + 1, 0
            self._rows = self._draw(self._epoch)
        self._row += 1
        return self._rows[self._row - 1]

    def _draw(self, epoch: int) -> list[list[int]]:
        # RandomState's stream is frozen by NumPy's own promise (NEP 19): an order is for ever.
        seeds = np.random.SeedSequence([self._seed, epoch])
        random = np.random.RandomState(np.random.MT19937(seeds))
        weight = self._weights[[example.source for example in self._examples]]
        copies = np.floor(weight + random.random_sample(len(weight))).astype(int)
        chosen = random.permutation(np.repeat(np.arange(len(weight)), copies))
        rows = best_fit([len(self._examples[item]) for item in chosen], self._seq_len + 1)
        return [[int(chosen[item]) for item in rows[row]] for row in random.permutation(len(rows))]

    @property
    def rows(self) -> int:
        """Rows of the current epoch."""
        return len(self._rows)

    @property
    def filled(self) -> float:
        """Share of this epoch's positions that hold a token of an example."""
        tokens = sum(len(self._examples[item]) for row in self._rows for item in row)
        return tokens / (len(self._rows) * (self._seq_len + 1))

    def state(self) -> dict[str, int | str]:
        """The cursor, and what it counts in."""
        return {"epoch": self._epoch, "row": self._row, **self._units}

    def fits(self, state: dict[str, int | str]) -> bool:
        """Whether `state` counts rows of these examples, in this order."""
        return all(state.get(key) == value for key, value in self._units.items())

    def restore(self, state: dict[str, int | str]) -> None:
        """Continue where `state` was taken; UserError for other examples, length, seed or base."""
        check_units(state, self._units)
        self._epoch, self._row = int(state["epoch"]), int(state["row"])
        self._rows = self._draw(self._epoch)


def _identity(examples: Sequence[Example], weights: Sequence[float]) -> str:
    """One name for these examples and weights."""
    digest = hashlib.sha256(repr([float(one) for one in weights]).encode())
    for example in examples:
        digest.update(np.array([len(example), example.source], np.int64).tobytes())
        digest.update(example.ids.tobytes() + example.mask.tobytes())
    return digest.hexdigest()
