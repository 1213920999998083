"""Packed documents in one launch: PyTorch's variable-length flash attention, forward and backward.

CUDA, float16 or bfloat16. The rows are laid end to end and the kernel is told where each document
begins; no mask exists and nothing is computed between documents.
"""

from __future__ import annotations

import inspect

import torch

from endside.ops.attention.packing import Packing, packing


def able(q: torch.Tensor) -> bool:
    """Whether the kernel takes such a q (B, T, H, D)."""
    return q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and q.shape[3] <= 256


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: torch.Tensor | Packing
) -> torch.Tensor:
    """q (B, T, H, D), k and v (B, T, G, D), rotated and unscaled -> (B, T, H, D)."""
    from torch.nn.attention.varlen import varlen_attn

    packed = packing(documents)
    grouped = {}
    if q.shape[2] != k.shape[2]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            grouped["enable_gqa"] = True
        else:
            # before PyTorch 2.12 the interface does not promise grouped heads
            k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    flat = (x.flatten(0, 1).contiguous() for x in (q, k, v))
    # A row is as long as a document can be: saying so spares a wait for the device.
    bounds, longest = packed.bounds, q.shape[1]
    out = varlen_attn(*flat, bounds, bounds, longest, longest, window_size=(-1, 0), **grouped)
    return out.view(q.shape)
