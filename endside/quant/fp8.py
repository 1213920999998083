"""FP8 products for training: block-wise scales, FP32 sums (training spec, "FP8 mixed precision").

    y  = Q1(x)  Q128(W)^T         x  (M, K) in tiles of 1 x 128 along K
    dx = Q1(dy) Q128(W)           dy (M, N) in tiles of 1 x 128 along N, the contracted axis
    dW = bf16(dy)^T bf16(x)       no FP8: this sum over all tokens is the most sensitive

Q1 and Q128 store E4M3 codes and one fp32 scale per tile of 1 x 128 or block of 128 x 128:

    scale = max|x| / 448, 1 where that is zero        code = rint_even(clamp(x / scale, -448, 448))

Odd edges are padded with zeros, which change neither maximum nor sum. A block of the weight is the
same block of its transpose, so one quantization serves both products. The latent weight stays in
full precision and rounding counts as the identity (straight-through), as in the published recipes.

Two ways to multiply. `hardware` hands codes and scales to PyTorch's block-scaled product (Hopper:
sm_90, CUDA 12.9). `emulated` multiplies codes with their scales and sums in fp32: the same numbers
but for the order of the sum, on any device. Which one a device gets is decided by trying: a product
that the device refuses, or that disagrees with the emulation, leaves it to the emulation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

TILE = 128
LARGEST = 448.0  # of E4M3
CODES = torch.float8_e4m3fn

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (x, weight) -> x weight^T


@dataclass(frozen=True)
class Quantized:
    """codes (R', C') E4M3, padded; scales (R' / rows, C' / 128) fp32; shape (R, C) before padding.

    `rows` is 1 for tiles and 128 for blocks.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    shape: tuple[int, int]

    @property
    def rows(self) -> int:
        """How many rows share a scale."""
        return self.codes.shape[0] // self.scales.shape[0]

    def transposed(self) -> Quantized:
        """The same blocks of the transposed matrix."""
        assert self.rows == TILE, "tiles of one row are no tiles of the transpose"
        return Quantized(self.codes.t(), self.scales.t(), self.shape[::-1])

    def values(self) -> torch.Tensor:
        """(R, C) float32: code times scale."""
        wide = self.scales.repeat_interleave(TILE, 1).repeat_interleave(self.rows, 0)
        return (self.codes.float() * wide)[: self.shape[0], : self.shape[1]]


def quantize(x: torch.Tensor, rows: int) -> Quantized:
    """x (R, C) in tiles of `rows` (1 or 128) x 128."""
    height, width = x.shape
    padded = F.pad(x.float(), (0, -width % TILE, 0, -height % rows))
    tiles = padded.unflatten(1, (-1, TILE)).unflatten(0, (-1, rows))  # (R'/rows, rows, C'/128, 128)
    scales = tiles.abs().amax((1, 3)) / LARGEST
    # Also where the maximum is so small that its 448th part is zero in fp32.
    scales = torch.where(scales == 0, 1.0, scales)
    steps = (tiles / scales[:, None, :, None]).clamp(-LARGEST, LARGEST)
    return Quantized(steps.to(CODES).view(padded.shape), scales, (height, width))


Multiply = Callable[[Quantized, Quantized], torch.Tensor]  # (M, K), (N, K) -> (M, N)


def emulated(a: Quantized, b: Quantized) -> torch.Tensor:
    """The product a b^T of the values, summed in fp32 -> (M, N) float32."""
    return a.values() @ b.values().t()


def hardware(a: Quantized, b: Quantized) -> torch.Tensor:
    """The device's own product: a in tiles, b in blocks -> (M, N) bfloat16.

    cuBLAS wants rows of a by fours, and both lists of scales column by column, the columns of the
    blocks' by fours.
    """
    height, depth = a.codes.shape
    missing = -height % 4
    codes = F.pad(a.codes.view(torch.uint8), (0, 0, 0, missing)).view(CODES)
    tiles = F.pad(a.scales, (0, 0, 0, missing), value=1.0)
    blocks = F.pad(b.scales.contiguous(), (0, -(depth // TILE) % 4))
    out = F.scaled_mm(
        codes,
        b.codes.contiguous().t(),
        tiles.t().contiguous().t(),
        F.ScalingType.BlockWise1x128,
        blocks.t(),
        F.ScalingType.BlockWise128x128,
        output_dtype=torch.bfloat16,
    )
    return out[: a.shape[0], : b.shape[0]]


def product_for(device: torch.device) -> tuple[Product, str]:
    """How FP8 products run on `device`, and a line that says it."""
    refused = "a CPU has no FP8 product" if device.type != "cuda" else _refusal(device)
    multiply = emulated if refused else hardware
    how = f"emulated, because {refused}" if refused else "on the device's own block-scaled product"

    def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return _Fp8Product.apply(x, weight, multiply)

    return product, how


def _refusal(device: torch.device) -> str:
    """Why `hardware` cannot be used on a CUDA device; "" where it agrees with the emulation."""
    make = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 200, generator=make).to(device) for n in (150, 90))
    parts = quantize(a, 1), quantize(b, TILE)
    try:
        got = hardware(*parts).float()
    except (RuntimeError, ValueError, AttributeError) as error:
        return f"the device refuses block scales ({str(error).splitlines()[0]})"
    want = emulated(*parts)
    # The result is rounded to bfloat16, and summed in another order.
    if (got - want).abs().max() > want.abs().max() * 2.0**-8:
        return "the device's product disagrees with the emulation"
    return ""


class _Fp8Product(torch.autograd.Function):
    """x (..., K), weight (N, K) -> (..., N); the module's three equations."""

    @staticmethod
    def forward(ctx, x, weight, multiply):
        flat = x.reshape(-1, x.shape[-1])
        blocks = quantize(weight, TILE)
        ctx.save_for_backward(flat.bfloat16(), blocks.codes, blocks.scales)
        ctx.multiply, ctx.x, ctx.weight = multiply, (x.shape, x.dtype), weight.dtype
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        with torch.autocast(kind, enabled=False):
            out = multiply(quantize(flat, 1), blocks)
        return out.to(dtype).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx, grad):
        flat, codes, scales = ctx.saved_tensors
        shape, dtype = ctx.x
        rows = grad.reshape(-1, grad.shape[-1])
        with torch.autocast(grad.device.type, enabled=False):
            blocks = Quantized(codes, scales, (rows.shape[1], flat.shape[1]))
            into_x = into_weight = None
            if ctx.needs_input_grad[0]:
                into_x = ctx.multiply(quantize(rows, 1), blocks.transposed())
                into_x = into_x.to(dtype).view(shape)
            if ctx.needs_input_grad[1]:
                into_weight = _bfloat16_product(rows.bfloat16(), flat).to(ctx.weight)
        return into_x, into_weight, None


def _bfloat16_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a (M, N)^T b (M, K) of bfloat16 factors, summed in fp32 -> (N, K) float32."""
    if a.is_cuda:
        return torch.mm(a.t(), b, out_dtype=torch.float32)
    # Products of two bfloat16 are exact in fp32, so this is the same sum.
    return a.float().t() @ b.float()
