"""FP8 products against a reference that knows E4M3 from its definition alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from endside.quant import fp8


def e4m3() -> np.ndarray:
    """(127,) float64: the values of codes 0 .. 126, ascending (bias 7; code 127 is NaN)."""
    codes = np.arange(127)
    exponent, mantissa = codes >> 3, codes & 7
    normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7.0)
    return np.where(exponent == 0, mantissa / 8 * 2.0**-6, normal)


def nearest_even(values: np.ndarray) -> np.ndarray:
    """Codes of float32 values within +-448: the nearest; of two alike the even one."""
    table, size = e4m3(), np.abs(values).astype(np.float64)
    above = np.searchsorted(table, size).clip(1, 126)
    low, high = size - table[above - 1], table[above] - size
    up = (high < low) | ((high == low) & (above % 2 == 0))
    return np.where(up, above, above - 1) + 128 * np.signbit(values)


def by_hand(x: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes (R', C') and scales, one tile after the other."""
    height, width = -(-x.shape[0] // rows) * rows, -(-x.shape[1] // 128) * 128
    padded = np.zeros((height, width), np.float32)
    padded[: x.shape[0], : x.shape[1]] = x
    codes = np.zeros((height, width), np.int64)
    scales = np.zeros((height // rows, width // 128), np.float32)
    for i in range(height // rows):
        for j in range(width // 128):
            place = slice(i * rows, (i + 1) * rows), slice(j * 128, (j + 1) * 128)
            scale = np.abs(padded[place]).max() / np.float32(448)
            scales[i, j] = scale if scale > 0 else np.float32(1)
            steps = padded[place] / scales[i, j]
            codes[place] = nearest_even(steps.clip(np.float32(-448), np.float32(448)))
    return codes, scales


def check(x: torch.Tensor, rows: int) -> fp8.Quantized:
    got = fp8.quantize(x, rows)
    codes, scales = by_hand(x.float().numpy(), rows)
    assert np.array_equal(got.codes.view(torch.uint8).numpy(), codes)
    assert np.array_equal(got.scales.numpy(), scales)
    assert got.shape == tuple(x.shape)
    assert got.rows == rows
    return got


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [1, 128])
@pytest.mark.parametrize("shape", [(1, 1), (3, 127), (128, 128), (130, 129), (5, 300)])
def test_codes_and_scales_are_the_definitions(shape: tuple[int, int], rows: int) -> None:
    check(normal(*shape), rows)
    check(normal(*shape).bfloat16(), rows)
    # Magnitudes over the whole range of float32 in one matrix, subnormal ones too.
    wild = normal(*shape) * 10.0 ** torch.linspace(-44, 38, shape[0] * shape[1]).view(shape)
    check(wild, rows)
    holes = normal(*shape) * (normal(*shape, seed=1) > 1)
    check(holes, rows)


@pytest.mark.parametrize("rows", [1, 128])
def test_ties_go_to_the_even_code(rows: int) -> None:
    table = torch.from_numpy(e4m3()).float()
    middles = (table[1:] + table[:-1]) / 2
    # 448 as the largest makes the scale one, so that the middles are ties.
    row = torch.cat((middles, torch.tensor([448.0])))[None]
    got = check(torch.cat((row, -row)), rows)
    codes = got.codes.view(torch.uint8)[0, :126].long()
    assert (codes % 2 == 0).all()
    assert set(codes.tolist()) == set(range(0, 128, 2)), "up and down"
    exact = torch.cat((table, -table[1:2]))[None, -128:]
    assert torch.equal(fp8.quantize(exact, rows).values(), exact)


def test_zero_huge_and_tiny_tiles() -> None:
    assert check(torch.zeros(2, 200), 1).scales.eq(1).all()
    assert check(torch.full((1, 128), 3.4e38), 1).values().isfinite().all()
    tiny = torch.full((1, 128), 1e-45)
    assert check(tiny, 1).values().eq(0).all(), "a 448th of the least float is zero"
    assert fp8.quantize(torch.tensor([[float("nan"), 1.0]]), 1).values().isnan().any()


def values(x: torch.Tensor, rows: int) -> torch.Tensor:
    """The float64 values of a matrix's codes, from the reference."""
    codes, scales = by_hand(x.float().numpy(), rows)
    signed = np.where(codes >= 128, -1, 1) * e4m3()[codes % 128]
    wide = signed * np.kron(scales.astype(np.float64), np.ones((rows, 128)))
    return torch.from_numpy(wide[: x.shape[0], : x.shape[1]])


def product() -> Any:
    return fp8.product_for(torch.device("cpu"))[0]


@pytest.mark.parametrize("sizes", [(7, 33, 5), (130, 257, 129)])
def test_forward_is_the_product_of_the_values(sizes: tuple[int, int, int]) -> None:
    rows, inner, outer = sizes
    x, weight = normal(rows, inner), normal(outer, inner, seed=1) / 9
    want = values(x, 1) @ values(weight, 128).t()
    got = product()(x, weight)
    assert got.dtype == torch.float32
    # The value of a code is rounded to float32 once, and the sum in float32.
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-6 * float(want.abs().max()))
    assert (got - x @ weight.t()).abs().max() > 1e-3, "rounding acts"
    batched = product()(x.view(1, rows, inner), weight)
    assert torch.equal(batched[0], got)


@pytest.mark.parametrize("sizes", [(6, 20, 11), (131, 130, 129)])
def test_gradients_are_those_of_frozen_rounding(sizes: tuple[int, int, int]) -> None:
    """Straight-through: with the rounding errors held fixed, finite differences in float64."""
    rows, inner, outer = sizes
    x, weight, grad = normal(rows, inner), normal(outer, inner, seed=1), normal(rows, outer, seed=2)
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    product()(*leaves).backward(grad)
    rounded = values(grad, 1), values(weight, 128)
    # the weight gradient's own factors are bfloat16
    coarse = grad.bfloat16().double(), x.bfloat16().double()
    generator, step = torch.Generator().manual_seed(3), 1e-4

    def through_x(moved: torch.Tensor) -> torch.Tensor:
        return (rounded[0] * ((values(x, 1) + moved - x.double()) @ rounded[1].t())).sum()

    def through_weight(moved: torch.Tensor) -> torch.Tensor:
        frozen = values(weight, 128) + moved - weight.double()
        return (coarse[0] * (coarse[1] @ frozen.t())).sum()

    for leaf, function in zip(leaves, (through_x, through_weight), strict=True):
        start = leaf.detach().double()
        for _ in range(5):
            way = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
            ahead, behind = function(start + step * way), function(start - step * way)
            slope = float((ahead - behind) / (2 * step))
            size = float((leaf.grad.double() * way).abs().sum())
            assert float((leaf.grad.double() * way).sum()) == pytest.approx(slope, abs=1e-6 * size)


def test_only_what_is_needed_is_differentiated() -> None:
    x, weight = normal(4, 8), normal(3, 8, seed=1).requires_grad_()
    product()(x, weight).sum().backward()
    assert weight.grad.shape == (3, 8)
    assert weight.grad.dtype == torch.float32


def test_autocast_decides_the_type_of_the_result() -> None:
    x, weight = normal(4, 200).requires_grad_(), normal(3, 200, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        out = product()(x, weight)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, product()(x, weight).bfloat16()), "the sum is in float32 all the same"
    out.sum().backward()
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("sizes", [(5, 100, 90), (128, 640, 300)])
def test_the_device_gets_what_its_library_wants(
    monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int, int]
) -> None:
    """Layouts as cuBLAS documents them, multiplied out here from what was handed over."""
    rows, inner, outer = sizes

    def scaled_mm(a: Any, b: Any, sa: Any, kind_a: Any, sb: Any, kind_b: Any, **rest: Any) -> Any:
        kinds = torch.nn.functional.ScalingType
        assert (kind_a, kind_b) == (kinds.BlockWise1x128, kinds.BlockWise128x128)
        deep, wide = b.shape
        assert a.is_contiguous()
        assert b.t().is_contiguous()
        assert a.shape[0] % 4 == deep % 128 == wide % 16 == 0
        assert sa.shape == (a.shape[0], deep // 128)
        assert sa.stride(0) == 1
        padded = -(-deep // 128 // 4) * 4
        assert sb.shape == (padded, -(-wide // 128))
        assert sb.t().is_contiguous()
        left = a.float() * sa.repeat_interleave(128, 1)
        scales = sb[: deep // 128].repeat_interleave(128, 0).repeat_interleave(128, 1)
        return (left @ (b.float() * scales)).to(rest["output_dtype"])

    monkeypatch.setattr(torch.nn.functional, "scaled_mm", scaled_mm)
    x, weight = fp8.quantize(normal(rows, inner), 1), normal(outer, inner, seed=1)
    blocks = fp8.quantize(weight, 128)
    got, want = fp8.hardware(x, blocks), fp8.emulated(x, blocks)
    torch.testing.assert_close(got.float(), want, rtol=2**-8, atol=1e-3)
    back = fp8.quantize(normal(rows, outer, seed=2), 1)
    got, want = fp8.hardware(back, blocks.transposed()), fp8.emulated(back, blocks.transposed())
    assert got.shape == (rows, inner)
    torch.testing.assert_close(got.float(), want, rtol=2**-8, atol=1e-3)


def test_the_way_is_told_and_a_refusing_device_is_emulated() -> None:
    assert fp8.product_for(torch.device("cpu"))[1] == "emulated, because a CPU has no FP8 product"
    # What a CPU build says to such a product is how a device refuses.
    assert "refuses block scales" in fp8._refusal(torch.device("cpu"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_devices_product_is_the_emulation() -> None:
    device = torch.device("cuda")
    multiply, how = fp8.product_for(device)
    if "emulated" in how:
        pytest.skip(how)
    for rows, inner, outer in ((5, 100, 90), (300, 1000, 700)):
        x, weight = normal(rows, inner).to(device), normal(outer, inner, seed=1).to(device)
        want = fp8.emulated(fp8.quantize(x, 1), fp8.quantize(weight, 128))
        torch.testing.assert_close(
            multiply(x, weight), want, rtol=2**-7, atol=2**-8 * float(want.abs().max())
        )
