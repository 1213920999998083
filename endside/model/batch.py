"""What one forward pass is told: tokens, where they stand, and whose they are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from endside.ops.attention.packing import Packing


@dataclass(frozen=True)
class Batch:
    """Rows of new tokens. With a cache, row i continues cache sequence `seqs[i]`.

    tokens (B, T) int64; positions (B, T) int64 or None: counted on from the stored length, or from
    zero without a cache; documents (B, T) int64 or None: packed texts that must not see each other;
    inputs (I, C) or None: what tokens V, V + 1, … enter the first layer as; seen (B, T, T) bool or
    None: which row sees which, in place of causality (dense attention, without a cache).
    """

    tokens: torch.Tensor
    positions: torch.Tensor | None = None
    seqs: tuple[int, ...] | None = None
    documents: torch.Tensor | None = None
    inputs: torch.Tensor | None = None
    seen: torch.Tensor | None = None

    @cached_property
    def packing(self) -> Packing | None:
        """Where the documents begin and end, found once for all layers."""
        return None if self.documents is None else Packing(self.documents)
