"""Causal attention through PyTorch's own fused kernels (flash on CPU and CUDA).

Same meaning as reference.py. Grouped heads are handed over as they are (`enable_gqa`), so keys are
not copied once per query head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from endside.ops.attention.reference import mask


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: torch.Tensor | None = None
) -> torch.Tensor:
    """q (B, T, H, D), k and v (B, S, G, D), rotated and unscaled -> (B, T, H, D)."""
    new, keys = q.shape[1], k.shape[1]
    heads = tuple(x.transpose(1, 2) for x in (q, k, v))  # (B, H or G, T or S, D)
    causal = documents is None and new == keys
    seen = (
        None if causal or (documents is None and new == 1) else mask(new, keys, documents, q.device)
    )
    out = F.scaled_dot_product_attention(*heads, attn_mask=seen, is_causal=causal, enable_gqa=True)
    return out.transpose(1, 2)
