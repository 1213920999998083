"""The same in one pass each way: sum, norm and rounding; backward all gradients that meet there.

    s = x + scale branch       r = 1 / sqrt(mean(s^2) + eps)       y = w s r
    ds = ds_beside + r (w dy - s r mean(w dy s r))                 dw = sum over rows of dy s r

ds_beside is what the residual stream brings from further up. The weight's sums are taken in parts
of a few rows each, so that their order does not depend on the number of threads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from endside.ops.passes import address, narrow, run

ROWS = 16  # of a part; the core's FUSED_ROWS


def add_norm(
    x: torch.Tensor,
    branch: torch.Tensor | None,
    weight: torch.Tensor,
    scale: float,
    eps: float,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x float32 and branch (..., C), weight (C,) -> x + scale branch, and its norm in `dtype`."""
    return _AddNorm.apply(x.contiguous(), branch, weight, scale, eps, dtype or x.dtype)


class _AddNorm(torch.autograd.Function):
    """x, branch (..., C), weight (C,) -> two of (..., C)."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, branch: torch.Tensor | None, weight: torch.Tensor,
        scale: float, eps: float, dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        ctx.set_materialize_grads(False)
        branch = None if branch is None else branch.contiguous()
        out = x if branch is None else torch.empty_like(x)
        y, r = torch.empty_like(x, dtype=dtype), x.new_empty(x.shape[:-1])
        run(
            "norm_forward", address(x), address(branch), address(weight), address(out),
            address(y), address(r), scale, eps, r.numel(), x.shape[-1], narrow(branch), narrow(y),
        )  # fmt: skip
        ctx.save_for_backward(out, weight, r)
        ctx.scale, ctx.branch, ctx.dtype = scale, None if branch is None else branch.dtype, dtype
        return out, y

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, beside: torch.Tensor | None, dy: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        x, weight, r = ctx.saved_tensors
        dy = torch.zeros_like(x, dtype=ctx.dtype) if dy is None else dy.contiguous()
        beside = None if beside is None else beside.contiguous()
        to_x = torch.empty_like(x)
        to_branch = None if ctx.branch is None else torch.empty_like(x, dtype=ctx.branch)
        parts = x.new_empty(-(-r.numel() // ROWS), x.shape[-1])
        run(
            "norm_backward", address(x), address(weight), address(r), address(beside),
            address(dy), address(to_x), address(to_branch), address(parts), ctx.scale, r.numel(),
            x.shape[-1], narrow(to_branch), narrow(dy),
        )  # fmt: skip
        return to_x, to_branch, parts.sum(0), None, None, None
