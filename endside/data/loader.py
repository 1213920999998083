"""Token shards become batches: fixed windows in a seeded order, from a cursor that can be saved.

A shard of n tokens is cut into (n - 1) // T windows of T + 1 tokens that overlap by one, so that
every token but the first is a target exactly once per epoch. Epoch e visits the windows in a
permutation drawn from (seed, e). Of several sources in a mixture each has its own order, and
`order.Shares` says whose turn it is. The whole state of the reader is how many windows each source
has given, the same for any number of processes: of every batch of all processes together, each
reads its own rows. Documents are numbered within a window, so that attention and loss can stay
inside them.

The remainder of a shard (fewer than T tokens) is dropped; permutations live in memory (8 W bytes).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from endside.data.order import Order, Shares
from endside.data.pack import Packed, Split
from endside.dist import World
from endside.errors import UserError

PADDING = -1  # the document of tokens that are only there to fill a row


@dataclass(frozen=True)
class TokenBatch:
    """tokens (B, T + 1) int64; documents (B, T + 1) int64, numbered from 0 within each row.

    mask (B, T + 1) bool or None: tokens that are targets; None: all of them.
    """

    tokens: torch.Tensor
    documents: torch.Tensor
    mask: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> TokenBatch:
        """The batch on another device."""
        mask = None if self.mask is None else self.mask.to(device, non_blocking=True)
        return TokenBatch(
            self.tokens.to(device, non_blocking=True),
            self.documents.to(device, non_blocking=True),
            mask,
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


@dataclass(frozen=True)
class Source:
    """Packed shards, and how much of a batch comes from them."""

    packed: Packed
    weight: float = 1.0  # share of the rows

    @property
    def name(self) -> str:
        """What reports call it: its folder."""
        return self.packed.folder.as_posix()


class Rows(Protocol):
    """Rows of one length, by number."""

    def __len__(self) -> int: ...
    def read(self, number: int) -> tuple[np.ndarray, np.ndarray]: ...


class Windows:
    """The windows of one split of one or more packed folders, by number."""

    def __init__(self, packed: Packed | Sequence[Packed], split: Split, seq_len: int) -> None:
        self.seq_len = seq_len
        self._shards = [
            shard
            for one in ([packed] if isinstance(packed, Packed) else packed)
            for shard in one.shards(split)
        ]
        counts = [max(0, (len(shard.tokens) - 1) // seq_len) for shard in self._shards]
        self._first = np.cumsum([0, *counts])
        if len(self) == 0:
            place = packed.folder if isinstance(packed, Packed) else "all sources together"
            raise UserError(
                f"the {split} split of {place} is shorter than seq_len {seq_len} + 1 "
                "tokens: lower seq_len or pack more text"
            )

    def __len__(self) -> int:
        return int(self._first[-1])

    def read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """tokens (T + 1,) and documents (T + 1,), both int64, of one window."""
        shard = int(np.searchsorted(self._first, number, side="right")) - 1
        start = (number - int(self._first[shard])) * self.seq_len
        return self._shards[shard].read(start, start + self.seq_len + 1)

    def stack(self, numbers: list[int]) -> TokenBatch:
        """The windows `numbers` as one batch."""
        return stack([self.read(number) for number in numbers])


def stack(rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> TokenBatch:
    """(tokens, documents) of each row, all of one length, as one batch."""
    tokens, documents = zip(*rows, strict=True)
    return TokenBatch(torch.from_numpy(np.stack(tokens)), torch.from_numpy(np.stack(documents)))


class Mixture:
    """The rows of several sources in one endless sequence, each source beside its share.

    identities: what tells a source from another in the state; keys: what its order is drawn from.
    """

    def __init__(
        self,
        rows: Sequence[Rows],
        weights: Sequence[float],
        identities: Sequence[str],
        keys: Sequence[Sequence[int]],
    ) -> None:
        self._rows, self._identities = list(rows), list(identities)
        self._shares = Shares(weights)
        self._orders = [Order(len(one), key) for one, key in zip(rows, keys, strict=True)]

    def take(self, rows: int, *, own: range) -> list[tuple[np.ndarray, np.ndarray]]:
        """Advance by `rows` and read those whose number among them is in `own`."""
        read = []
        for row in range(rows):
            source = self._shares.next()
            place = self._shares.chosen[source] - 1
            if row in own:
                read.append(self._rows[source].read(self._orders[source].at(place)))
        return read

    @property
    def epochs(self) -> list[float]:
        """How often each source has been read."""
        return [count / order.rows for count, order in zip(self.chosen, self._orders, strict=True)]

    @property
    def chosen(self) -> list[int]:
        """How many rows each source has given."""
        return self._shares.chosen

    def state(self) -> dict[str, int]:
        """The rows that each source has given, by its identity."""
        return dict(zip(self._identities, self.chosen, strict=True))

    def restore(self, state: dict[str, int]) -> None:
        """Continue where `state` was taken."""
        self._shares.chosen = [int(state[identity]) for identity in self._identities]


class Loader:
    """An endless iterator over the training split, that can be saved and restored.

    Of sources in a mixture, `epochs` in the state says how often each has been read.
    """

    def __init__(
        self, data: Packed | Sequence[Source], config: LoaderConfig, world: World | None = None
    ) -> None:
        self.config = config
        self._alone = isinstance(data, Packed)
        self._sources = [Source(data)] if isinstance(data, Packed) else list(data)
        self._world = world or World()
        identities = [source.packed.identity for source in self._sources]
        # A source alone has the order it always had; in a mixture, one that its place in the list
        # does not change.
        keys = [[config.seed, int(identity[:8], 16)] for identity in identities]
        self._rows = Mixture(
            [Windows(source.packed, "train", config.seq_len) for source in self._sources],
            [source.weight for source in self._sources],
            identities,
            [[config.seed]] if self._alone else keys,
        )

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> TokenBatch:
        batch = self.config.batch
        first = self._world.rank * batch
        rows = self._rows.take(batch * self._world.size, own=range(first, first + batch))
        return stack(rows)

    @property
    def epochs(self) -> float:
        """How often the training split has been read; of a mixture, the source read most often."""
        return max(self._rows.epochs)

    def state(self) -> dict[str, Any]:
        """The cursor, and what it counts in."""
        if self._alone:
            return {"consumed": self._rows.chosen[0], **self._units()}
        epochs = {
            source.name: round(epoch, 6)
            for source, epoch in zip(self._sources, self._rows.epochs, strict=True)
        }
        return {"consumed": self._rows.state(), "epochs": epochs, **self._units()}

    def fits(self, state: dict[str, Any]) -> bool:
        """Whether `state` counts windows of this data, in this order."""
        return all(state.get(key) == value for key, value in self._units().items())

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken; UserError for another data set, length or seed."""
        check_units(state, self._units())
        consumed = state["consumed"]
        self._rows.restore(
            {self._sources[0].packed.identity: consumed} if self._alone else consumed
        )

    def _units(self) -> dict[str, Any]:
        identities = [source.packed.identity for source in self._sources]
        data = identities[0] if self._alone else ",".join(sorted(identities))
        return {"data": data, "seq_len": self.config.seq_len, "seed": self.config.seed}


def check_units(state: dict[str, Any], units: dict[str, Any]) -> None:
    """UserError unless a cursor counts in these units."""
    for key, value in units.items():
        if state.get(key) != value:
            raise UserError(
                f"the checkpoint read data with {key} {state.get(key)}, this run has {value}: "
                "resume with the data, lengths and seed it was started with"
            )
