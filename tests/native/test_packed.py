"""Packing from Python: what goes in comes out, however it is written; mistakes are refused."""

from __future__ import annotations

import numpy as np
import pytest

from endside import native
from endside.errors import UserError
from endside.native.packed import (
    KINDS,
    Packed,
    aligned,
    from_codes,
    interleave,
    linear,
    pack,
)

pytestmark = pytest.mark.skipif(not native.available_isas(), reason=native.status())

RANDOM = np.random.default_rng(3)
N, K, GROUP = 77, 200, 64  # neither fills its tile
GROUPS = -(-K // GROUP)
QUANTIZED = KINDS[2:]
LEVELS = {"int8": 256, "int4": 16, "ternary2": 3, "ternary3": 3}
ZERO = {"int8": 128, "int4": 8, "ternary2": 1, "ternary3": 1}


def chosen(kind: str, asymmetric: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Codes (N, K), float16 scales and zeros (N, groups), as a quantizer might give them."""
    codes = RANDOM.integers(0, LEVELS[kind], (N, K)).astype(np.uint8)
    if kind == "int8":
        codes = np.maximum(codes, 1)
    scales = (0.01 + RANDOM.random((N, GROUPS))).astype(np.float16)
    zeros = RANDOM.integers(0, LEVELS[kind], (N, GROUPS)).astype(np.uint8)
    return codes, scales, zeros if asymmetric else None


def meaning(
    kind: str, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None
) -> np.ndarray:
    """scale * (code - zero), float32."""
    wide = np.repeat(scales.astype(np.float32), GROUP, axis=1)[:, :K]
    zero = ZERO[kind] if zeros is None else np.repeat(zeros, GROUP, axis=1)[:, :K]
    return wide * (codes.astype(np.int32) - zero).astype(np.float32)


@pytest.mark.parametrize(
    ("kind", "asymmetric"), [*((kind, False) for kind in QUANTIZED), ("int8", True), ("int4", True)]
)
def test_codes_come_back(kind: str, asymmetric: bool) -> None:
    codes, scales, zeros = chosen(kind, asymmetric)
    packed = from_codes(codes, scales, zeros, kind, group=GROUP)
    want = meaning(kind, codes, scales, zeros)
    assert packed.unpack().tobytes() == want.tobytes()
    assert packed.unpack_row(70).tobytes() == want[70].tobytes()
    assert packed.unpack(72, 3).tobytes() == want[72:75].tobytes()
    assert packed.nbytes == sum(packed.sizes())
    assert (packed.zeros is not None) == asymmetric


@pytest.mark.parametrize("kind", KINDS)
def test_written_in_pieces(kind: str) -> None:
    weight = RANDOM.standard_normal((N, K)).astype(np.float32)
    whole = pack(weight, kind, group=GROUP)
    pieces = Packed(kind, N, K, whole.group).allocate()
    for first, last in ((40, 77), (0, 8), (8, 40)):
        pieces.write(weight[first:last], row=first)
    assert pieces.codes.tobytes() == whole.codes.tobytes()
    assert whole.scales is None or pieces.scales.tobytes() == whole.scales.tobytes()
    if kind in QUANTIZED:
        codes, scales, zeros = chosen(kind, False)
        given = from_codes(codes, scales, zeros, kind, group=GROUP)
        pieces.write_codes(codes[48:], scales[48:], None, row=48)
        pieces.write_codes(codes[:48], scales[:48].view(np.uint16), None)
        assert pieces.codes.tobytes() == given.codes.tobytes()
        assert pieces.scales.tobytes() == given.scales.tobytes()


@pytest.mark.parametrize("kind", ["f32", "bf16", "int8", "int4"])
def test_rounding_is_to_nearest(kind: str) -> None:
    weight = RANDOM.standard_normal((N, K)).astype(np.float32)
    got = pack(weight, kind, group=GROUP).unpack()
    steps = {"f32": 0.0, "bf16": np.abs(weight) / 256, "int8": 1 / 127, "int4": 1 / 7}[kind]
    if kind in QUANTIZED:
        padded = np.pad(np.abs(weight), ((0, 0), (0, GROUPS * GROUP - K)))
        largest = padded.reshape(N, GROUPS, GROUP).max(axis=2)
        steps = (
            np.repeat(largest * steps, GROUP, axis=1)[:, :K] * (0.5 + 1e-3) + largest.max() / 2048
        )
    assert (np.abs(got - weight) <= steps).all()
    assert kind == "f32" or not np.array_equal(got, weight)


def test_sources_of_16_bits() -> None:
    weight = RANDOM.standard_normal((N, K)).astype(np.float16)
    half = pack(weight, "int8", group=GROUP)
    full = pack(weight.astype(np.float32), "int8", group=GROUP)
    assert half.codes.tobytes() == full.codes.tobytes()
    words = (weight.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    value = (words.astype(np.uint32) << 16).view(np.float32)
    assert pack(words, "bf16").unpack().tobytes() == value.tobytes()
    assert pack(words, "int4", group=GROUP).codes.tobytes() == (
        pack(value, "int4", group=GROUP).codes.tobytes()
    )


@pytest.mark.parametrize("isa", native.available_isas())
@pytest.mark.parametrize("kind", KINDS)
def test_product(kind: str, isa: str) -> None:
    """Near x W^T with W as unpacked, and the same bits alone or in company, on any team."""
    packed = pack(RANDOM.standard_normal((N, K)).astype(np.float32), kind, group=GROUP)
    x = RANDOM.standard_normal((9, K)).astype(np.float32)
    got = linear(x, packed, isa=isa)
    want = x.astype(np.float64) @ packed.unpack().astype(np.float64).T
    bound = 1e-5 if kind in ("f32", "bf16") else 0.03
    assert np.abs(got - want).max() <= bound * np.abs(want).max()
    alone = np.concatenate([linear(x[i : i + 1], packed, isa=isa) for i in range(9)])
    assert alone.tobytes() == got.tobytes()
    assert linear(x, packed, isa=isa, threads=3).tobytes() == got.tobytes()
    assert linear(x[:0], packed, isa=isa).shape == (0, N)


def test_norm_and_what_happens_then() -> None:
    packed = pack(RANDOM.standard_normal((48, K)).astype(np.float32), "f32")
    x = RANDOM.standard_normal((3, K)).astype(np.float32)
    norm = (1.5 + RANDOM.random(K)).astype(np.float32)
    wide, weight = x.astype(np.float64), packed.unpack().astype(np.float64)
    normed = wide / np.sqrt(np.mean(wide**2, axis=1, keepdims=True) + 0.3) * norm
    y = normed @ weight.T
    options = dict(norm=(norm, 0.3), threads=2)
    scale = np.abs(y).max()
    assert np.abs(linear(x, packed, alpha=0.5, **options) - 0.5 * y).max() < 1e-5 * scale
    out = np.ones((3, 48), np.float32)
    assert linear(x, packed, then="add", alpha=0.5, out=out, **options) is out
    assert np.abs(out - 1 - 0.5 * y).max() < 1e-5 * scale
    gate, up = y.reshape(3, 3, 2, 8)[:, :, 0].reshape(3, 24), y.reshape(3, 3, 2, 8)[:, :, 1]
    want = gate / (1 + np.exp(-gate)) * up.reshape(3, 24)
    got = linear(x, packed, then="silu_mul", **options)
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()


def test_interleave() -> None:
    gate, up = np.arange(16.0)[:, None], np.arange(100.0, 116)[:, None]
    both = interleave(gate, up)[:, 0].tolist()
    assert both == [*range(8), *range(100, 108), *range(8, 16), *range(108, 116)]
    with pytest.raises(UserError, match="multiple of 8 rows"):
        interleave(gate[:12], up[:12])


def test_buffers_may_lie_in_a_file(tmp_path) -> None:
    weight = RANDOM.standard_normal((N, K)).astype(np.float32)
    packed = pack(weight, "int4", group=GROUP)
    codes, scales, _ = packed.sizes()
    start = -(-codes // 64) * 64
    with open(tmp_path / "pack", "wb") as file:
        file.write(packed.codes.tobytes() + bytes(start - codes) + packed.scales.tobytes())
    mapped = np.memmap(tmp_path / "pack", np.uint8, "r")
    parts = mapped[:codes], mapped[start : start + scales].view(np.uint16)
    again = Packed("int4", N, K, GROUP, codes=parts[0], scales=parts[1])
    assert again.unpack().tobytes() == packed.unpack().tobytes()


def test_mistakes_are_refused() -> None:
    weight = np.ones((N, K), np.float32)
    packed = pack(weight, "int4", group=GROUP)
    with pytest.raises(UserError, match="use one of f32"):
        Packed("int3", N, K, GROUP)
    with pytest.raises(UserError, match="no groups"):
        Packed("f32", N, K, GROUP)
    with pytest.raises(UserError, match="group must be 32, 64 or 128"):
        pack(weight, "int4", group=100)
    with pytest.raises(UserError, match="n and k"):
        Packed("f32", 0, K).sizes()
    with pytest.raises(UserError, match="float64"):
        pack(weight.astype(np.float64), "int4")
    for rows, row in ((12, 0), (8, 4), (8, 76), (8, -8)):
        with pytest.raises(UserError, match="whole blocks of 8"):
            packed.write(weight[:rows], row=row)
    with pytest.raises(UserError, match="another length"):
        packed.write(weight[:, :-1])
    short, shifted = packed.codes[:-64], aligned(packed.codes.size + 1)[1:]
    with pytest.raises(UserError, match="hold"):
        Packed("int4", N, K, GROUP, codes=short, scales=packed.scales).unpack()
    with pytest.raises(UserError, match="multiple of 64 bytes"):
        Packed("int4", N, K, GROUP, codes=shifted, scales=packed.scales).unpack()
    with pytest.raises(UserError, match="codes: the array"):
        Packed("int4", N, K, GROUP).unpack()
    with pytest.raises(UserError, match="may be asymmetric"):
        from_codes(*chosen("ternary2", True), "ternary2", group=GROUP)
    with pytest.raises(UserError, match="no such rows"):
        packed.unpack(70, 8)
    with pytest.raises(UserError, match="another shape"):
        linear(np.ones((2, K + 1), np.float32), packed)
    with pytest.raises(UserError, match="norm is not"):
        linear(np.ones((2, K), np.float32), packed, norm=(np.ones(K - 1, np.float32), 1e-6))
