"""A projection: PyTorch's product, or matrix tiles for training in float32 where there are some."""

from __future__ import annotations

import torch

from endside.ops.linear import reference, tiles


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (..., in), weight (out, in) -> (..., out)."""
    return (tiles if tiles.takes(x, weight) else reference).linear(x, weight)
