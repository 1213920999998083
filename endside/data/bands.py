"""Batches by length of document, for training on long contexts.

    [[data.bands]]           documents of up to 4096 tokens make rows of 4096,
    length = 4096            a quarter of all tokens
    share = 0.25

A document goes to the shortest band that holds it whole, so short texts keep their short rows and
a long one is never cut where a band has room for it; what is longer than the longest band is cut
into pieces of that, overlapping by one token, and its rest goes where it fits. All rows of a batch
are of one band and there are tokens // length of them, so that every batch costs about the same;
`order.Shares` decides whose turn it is, in tokens.

Within a band, documents share a row where they fit (longest first, each into the fullest row that
has room). What is left is filled with PADDING, which is its own document and no target; a batch is
cut to its longest row. The price of not cutting: `padding` says which share of the rows it is.
Which documents share a row never changes; the order of the rows does, with each epoch.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from endside.data.loader import PADDING, Mixture, Source, TokenBatch, check_units, stack
from endside.data.order import Shares
from endside.data.pack import OpenShard, Packed
from endside.dist import World
from endside.errors import UserError


@dataclass(frozen=True)
class Band:
    """Rows of one length, and how many of all tokens come in them."""

    length: int  # tokens a row predicts
    share: float  # those of all bands sum to 1

    def __post_init__(self) -> None:
        if self.length < 1 or not 0 < self.share <= 1:
            raise UserError(
                f"a band has length {self.length} and share {self.share}: give at least 1 token "
                "and a share above 0, up to 1"
            )


def check_bands(bands: Sequence[Band]) -> None:
    """UserError unless lengths ascend and shares sum to 1."""
    lengths = [band.length for band in bands]
    if sorted(set(lengths)) != lengths:
        raise UserError(f"the lengths of data.bands are {lengths}: make them ascend")
    total = sum(band.share for band in bands)
    if abs(total - 1) > 1e-6:
        raise UserError(f"the shares of data.bands sum to {total:.6g}: make them sum to 1")


class BandRows:
    """The rows of one band of one packed folder, by number.

    pieces (N, 3) int64: shard, first token, end. They are packed into rows of `length` + 1 tokens.
    """

    def __init__(self, shards: list[OpenShard], pieces: np.ndarray, length: int, fill: int) -> None:
        self.length, self._shards, self._fill = length, shards, fill
        sizes = pieces[:, 2] - pieces[:, 1]
        order = np.argsort(-sizes, kind="stable")
        row_of = _best_fit(sizes[order], length + 1)
        by_row = np.argsort(row_of, kind="stable")
        self._pieces = pieces[order][by_row]
        self._first = np.searchsorted(row_of[by_row], np.arange(row_of.max(initial=-1) + 2))
        self.tokens = int(sizes.sum())

    def __len__(self) -> int:
        return len(self._first) - 1

    def read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """tokens (length + 1,) and documents (length + 1,), both int64, of one row."""
        tokens = np.full(self.length + 1, self._fill, dtype=np.int64)
        documents = np.full(self.length + 1, PADDING, dtype=np.int64)
        at = 0
        pieces = self._pieces[self._first[number] : self._first[number + 1]]
        for document, (shard, start, stop) in enumerate(pieces):
            part = slice(at, at + int(stop - start))
            tokens[part], _ = self._shards[shard].read(int(start), int(stop))
            documents[part] = document
            at = part.stop
        return tokens, documents


def _best_fit(sizes: np.ndarray, room: int) -> np.ndarray:
    """The row of each piece, (N,) int64: the fullest that has room, else a new one."""
    rows = np.empty(len(sizes), dtype=np.int64)
    free: list[int] = []  # the different amounts that rows have left, ascending
    holders: dict[int, list[int]] = {}  # rows that have so much left
    count = 0
    for piece, size in enumerate(sizes.tolist()):
        at = bisect_left(free, size)
        if at == len(free):
            row, left = count, room
            count += 1
        else:
            left = free[at]
            row = holders[left].pop()
            if not holders[left]:
                del holders[left], free[at]
        rows[piece] = row
        left -= size
        # One token alone predicts nothing, so no piece is that short.
        if left > 1:
            if left not in holders:
                insort(free, left)
            holders.setdefault(left, []).append(row)
    return rows


def _pieces(shards: list[OpenShard], lengths: Sequence[int]) -> list[np.ndarray]:
    """Per band the pieces (N, 3) of all documents that belong to it."""
    longest, parts = lengths[-1], []
    for number, shard in enumerate(shards):
        bounds = shard.bounds()
        starts, stops = bounds[:-1], bounds[1:]
        whole = stops - starts <= longest + 1
        for start, stop in zip(starts[~whole].tolist(), stops[~whole].tolist(), strict=True):
            begins = np.arange(start, stop - 1, longest)
            ends = np.minimum(begins + longest + 1, stop)
            parts.append(np.stack([np.full(len(begins), number), begins, ends], axis=1))
        starts, stops = starts[whole], stops[whole]
        parts.append(np.stack([np.full(len(starts), number), starts, stops], axis=1))
    pieces = np.concatenate(parts) if parts else np.empty((0, 3), dtype=np.int64)
    sizes = pieces[:, 2] - pieces[:, 1]
    band = np.searchsorted(np.array(lengths) + 1, sizes)
    return [pieces[(band == number) & (sizes > 1)] for number in range(len(lengths))]


class Bands:
    """An endless iterator over the training split by bands, that can be saved and restored.

    tokens: of a batch of all processes together. A source without documents for a band is left out
    of that band.
    """

    def __init__(
        self,
        data: Packed | Sequence[Source],
        bands: Sequence[Band],
        *,
        tokens: int,
        seed: int,
        world: World | None = None,
    ) -> None:
        check_bands(bands)
        self._bands, self._tokens, self._seed = list(bands), tokens, seed
        self._world = world or World()
        self._sources = [Source(data)] if isinstance(data, Packed) else list(data)
        self._rows = [self._rows_of(band) for band in bands]
        sizes = [rows * band.length for rows, band in zip(self._rows, bands, strict=True)]
        self._shares = Shares([band.share for band in bands], sizes)
        self._mixtures, self.padding = self._mixed()

    def _rows_of(self, band: Band) -> int:
        rows, size = self._tokens // band.length, self._world.size
        if rows == 0 or rows % size:
            raise UserError(
                f"a batch of {self._tokens} tokens has {rows} rows of {band.length}, which do not "
                f"divide among {size} processes: change the batch or the bands"
            )
        return rows

    def _mixed(self) -> tuple[list[Mixture], list[float]]:
        """The rows of each band, and the share of padding in them."""
        lengths = [band.length for band in self._bands]
        found: list[list[tuple[Source, BandRows]]] = [[] for _ in lengths]
        for source in self._sources:
            shards = source.packed.shards("train")
            for number, pieces in enumerate(_pieces(shards, lengths)):
                rows = BandRows(shards, pieces, lengths[number], source.packed.index.eos)
                found[number] += [(source, rows)] if len(rows) else []
        mixtures, padding = [], []
        for number, length in enumerate(lengths):
            if not found[number]:
                shorter = lengths[number - 1] if number else 1
                raise UserError(
                    f"no document of the training split has {shorter + 1} to {length} tokens: "
                    "leave that band out of data.bands or pack longer text"
                )
            sources, rows = zip(*found[number], strict=True)
            identities = [source.packed.identity for source in sources]
            keys = [[self._seed, int(identity[:8], 16), length] for identity in identities]
            mixtures.append(Mixture(rows, [source.weight for source in sources], identities, keys))
            room = sum(len(one) for one in rows) * (length + 1)
            padding.append(1 - sum(one.tokens for one in rows) / room)
        return mixtures, padding

    def __iter__(self) -> Bands:
        return self

    def __next__(self) -> TokenBatch:
        band = self._shares.next()
        rows = self._rows[band]
        own = rows // self._world.size
        first = self._world.rank * own
        read = self._mixtures[band].take(rows, own=range(first, first + own))
        used = max(int((documents != PADDING).sum()) for _, documents in read)
        return stack([(tokens[:used], documents[:used]) for tokens, documents in read])

    def state(self) -> dict[str, Any]:
        """The cursor, what it counts in, and how often each band has been read."""
        names = [str(band.length) for band in self._bands]
        consumed = [mixture.state() for mixture in self._mixtures]
        epochs = [round(max(mixture.epochs), 6) for mixture in self._mixtures]
        return {
            "consumed": dict(zip(names, consumed, strict=True)), "batches": [*self._shares.chosen],
            "epochs": dict(zip(names, epochs, strict=True)), **self._units(),
        }  # fmt: skip

    def fits(self, state: dict[str, Any]) -> bool:
        """Whether `state` counts rows of this data, in these bands."""
        return all(state.get(key) == value for key, value in self._units().items())

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken; UserError for other data, bands, tokens or seed."""
        check_units(state, self._units())
        self._shares.chosen = [int(count) for count in state["batches"]]
        for band, mixture in zip(self._bands, self._mixtures, strict=True):
            mixture.restore(state["consumed"][str(band.length)])

    def _units(self) -> dict[str, Any]:
        return {
            "data": ",".join(sorted(source.packed.identity for source in self._sources)),
            "bands": ",".join(f"{band.length}:{band.share}" for band in self._bands),
            "tokens": self._tokens, "seed": self._seed,
        }  # fmt: skip
