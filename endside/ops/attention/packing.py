"""Where the documents of packed rows begin and end: asked once per batch, used by every layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch


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

    @cached_property
    def bounds(self) -> torch.Tensor:
        """(N + 1,) int32: where each of the N documents begins in all rows laid end to end."""
        begins = torch.ones_like(self.documents, dtype=torch.bool)
        begins[:, 1:] = self.documents[:, 1:] != self.documents[:, :-1]
        starts = begins.flatten().nonzero().flatten()
        end = starts.new_tensor([self.documents.numel()])
        return torch.cat([starts, end]).to(torch.int32)


def packing(documents: torch.Tensor | Packing) -> Packing:
    """The packing of `documents` (B, S), itself where it is one."""
    return documents if isinstance(documents, Packing) else Packing(documents)
