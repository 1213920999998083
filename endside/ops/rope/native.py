"""Rotary positions in one pass; backward the same pass turns back."""

from __future__ import annotations

import torch

from endside.ops.passes import address, narrow, run
from endside.ops.rope.fused import Rotate


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (B, T, H, D) with cos, sin (B, T, 1, D/2) float32 -> rotated (B, T, H, D)."""
    shape = (*x.shape[:2], 1, x.shape[3] // 2)
    return Rotate.apply(x, cos.expand(shape).contiguous(), sin.expand(shape).contiguous(), _turned)


def _turned(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, direction: float
) -> torch.Tensor:
    rows, new, heads, width = x.shape
    x = x.contiguous()
    out = torch.empty_like(x)
    places = [address(t) for t in (x, cos, sin, out)]
    run("turn", *places, rows * new, heads, width, heads * width, direction, narrow(x))
    return out
