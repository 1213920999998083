"""Dense causal attention, over a whole row or inside each of the documents packed in it."""

from __future__ import annotations

import torch

from endside.ops.attention import reference, sdpa, segments, tiles, varlen
from endside.ops.attention.packing import Packing, packing
from endside.ops.passes import able

# Tokens of a row: tiles were compared at 512 (bench/train_cpu.py), and scores grow with the square.
LONGEST = 2048


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    documents: torch.Tensor | Packing | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """q (B, T, H, D), k and v (B, S, G, D) -> (B, T, H, D).

    documents (B, S) int64: packed texts that must not see each other. impl: "auto", "reference",
    "sdpa" (one mask of the whole row), "segments" or "varlen" (document by document; CUDA),
    "tiles" (as products of matrices, forward and backward).
    """
    if impl in ("reference", "sdpa") or documents is None:
        owners = None if documents is None else packing(documents).documents
        return (reference if impl == "reference" else sdpa).attend(q, k, v, owners)
    if impl == "varlen" or (impl == "auto" and varlen.able(q) and q.shape[1] == k.shape[1]):
        return varlen.attend(q, k, v, documents)
    fits = q.shape[1] == k.shape[1] <= LONGEST and q.dtype == k.dtype == v.dtype
    if impl == "tiles" or (impl == "auto" and fits and able(q, k, v)):
        return tiles.attend(q, k, v, documents)
    return segments.attend(q, k, v, documents)


def attend_seen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor
) -> torch.Tensor:
    """q (B, T, H, D), k and v (B, S, G, D), seen (B, T, S) bool: any mask -> (B, T, H, D)."""
    return sdpa.attend_seen(q, k, v, seen)
