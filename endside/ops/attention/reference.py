"""Causal softmax attention with grouped queries: o = softmax(q k^T / sqrt(D)) v.

Query head h reads key/value head h // (H/G). Row t of q stands at position S - T + t, so the same
function serves training (S = T), a chunk of a prompt and a decode step. `documents` keeps packed
texts apart: a token sees only keys of its own document.
"""

from __future__ import annotations

import torch


def mask(new: int, keys: int, documents: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """Which key each query sees: (B or 1, 1, T, S) bool. documents (B, S) int64 or None."""
    position = torch.arange(keys - new, keys, device=device)
    seen = position[:, None] >= torch.arange(keys, device=device)
    if documents is None:
        return seen[None, None]
    same = documents[:, -new:, None] == documents[:, None, :]
    return (seen & same)[:, None]


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: torch.Tensor | None = None
) -> torch.Tensor:
    """q (B, T, H, D), k and v (B, S, G, D), rotated and unscaled -> (B, T, H, D) in q's dtype."""
    batch, new, heads, width = q.shape
    keys, groups = k.shape[1], k.shape[2]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    grouped = q.to(wide).view(batch, new, groups, heads // groups, width)
    scores = torch.einsum("btgrd,bsgd->bgrts", grouped, k.to(wide)) * width**-0.5
    seen = mask(new, keys, documents, q.device)
    weights = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
    out = torch.einsum("bgrts,bsgd->btgrd", weights, v.to(wide))
    return out.reshape(batch, new, heads, width).to(q.dtype)
