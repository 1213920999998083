"""Float32 products in matrix tiles of bfloat16, where the processor has them: for training.

Each factor is split into three bfloat16 numbers a value, and six products of those are summed in
float32 (`native/src/gemm.h`): as exact as a float32 product, and faster where tiles are. The three
products of a projection differ in which way a factor lies; none is copied for that.

    y = x W^T        dx = dy W        dW = dy^T x
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from endside.ops.passes import able, has_tiles, run

SMALL = 1 << 25  # multiply-adds below which PyTorch's product is done sooner
THIN = 100  # multiply-adds for each number that is split, likewise


def takes(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether products of these may be done here: float32, on a CPU with tiles, with a gradient.

    Autocast, which would make them bfloat16 products, goes PyTorch's way.
    """
    return (
        x.dtype == weight.dtype == torch.float32
        and x.numel() * len(weight) >= SMALL
        and not torch.is_autocast_enabled("cpu")
        and able(x, weight)
        and has_tiles()
    )


def multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """a (M, K), b (K, N) float32 on a machine with tiles -> (M, N), in the way that is faster."""
    rows, columns = a.shape[0], b.shape[1]
    size = rows * columns * a.shape[1]
    worth = size >= SMALL and rows * columns >= THIN * (rows + columns)
    return product(a, b, out) if worth else torch.mm(a, b, out=out)


def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """a (M, K), b (K, N) float32, either also transposed in memory -> (M, N), in tiles."""
    if out is None:
        out = torch.empty(a.shape[0], b.shape[1])
    fits = out.stride(1) == 1 and out.shape == (a.shape[0], b.shape[1])
    assert fits, "a product needs dense rows of the right shape to write to"
    run(
        "product", *_factor(a), *_factor(b.t()), out.data_ptr(), out.stride(0), *out.shape,
        a.shape[1],
    )  # fmt: skip
    return out


def _factor(lines: torch.Tensor) -> tuple[int, int, bool]:
    """(lines, depth) -> address, step, whether the depth lies inside."""
    assert lines.dtype == torch.float32 and 1 in lines.stride(), "a product needs dense lines"
    inside = lines.stride(1) == 1
    return lines.data_ptr(), lines.stride(0 if inside else 1), inside


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (..., in), weight (out, in), float32 -> (..., out)."""
    return _Linear.apply(x, weight)


class _Linear(torch.autograd.Function):
    """x (..., in), weight (out, in) -> (..., out)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        ctx.save_for_backward(x, weight)
        return multiply(x.view(-1, x.shape[-1]), weight.t()).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dy = dy.contiguous().view(-1, dy.shape[-1])
        to_x = to_weight = None
        if ctx.needs_input_grad[0]:
            to_x = multiply(dy, weight).view(x.shape)
        if ctx.needs_input_grad[1]:
            to_weight = multiply(dy.t(), x.view(-1, x.shape[-1]))
        return to_x, to_weight
