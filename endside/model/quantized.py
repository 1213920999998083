"""The linear slot filled with weights in few bits: what a quantized checkpoint runs on in PyTorch.

It computes exactly what the native kernels compute (`ops.linear.quantized`), activations in int8
included, so it is the truth they are tested against and the way to run such a checkpoint where
there is no native core. It is slow and has no gradient.
"""

from __future__ import annotations

import torch
from torch import nn

from endside.ops.linear.quantized import ZERO, quantized_linear


class QuantizedLinear(nn.Module):
    """y = x W^T with W (out, in) as codes (out, padded in) uint8, scales and zeros per group."""

    def __init__(
        self, inputs: int, outputs: int, *, kind: str, group: int, symmetric: bool
    ) -> None:
        super().__init__()
        padded = -(-inputs // group) * group
        self.kind, self.group = kind, group
        self.register_buffer("codes", torch.empty(outputs, padded, dtype=torch.uint8))
        self.register_buffer("scales", torch.empty(outputs, padded // group, dtype=torch.float16))
        zeros = None if symmetric else torch.empty(outputs, padded // group, dtype=torch.uint8)
        self.register_buffer("zeros", zeros)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) -> (..., out) float32."""
        return quantized_linear(x, self.codes, self.scales, self.zeros, zero=ZERO[self.kind])
