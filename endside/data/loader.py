"""Token shards become batches: fixed windows in a seeded order, from a cursor that can be saved.

A shard of n tokens is cut into (n - 1) // T windows of T + 1 tokens that overlap by one, so that
every token but the first is a target exactly once per epoch. Epoch e visits the windows in a
permutation drawn from (seed, e), and global window i is the (i mod W)-th of epoch i div W: the
whole state of the reader is the number i, the same for any number of processes. Documents are
numbered within a window, so that attention and loss can stay inside them.

The remainder of a shard (fewer than T tokens) is dropped; permutations live in memory (8 W bytes).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from endside.data.pack import Packed, Split
from endside.dist import World
from endside.errors import UserError


@dataclass(frozen=True)
class TokenBatch:
    """tokens (B, T + 1) int64; documents (B, T + 1) int64, numbered from 0 within each row."""

    tokens: torch.Tensor
    documents: torch.Tensor

    def to(self, device: torch.device | str) -> TokenBatch:
        """The batch on another device."""
        return TokenBatch(
            self.tokens.to(device, non_blocking=True), self.documents.to(device, non_blocking=True)
        )


@dataclass(frozen=True)
class LoaderConfig:
    """What a batch is."""

    batch: int = 8  # rows per process
    seq_len: int = 256  # T, tokens a row predicts
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch < 1 or self.seq_len < 1:
            raise UserError(f"batch {self.batch} and seq_len {self.seq_len} must be at least 1")


class Windows:
    """The windows of one split, by number."""

    def __init__(self, packed: Packed, split: Split, seq_len: int) -> None:
        self.seq_len = seq_len
        self._tokens, self._starts = packed.tokens(split), packed.starts(split)
        counts = [max(0, (len(shard) - 1) // seq_len) for shard in self._tokens]
        self._first = np.cumsum([0, *counts])
        if len(self) == 0:
            raise UserError(
                f"the {split} split of {packed.folder} is shorter than seq_len {seq_len} + 1 "
                "tokens: lower seq_len or pack more text"
            )

    def __len__(self) -> int:
        return int(self._first[-1])

    def read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """tokens (T + 1,) and documents (T + 1,), both int64, of one window."""
        shard = int(np.searchsorted(self._first, number, side="right")) - 1
        start = (number - int(self._first[shard])) * self.seq_len
        positions = np.arange(start, start + self.seq_len + 1, dtype=np.uint64)
        owner = np.searchsorted(self._starts[shard], positions, side="right").astype(np.int64)
        tokens = self._tokens[shard][start : start + self.seq_len + 1].astype(np.int64)
        return tokens, owner - owner[0]

    def stack(self, numbers: list[int]) -> TokenBatch:
        """The windows `numbers` as one batch."""
        tokens, documents = zip(*(self.read(number) for number in numbers), strict=True)
        return TokenBatch(torch.from_numpy(np.stack(tokens)), torch.from_numpy(np.stack(documents)))


class Loader:
    """An endless iterator over the training split, that can be saved and restored."""

    def __init__(self, packed: Packed, config: LoaderConfig, world: World | None = None) -> None:
        self.config = config
        self._windows = Windows(packed, "train", config.seq_len)
        self._identity = packed.identity
        self._world = world or World()
        self._consumed = 0  # windows, by all processes together
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> TokenBatch:
        first = self._consumed + self._world.rank * self.config.batch
        numbers = [self._window(first + row) for row in range(self.config.batch)]
        self._consumed += self.config.batch * self._world.size
        return self._windows.stack(numbers)

    def _window(self, place: int) -> int:
        epoch, within = divmod(place, len(self._windows))
        if epoch != self._epoch:
            # RandomState's stream is frozen by NumPy's own promise (NEP 19): an order is for ever.
            seeds = np.random.SeedSequence([self.config.seed, epoch])
            random = np.random.RandomState(np.random.MT19937(seeds))
            self._epoch, self._order = epoch, random.permutation(len(self._windows))
        return int(self._order[within])

    @property
    def epochs(self) -> float:
        """How often the training split has been read."""
        return self._consumed / len(self._windows)

    def state(self) -> dict[str, int | str]:
        """The cursor, and what it counts in."""
        return {"consumed": self._consumed, **self._units()}

    def fits(self, state: dict[str, int | str]) -> bool:
        """Whether `state` counts windows of this data, in this order."""
        return all(state.get(key) == value for key, value in self._units().items())

    def restore(self, state: dict[str, int | str]) -> None:
        """Continue where `state` was taken; UserError for another data set, length or seed."""
        for key, value in self._units().items():
            if state.get(key) != value:
                raise UserError(
                    f"the checkpoint read data with {key} {state.get(key)}, this run has {value}: "
                    "resume with the data, seq_len and seed it was started with"
                )
        self._consumed = int(state["consumed"])

    def _units(self) -> dict[str, int | str]:
        return {"data": self._identity, "seq_len": self.config.seq_len, "seed": self.config.seed}
