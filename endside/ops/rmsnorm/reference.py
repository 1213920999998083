"""Root-mean-square normalisation: y = w * x / sqrt(mean(x^2) + eps) (arXiv 1910.07467).

The mean and the division run in fp32 (float64 stays float64); the result returns to x's dtype
before the weight is applied, as the published Llama and MiniCPM code does.
"""

from __future__ import annotations

import torch


def rmsnorm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x (..., C), weight (C,) -> (..., C) in x's dtype."""
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * scaled.to(x.dtype)
