"""Dense causal attention."""

from __future__ import annotations

import torch

from endside.ops.attention import reference, sdpa


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    documents: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """q (B, T, H, D), k and v (B, S, G, D) -> (B, T, H, D). impl: "auto", "reference", "sdpa"."""
    return (reference if impl == "reference" else sdpa).attend(q, k, v, documents)


def attend_seen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor
) -> torch.Tensor:
    """q (B, T, H, D), k and v (B, S, G, D), seen (B, T, S) bool: any mask -> (B, T, H, D)."""
    return sdpa.attend_seen(q, k, v, seen)
