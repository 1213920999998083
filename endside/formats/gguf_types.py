"""The block types of GGUF: bytes to weights, and weights or codes to bytes.

A tensor is a run of blocks along its rows. Five types hold one scale and small integers, which is
our canonical form, so they are read as codes and nothing is rounded: Q8_0, Q4_0, Q2_0, TQ1_0 and
TQ2_0. K-quants have scales of scales; they are read as float32, in the order of operations that
ggml uses. Layouts are those of formats §3.4.

    Q8_0   32 weights   d f16, 32 x int8                          d q
    Q4_0   32           d f16, 16 B: low nibbles 0-15, high 16-31   d (q - 8)
    Q2_0   64           d f16, 16 B: four per byte, low bits first  d (q - 1), q = 3 is +2 d
    TQ1_0  256          48 B and 4 B of base-3 digits, d f16      d (t - 1)
    TQ2_0  256          64 B: byte m of a half holds 32 n + m at bits 2 n, d f16
    Q4_K   256          d, dmin f16, 12 B of 6-bit pairs, nibbles   (d sc) q - (dmin m)
    Q6_K   256          4 + 2 bits, 16 x int8 scales, d f16       (d sc) (q - 32)

Writing from floats follows ggml's reference quantizers to the bit (Q8_0, Q4_0). A base-3 byte holds
five digits as the fraction v / 243 of 256, rounded up, so that digit n is the carry of 3^n times
it. K-quants are only read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from endside.errors import UserError
from endside.quant.pack import QuantizedLinear, Scheme, bf16_to_float, float_to_bf16

CHUNK = 1 << 16  # blocks decoded or encoded at a time


@dataclass(frozen=True)
class BlockType:
    """One type: how many weights share a block, and its bytes."""

    name: str
    id: int
    block: int
    bytes: int


TYPES = {
    one.name: one
    for one in (
        BlockType("F32", 0, 1, 4),
        BlockType("F16", 1, 1, 2),
        BlockType("BF16", 30, 1, 2),
        BlockType("Q4_0", 2, 32, 18),
        BlockType("Q8_0", 8, 32, 34),
        BlockType("Q4_K", 12, 256, 144),
        BlockType("Q6_K", 14, 256, 210),
        BlockType("TQ1_0", 34, 256, 54),
        BlockType("TQ2_0", 35, 256, 66),
        BlockType("Q2_0", 42, 64, 18),
        # the same id in a fork of llama.cpp; told apart by the offsets of the tensors
        BlockType("Q2_0/128", 42, 128, 34),
    )
}
BY_ID = {one.id: one for one in TYPES.values() if one.name != "Q2_0/128"}
PLAIN = ("F32", "F16", "BF16")
KNOWN_IDS = {
    3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 13: "Q5_K", 15: "Q8_K",
    16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M",
    39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip


def scheme_of(kind: str) -> Scheme | None:
    """What `decode` makes of a type; None: floats. A Q2_0 with a code 3 becomes int4 instead."""
    if kind not in _CODES:
        return None
    low = {"Q8_0": "int8", "Q4_0": "int4"}.get(kind, "ternary")
    return Scheme(low, min(TYPES[kind].block, 128))


def decode(raw: np.ndarray, kind: str, rows: int, columns: int) -> np.ndarray | QuantizedLinear:
    """The bytes of a tensor (1-d uint8) -> (rows, columns): plain, codes, or float32."""
    if kind == "F32":
        return raw.view("<f4").reshape(rows, columns)
    if kind in ("F16", "BF16"):
        return raw.view("<f2" if kind == "F16" else "<u2").reshape(rows, columns)
    blocks = raw.reshape(-1, TYPES[kind].bytes)
    if kind in _CODES:
        return _linear(blocks, kind, rows, columns)
    weights = np.empty((rows * columns // 256, 256), np.float32)
    for at in range(0, len(blocks), CHUNK):
        weights[at : at + CHUNK] = _FLOATS[kind](blocks[at : at + CHUNK])
    return weights.reshape(rows, columns)


def _linear(blocks: np.ndarray, kind: str, rows: int, columns: int) -> QuantizedLinear:
    """Blocks of a type that holds one scale and codes -> the canonical matrix."""
    size, scale_at = TYPES[kind].block, -2 if kind in ("TQ1_0", "TQ2_0") else 0
    scales = blocks[:, scale_at:][:, :2].copy().view("<f2").reshape(rows, -1)
    if not np.isfinite(scales).all():
        raise UserError(f"a {kind} block has an infinite scale: the file is damaged, get it again")
    codes = np.empty((len(blocks), size), np.uint8)
    for at in range(0, len(blocks), CHUNK):
        codes[at : at + CHUNK] = _CODES[kind](blocks[at : at + CHUNK])
    codes = codes.reshape(rows, columns)
    kinds = {"Q8_0": "int8", "Q4_0": "int4"}
    if kind in kinds:
        return QuantizedLinear(kinds[kind], codes, scales, None, size)
    if kind.startswith("Q2_0") and codes.size and codes.max() == 3:
        # +2 d has no ternary code; as int4 it has
        return QuantizedLinear("int4", codes + np.uint8(7), scales, None, size)
    if codes.size and codes.max() > 2:
        raise UserError(f"a {kind} block holds a code that is no trit: get the file again")
    if size <= 128:
        return QuantizedLinear("ternary", codes, scales, None, size)
    # groups of at most 128, which kernels can hold, with equal scales
    return QuantizedLinear("ternary", codes, np.repeat(scales, size // 128, axis=1), None, 128)


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    return blocks[:, 2:] ^ np.uint8(128)  # int8 q -> q + 128


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    return np.concatenate([blocks[:, 2:] & np.uint8(15), blocks[:, 2:] >> np.uint8(4)], axis=1)


def _q2_0(blocks: np.ndarray) -> np.ndarray:
    shifts = np.arange(0, 8, 2, dtype=np.uint8)
    return (blocks[:, 2:, None] >> shifts & np.uint8(3)).reshape(len(blocks), -1)


def _tq2_0(blocks: np.ndarray) -> np.ndarray:
    halves = blocks[:, :64].reshape(-1, 2, 1, 32)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    return (halves >> shifts & np.uint8(3)).reshape(len(blocks), 256)


_POWERS = np.array([1, 3, 9, 27, 81], np.uint8)[:, None]


def _trits(packed: np.ndarray, digits: int) -> np.ndarray:
    """Base-3 bytes (n, m) -> digit-major (n, digits * m); wrapping around 256 is meant."""
    carried = packed[:, None, :] * _POWERS[:digits]
    return (carried.astype(np.uint16) * 3 >> 8).astype(np.uint8).reshape(len(packed), -1)


def _tq1_0(blocks: np.ndarray) -> np.ndarray:
    return np.concatenate(
        [_trits(blocks[:, :32], 5), _trits(blocks[:, 32:48], 5), _trits(blocks[:, 48:52], 4)],
        axis=1,
    )


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    d, dmin = blocks[:, :4].copy().view("<f2").astype(np.float32).T
    low, high, both = np.split(blocks[:, 4:16], 3, axis=1)
    scale = np.concatenate([low & 63, (both & 15) | (low >> 6 << 4)], axis=1)
    least = np.concatenate([high & 63, (both >> 4) | (high >> 6 << 4)], axis=1)
    pairs = blocks[:, 16:].reshape(-1, 4, 1, 32) >> np.array([0, 4], np.uint8)[:, None] & 15
    q = pairs.reshape(-1, 8, 32).astype(np.float32)
    scaled = (d[:, None] * scale)[..., None] * q
    return (scaled - (dmin[:, None] * least)[..., None]).reshape(-1, 256)


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    low, high = blocks[:, :128], blocks[:, 128:192]
    scale = blocks[:, 192:208].view(np.int8).astype(np.float32)
    d = blocks[:, 208:].copy().view("<f2").astype(np.float32)
    nibbles = low.reshape(-1, 2, 1, 64) >> np.array([0, 4], np.uint8)[:, None] & 15
    pairs = high.reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    q = nibbles.reshape(-1, 256) | pairs.reshape(-1, 256) << 4
    q = (q.astype(np.int8) - np.int8(32)).astype(np.float32).reshape(-1, 16, 16)
    return ((d * scale)[..., None] * q).reshape(-1, 256)


_CODES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Q8_0": _q8_0, "Q4_0": _q4_0, "Q2_0": _q2_0, "Q2_0/128": _q2_0, "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
}  # fmt: skip
_FLOATS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"Q4_K": _q4_k, "Q6_K": _q6_k}


def encode_floats(weights: np.ndarray, kind: str) -> np.ndarray:
    """Weights (rows, columns) float -> bytes of F32, F16, BF16, Q8_0 or Q4_0, as ggml rounds."""
    values = np.ascontiguousarray(weights, np.float32)
    if kind == "F32":
        return values.view(np.uint8)
    if kind == "F16":
        if np.abs(values).max(initial=0) > np.finfo(np.float16).max:
            raise UserError("a weight is beyond float16: write bf16 or f32")
        return values.astype(np.float16).view(np.uint8)
    if kind == "BF16":
        return float_to_bf16(values).view(np.uint8)
    blocks = values.reshape(-1, 32)
    encode = _to_q8_0 if kind == "Q8_0" else _to_q4_0
    raw = np.empty((len(blocks), TYPES[kind].bytes), np.uint8)
    for at in range(0, len(blocks), CHUNK):
        raw[at : at + CHUNK] = encode(blocks[at : at + CHUNK])
    return raw


def _to_q8_0(blocks: np.ndarray) -> np.ndarray:
    scale = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
    steps = blocks * _inverse(scale)
    size = np.abs(steps)
    # half away from zero, as C's roundf
    whole = np.floor(size)
    rounded = np.copysign(whole + (size - whole >= np.float32(0.5)), steps)
    return np.concatenate([_half(scale), rounded.astype(np.int8).view(np.uint8)], axis=1)


def _to_q4_0(blocks: np.ndarray) -> np.ndarray:
    at = np.abs(blocks).argmax(1)[:, None]
    scale = np.take_along_axis(blocks, at, 1) / np.float32(-8)
    # the sum in float64: what ggml gets from a fused multiply-add, and from two roundings alike
    shifted = (blocks.astype(np.float64) * _inverse(scale) + 8.5).astype(np.float32)
    codes = np.clip(np.trunc(shifted), 0, 15).astype(np.uint8)
    return np.concatenate([_half(scale), codes[:, :16] | codes[:, 16:] << 4], axis=1)


def _inverse(scale: np.ndarray) -> np.ndarray:
    return np.where(scale == 0, np.float32(0), np.float32(1) / np.where(scale == 0, 1, scale))


def _half(scale: np.ndarray) -> np.ndarray:
    if np.abs(scale).max(initial=0) > np.finfo(np.float16).max:
        raise UserError("a scale is beyond float16: this type cannot hold these weights")
    return scale.astype(np.float16).view(np.uint8)


def encode_codes(linear: QuantizedLinear, kind: str) -> np.ndarray | None:
    """The bytes of a low-bit matrix that `kind` holds exactly; None when it does not.

    Q8_0 takes int8, Q4_0 int4 and ternary, the ternary types ternary; symmetric, float16 scales,
    and one scale for all weights of a block.
    """
    taken = {"Q8_0": ("int8",), "Q4_0": ("int4", "ternary")}.get(kind, ("ternary",))
    size = TYPES[kind].block
    if linear.kind not in taken or not linear.symmetric or linear.shape[1] % size:
        return None
    scales = _block_scales(linear, size)
    if scales is None:
        return None
    codes = linear.codes.reshape(-1, size)
    d = scales.reshape(-1, 1).view(np.uint8)
    if kind == "Q8_0":
        return np.concatenate([d, codes ^ np.uint8(128)], axis=1)
    if kind == "Q4_0":
        nibbles = codes + np.uint8(7) if linear.kind == "ternary" else codes
        return np.concatenate([d, nibbles[:, :16] | nibbles[:, 16:] << 4], axis=1)
    if kind == "TQ1_0":
        return np.concatenate([_from_trits(codes), d], axis=1)
    if kind == "TQ2_0":
        parts = codes.reshape(-1, 2, 4, 32) << np.arange(0, 8, 2, dtype=np.uint8)[:, None]
        return np.concatenate([np.bitwise_or.reduce(parts, axis=2).reshape(-1, 64), d], axis=1)
    parts = codes.reshape(len(codes), -1, 4) << np.arange(0, 8, 2, dtype=np.uint8)
    return np.concatenate([d, np.bitwise_or.reduce(parts, axis=2)], axis=1)


def _block_scales(linear: QuantizedLinear, size: int) -> np.ndarray | None:
    """float16 scales, one per block of `size` columns; None when groups or types forbid it."""
    scales = linear.scales
    if linear.bf16:
        exact = bf16_to_float(scales)
        if np.abs(exact).max(initial=0) > np.finfo(np.float16).max:
            return None
        scales = exact.astype(np.float16)
        if not np.array_equal(scales.astype(np.float32), exact):
            return None
    if linear.group % size == 0:
        return np.repeat(scales, linear.group // size, axis=1)[:, : linear.shape[1] // size]
    if size % linear.group:
        return None
    grouped = scales.reshape(len(scales), -1, size // linear.group)
    return grouped[:, :, 0].copy() if (grouped == grouped[:, :, :1]).all() else None


def _from_trits(codes: np.ndarray) -> np.ndarray:
    """Ternary codes (n, 256) -> the 52 base-3 bytes of TQ1_0."""

    def packed(part: np.ndarray, digits: int) -> np.ndarray:
        weights = np.array([81, 27, 9, 3, 1], np.uint16)[:digits, None]
        value = (part.reshape(len(part), digits, -1) * weights).sum(1, dtype=np.uint16)
        return ((value.astype(np.uint32) * 256 + 242) // 243).astype(np.uint8)

    return np.concatenate(
        [packed(codes[:, :160], 5), packed(codes[:, 160:240], 5), packed(codes[:, 240:], 4)],
        axis=1,
    )
