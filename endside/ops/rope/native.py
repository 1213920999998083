"""Rotary positions in one pass; backward the same pass turns back."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from endside.ops.passes import address, narrow, run


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (B, T, H, D) with cos, sin (B, T, 1, D/2) float32 -> rotated (B, T, H, D)."""
    return _Rotate.apply(x, cos, sin)


class _Rotate(torch.autograd.Function):
    """x (B, T, H, D), cos and sin (B, T, 1, D/2) -> (B, T, H, D)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        shape = (*x.shape[:2], 1, x.shape[3] // 2)
        cos, sin = cos.expand(shape).contiguous(), sin.expand(shape).contiguous()
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _turned(dy, *ctx.saved_tensors, -1.0), None, None


def _turned(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, direction: float
) -> torch.Tensor:
    rows, new, heads, width = x.shape
    x = x.contiguous()
    out = torch.empty_like(x)
    places = [address(t) for t in (x, cos, sin, out)]
    run("turn", *places, rows * new, heads, width, heads * width, direction, narrow(x))
    return out
