"""The slot every projection goes through, so that low-bit and low-rank layers can take its place.

A filling of the slot is an `nn.Module` made by `(inputs, outputs)` and called on (..., in); the
transformer never looks inside it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from endside.ops.linear import linear

MakeLinear = Callable[[int, int], nn.Module]  # (inputs, outputs) -> a projection without bias


class Linear(nn.Module):
    """y = x W^T with a plain weight (out, in); `product` computes it, and may do so in FP8."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.product = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) -> (..., out)."""
        return self.product(x, self.weight)


def narrow(x: torch.Tensor) -> torch.dtype | None:
    """The dtype to which every projection under autocast would cast x; None without autocast."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
