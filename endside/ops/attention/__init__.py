"""Dense causal attention, over a whole row or inside each of the documents packed in it."""

from __future__ import annotations

import torch

from endside.ops.attention import reference, sdpa, segments, tiles, varlen
from endside.ops.attention.packing import Packing, packing
from endside.ops.passes import able

# Tokens of a document, on average, up to which tiles are the faster way in bfloat16; in float32
# they never are (bench/packed_attention.py).
SHORT = 256


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
    if documents is None and impl != "reference":
        return sdpa.attend(q, k, v)
    impl = way(q, k, v, documents) if impl == "auto" else impl
    if impl in ("reference", "sdpa"):
        owners = None if documents is None else packing(documents).documents
        return (reference if impl == "reference" else sdpa).attend(q, k, v, owners)
    return {"varlen": varlen, "tiles": tiles, "segments": segments}[impl].attend(q, k, v, documents)


def way(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: torch.Tensor | Packing
) -> str:
    """Which implementation "auto" means for such tensors, packed in documents."""
    same = q.shape[1] == k.shape[1]
    if same and varlen.able(q):
        return "varlen"
    narrow = q.dtype == k.dtype == v.dtype == torch.bfloat16
    if same and narrow and able(q, k, v) and packing(documents).mean <= SHORT:
        return "tiles"
    return "segments"


def attend_seen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor
) -> torch.Tensor:
    """q (B, T, H, D), k and v (B, S, G, D), seen (B, T, S) bool: any mask -> (B, T, H, D)."""
    return sdpa.attend_seen(q, k, v, seen)
