"""Where the documents of packed rows begin and end: asked once per batch, used by every layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch

TILE = 256  # queries of a tile, where no single document is longer


@dataclass(frozen=True)
class Tile:
    """Queries start .. stop of a row and the keys begin .. stop, which hold all that they see.

    Query i sees the keys first[i] <= s < end[i], counted from begin: (n) int64 each.
    """

    row: int
    start: int
    stop: int
    begin: int
    first: torch.Tensor
    end: torch.Tensor


@dataclass(frozen=True)
class Packing:
    """Rows of documents, each a run of equal numbers: documents (B, S) int64."""

    documents: torch.Tensor

    @cached_property
    def lengths(self) -> list[list[int]]:
        """Tokens of each document of each row, in order. Waits for the device."""
        bounds = self.bounds.tolist()
        width = self.documents.shape[1]
        rows: list[list[int]] = [[] for _ in self.documents]
        for start, stop in pairwise(bounds):
            rows[start // width].append(stop - start)
        return rows

    @property
    def mean(self) -> float:
        """Tokens of a document, on average."""
        return self.documents.numel() / sum(map(len, self.lengths))

    @cached_property
    def bounds(self) -> torch.Tensor:
        """(N + 1,) int32: where each of the N documents begins in all rows laid end to end."""
        begins = torch.ones_like(self.documents, dtype=torch.bool)
        begins[:, 1:] = self.documents[:, 1:] != self.documents[:, :-1]
        starts = begins.flatten().nonzero().flatten()
        end = starts.new_tensor([self.documents.numel()])
        return torch.cat([starts, end]).to(torch.int32)

    @cached_property
    def tiles(self) -> list[Tile]:
        """All queries in tiles: short neighbours share one, long documents have several."""
        found = []
        for row, lengths in enumerate(self.lengths):
            begins = torch.repeat_interleave(
                torch.tensor(lengths).cumsum(0) - torch.tensor(lengths), torch.tensor(lengths)
            )
            for start, stop, begin in _cuts(lengths):
                ends = torch.arange(start + 1, stop + 1)
                found.append(
                    Tile(row, start, stop, begin, begins[start:stop] - begin, ends - begin)
                )
        return found


def _cuts(lengths: list[int]) -> Iterator[tuple[int, int, int]]:
    """(start, stop, begin) of each tile of a row of documents."""
    at = open_at = 0
    for length in [*lengths, TILE + 1]:
        if at + length - open_at > TILE:
            if at > open_at:
                yield open_at, at, open_at
            open_at = at
        if length > TILE and at < sum(lengths):
            for start in range(at, at + length, TILE):
                yield start, min(start + TILE, at + length), at
            open_at = at + length
        at += length


def packing(documents: torch.Tensor | Packing) -> Packing:
    """The packing of `documents` (B, S), itself where it is one."""
    return documents if isinstance(documents, Packing) else Packing(documents)
