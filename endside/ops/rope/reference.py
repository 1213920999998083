"""Rotary position embedding, rotate-half layout: channel i pairs with channel i + D/2.

    y1 = x1 cos - x2 sin        y2 = x2 cos + x1 sin        angle = position * inv_freq[i]

Angles and products are fp32 whatever the dtype of x (RoFormer, arXiv 2104.09864; layout as in the
published Llama and MiniCPM checkpoints).
"""

from __future__ import annotations

import torch


def tables(
    positions: torch.Tensor, inv_freq: torch.Tensor, amplitude: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """positions (B, T), inv_freq (D/2,) -> cos, sin (B, T, 1, D/2) float32, times the amplitude."""
    angle = positions[..., None].float() * inv_freq
    return (angle.cos() * amplitude).unsqueeze(-2), (angle.sin() * amplitude).unsqueeze(-2)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (B, T, H, D) with cos, sin (B, T, 1, D/2) -> rotated (B, T, H, D) in x's dtype."""
    wide = x if x.dtype == torch.float64 else x.float()
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)
