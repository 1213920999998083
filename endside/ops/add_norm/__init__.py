"""Residual sum and norm together: the truth in plain PyTorch, one pass each way in the core."""

from __future__ import annotations

import torch

from endside.ops.add_norm import native, reference
from endside.ops.passes import able


def add_norm(
    x: torch.Tensor,
    branch: torch.Tensor | None,
    weight: torch.Tensor,
    scale: float,
    eps: float,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x and branch (..., C), weight (C,) -> x + scale branch, and its norm in `dtype`."""
    given = (x, weight) if branch is None else (x, weight, branch)
    wide = x.dtype == weight.dtype == torch.float32
    chosen = native if wide and able(*given) else reference
    return chosen.add_norm(x, branch, weight, scale=scale, eps=eps, dtype=dtype)
