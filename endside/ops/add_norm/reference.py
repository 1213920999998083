"""A branch joins the residual stream, and the next norm reads the sum."""

from __future__ import annotations

import torch

from endside.ops.rmsnorm import rmsnorm


def add_norm(
    x: torch.Tensor,
    branch: torch.Tensor | None,
    weight: torch.Tensor,
    scale: float,
    eps: float,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x and branch (..., C), weight (C,) -> x + scale branch, and its norm in `dtype`."""
    if branch is not None:
        x = x + (branch if scale == 1 else branch * scale)
    y = rmsnorm(x, weight, eps)
    return x, y if dtype is None else y.to(dtype)
