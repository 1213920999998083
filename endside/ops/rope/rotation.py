"""Rotary positions: the truth in plain PyTorch, and a version with its own gradient."""

from __future__ import annotations

import torch

from endside.ops.passes import able
from endside.ops.rope import fused, native, reference


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, impl: str = "auto"
) -> torch.Tensor:
    """x (B, T, H, D) with cos, sin (B, T, 1, D/2) -> rotated (B, T, H, D).

    impl: "auto", "reference", "fused", "native". auto takes the native or else the fused one where
    a gradient is needed, on plain tensors (not on spread ones).
    """
    tables = cos.dtype == sin.dtype == torch.float32
    if impl == "native" or (impl == "auto" and tables and able(x)):
        return native.rotate(x, cos, sin)
    wanted = torch.is_grad_enabled() and x.requires_grad and type(x) is torch.Tensor
    if impl == "fused" or (impl == "auto" and wanted):
        return fused.rotate(x, cos, sin)
    return reference.rotate(x, cos, sin)
