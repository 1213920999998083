"""Canonical low-bit matrices: exact arithmetic, rounding rules, the bytes on disk."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from endside.errors import UserError
from endside.quant.pack import (
    QuantizedLinear,
    Scheme,
    bf16_to_float,
    float_to_bf16,
    from_arrays,
    pack_bits,
    round_to_nearest,
    to_arrays,
    unpack_bits,
)

KINDS = ("int4", "int8", "ternary")
BITS = {"int4": 4, "int8": 8, "ternary": 2}
MIDDLE = {"int4": 8, "int8": 128, "ternary": 1}
REACH = {"int4": 7, "int8": 127, "ternary": 1}


def weights(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Of very different sizes per row, with a row and a group of zeros."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(rows, columns)) * 10.0 ** rng.integers(-3, 3, size=(rows, 1))
    values[0, :5] = 0
    values[-1] = 0
    return values.astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("rows", "columns", "group"), [(3, 129, 32), (1, 64, 64), (5, 63, 32)])
def test_rounding_by_hand(kind: str, bf16: bool, rows: int, columns: int, group: int) -> None:
    """Scale from the group, rounded to 16 bits; then the nearest multiple, ties to even."""
    weight = weights(rows, columns)
    got = round_to_nearest(weight, kind, group, bf16=bf16)
    assert got.shape == (rows, columns) and got.symmetric and got.bf16 == bf16
    for n in range(rows):
        for g in range(-(-columns // group)):
            part = weight[n, g * group : (g + 1) * group]
            size = np.abs(part)
            if kind == "ternary":
                distinct = set(size[size > 0].tolist())
                mean = float(sum(map(Fraction, size.tolist())) / len(size))
                wanted = max(distinct, default=0.0) if len(distinct) < 2 else mean
            else:
                wanted = np.float32(size.max()) / np.float32(REACH[kind])
            half = np.float16(wanted) if not bf16 else bf16_to_float(float_to_bf16([wanted]))[0]
            scale = float(half)
            assert got.scales_float()[n, g] == np.float32(scale)
            for k, w in enumerate(part, start=g * group):
                step = round(float(np.float32(w) / np.float32(scale))) if scale else 0
                step = max(-REACH[kind] - (kind == "int4"), min(REACH[kind], step))
                assert got.codes[n, k] == step + MIDDLE[kind], (n, k, w, scale)


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_asymmetric_covers_the_range(kind: str) -> None:
    """All-positive groups use the whole range; the error is at most half a step plus rounding."""
    weight = np.abs(weights(4, 96, seed=2)) + 3
    got = round_to_nearest(weight, kind, 32, symmetric=False)
    assert got.zeros is not None and (got.zeros == 0).all()
    symmetric = round_to_nearest(weight, kind, 32)
    error = np.abs(got.dequantize() - weight).reshape(4, 3, 32)
    assert (error <= got.scales_float()[..., None] * 0.51).all()
    assert np.square(error).sum() < 0.5 * np.square(symmetric.dequantize() - weight).sum()
    mixed = weights(4, 96, seed=3)
    low = round_to_nearest(mixed, kind, 32, symmetric=False)
    assert low.zeros is not None and low.zeros[:3].min() > 0
    slack = np.abs(low.dequantize() - mixed).reshape(4, 3, 32) / np.maximum(
        low.scales_float()[..., None], 1e-9
    )
    assert slack.max() <= 1.01


def test_ternary_keeps_what_is_ternary() -> None:
    """Groups of -s, 0, +s come back bit for bit, bfloat16 scales and all."""
    rng = np.random.default_rng(1)
    scale = bf16_to_float(float_to_bf16(rng.uniform(1e-30, 1e30, size=(7, 3)).astype(np.float32)))
    weight = rng.integers(-1, 2, size=(7, 96)).astype(np.float32) * np.repeat(scale, 32, axis=1)
    got = round_to_nearest(weight, "ternary", 32, bf16=True)
    assert np.array_equal(got.dequantize(), weight)
    with pytest.raises(UserError, match="beyond float16"):
        round_to_nearest(weight, "ternary", 32)


@pytest.mark.parametrize("kind", KINDS)
def test_dequantize_is_exact(kind: str) -> None:
    """Against fractions: 16-bit scale times integer needs no rounding in float32."""
    rng = np.random.default_rng(5)
    codes = rng.integers(0, {"int4": 16, "int8": 256, "ternary": 3}[kind], (4, 65), dtype=np.uint8)
    scales = rng.normal(size=(4, 3)).astype(np.float16)
    zeros = rng.integers(0, 16, (4, 3), dtype=np.uint8) if kind != "ternary" else None
    got = QuantizedLinear(kind, codes, scales, zeros, 32).dequantize()
    for n in range(4):
        for k in range(65):
            zero = MIDDLE[kind] if zeros is None else int(zeros[n, k // 32])
            want = Fraction(float(scales[n, k // 32])) * (int(codes[n, k]) - zero)
            assert Fraction(float(got[n, k])) == want


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [1, 63, 64, 65, 129])
def test_bytes_on_disk(kind: str, columns: int) -> None:
    """Low bits first, padded to whole groups with the code of zero; nothing lost."""
    rng = np.random.default_rng(columns)
    codes = rng.integers(0, {"int4": 16, "int8": 256, "ternary": 3}[kind], (3, columns), np.uint8)
    packed = pack_bits(codes, kind, 32)
    padded, per = -(-columns // 32) * 32, 8 // BITS[kind]
    assert packed.shape == (3, padded // per)
    for n in range(3):
        for j in range(padded // per):
            want = sum(
                (int(codes[n, k]) if (k := per * j + i) < columns else MIDDLE[kind])
                << (i * BITS[kind])
                for i in range(per)
            )
            assert packed[n, j] == want
    assert np.array_equal(unpack_bits(packed, kind, columns), codes)


def test_impossible_ternary_code_is_refused() -> None:
    with pytest.raises(UserError, match=r"hold 3, only 0 \.\. 2"):
        unpack_bits(np.array([[0b11]], np.uint8), "ternary", 4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_arrays_round_trip(kind: str, symmetric: bool) -> None:
    if kind == "ternary" and not symmetric:
        with pytest.raises(UserError, match="ternary weights are symmetric"):
            round_to_nearest(weights(3, 65), kind, 32, symmetric=False)
        return
    scheme = Scheme(kind, 32, symmetric, head=Scheme("int8", 64))
    assert Scheme.from_config(scheme.to_config()) == scheme
    linear = round_to_nearest(weights(3, 65), kind, 32, symmetric=symmetric)
    arrays = to_arrays("model.x", linear)
    parts = ("codes", "scales", "zeros")[: 2 if symmetric else 3]
    assert set(arrays) == {f"model.x.{part}" for part in parts}
    back = from_arrays("model.x", arrays, scheme, 65)
    assert np.array_equal(back.dequantize(), linear.dequantize())
    arrays["model.x.scales"] = arrays["model.x.scales"][:, :2]
    with pytest.raises(UserError, match=r"model\.x\.scales is \(3, 2\)"):
        from_arrays("model.x", arrays, scheme, 65)


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"kind": "int3", "group_size": 32}, "kind is 'int3'"),
        ({"kind": "int4", "group_size": 0}, "group_size is 0"),
        ({"kind": "int4", "group_size": 2**63}, "group_size is 9"),
        ({"kind": "int4", "group_size": 32, "sym": 1}, "sym is 1"),
        ({"kind": "int4", "group_size": 32, "head": 1}, "head is 1"),
        ({"kind": "int4", "group_size": 32, "head": {}}, "kind is None"),
    ],
)
def test_wrong_schemes_are_refused(block: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Scheme.from_config(block)


def test_bf16_rounds_to_even() -> None:
    """Against torch, halfway cases included."""
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(0).normal(size=5000).astype(np.float32)
    bits = values.view(np.uint32)
    values = np.concatenate([values, (bits & 0xFFFF0000 | 0x8000).view(np.float32)])
    want = torch.from_numpy(values).bfloat16()
    assert np.array_equal(float_to_bf16(values), want.view(torch.uint16).numpy())
    assert np.array_equal(bf16_to_float(float_to_bf16(values)), want.float().numpy())


def test_infinite_weights_are_refused() -> None:
    with pytest.raises(UserError, match="infinite"):
        round_to_nearest(np.array([[1, np.inf]], np.float32), "int4", 32)


def test_ties_go_to_even() -> None:
    """Scale 1 exactly: 0.5 and 2.5 round to the even neighbour, 1.5 and 3.5 up to it."""
    weight = np.array([[7, 0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5]], np.float32)
    got = round_to_nearest(weight, "int4", 8).codes[0].astype(int) - 8
    assert got.tolist() == [7, 0, 2, 2, 4, 0, -2, -2]
