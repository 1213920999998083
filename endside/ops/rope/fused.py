"""Rotary positions with their own gradient: turning back by the same angle.

The rotation is linear and orthogonal but for the tables' amplitude, so its gradient is the rotation
by the negative angle with the same tables. Nothing but the tables is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

# x (B, T, H, D), cos and sin (B, T, 1, D/2), 1.0 or back -1.0 -> (B, T, H, D) in x's dtype
Turn = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (B, T, H, D) with cos, sin (B, T, 1, D/2) -> rotated (B, T, H, D) in x's dtype."""
    return Rotate.apply(x, cos, sin, _turned)


class Rotate(torch.autograd.Function):
    """x (B, T, H, D), cos and sin (B, T, 1, D/2), how to turn -> (B, T, H, D)."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, turn: Turn
    ) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.turn = turn
        return turn(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.turn(dy, *ctx.saved_tensors, -1.0), None, None, None


def _turned(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, direction: float
) -> torch.Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    out = torch.empty_like(wide, memory_format=torch.contiguous_format)
    (first, second), (one, two) = wide.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(first, cos, out=one).addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=two).addcmul_(first, sin, value=direction)
    return out.to(x.dtype)
