"""Low-bit matrices: one canonical form in memory, one packed form on disk.

A matrix W (N, K) is cut along K into groups of `group` weights; inside a group

    w = scale * (code - zero)

with one 16-bit scale per row and group. Kinds differ in the codes: int4 0 .. 15, int8 0 .. 255,
ternary 0 .. 2. A symmetric matrix has no zeros of its own: 8, 128 and 1 are implied. Every product
of a 16-bit scale and a small integer is exact in float32, so `dequantize` rounds nothing and a
matrix whose weights are already -s, 0, +s (a ternary model stored as bfloat16) survives the way
there and back bit for bit.

Quantizers, readers and writers of foreign formats all speak this form; kernels pack it their way.
On disk a linear NAME is `NAME.codes`, `NAME.scales` and, when asymmetric, `NAME.zeros`, beside a
`quantization_config` in config.json (`Scheme`). Codes are packed along K, low bits first, after K
was filled up to whole groups with the code that means 0.

What we chose not to do: codes over K in another order (act-order). Groups are runs of neighbours
here; a format that permutes columns keeps its permutation beside the matrix (formats/gptq.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from endside.errors import UserError

METHOD = "endside"  # quant_method in config.json
BITS = {"int4": 4, "int8": 8, "ternary": 2}  # on disk
ZERO = {"int4": 8, "int8": 128, "ternary": 1}  # the implied code of weight 0
TOP = {"int4": 15, "int8": 255, "ternary": 2}  # the largest code
REACH = {"int4": 7, "int8": 127}  # the largest |code - zero| that rounding to nearest uses


@dataclass(frozen=True, eq=False)
class QuantizedLinear:
    """One matrix in low bits. float16 scales, or uint16 ones that hold the bits of bfloat16."""

    kind: str  # int4, int8 or ternary
    codes: np.ndarray  # (N, K) uint8, one code each
    scales: np.ndarray  # (N, ceil(K / group)) float16, or uint16: bfloat16 bits
    zeros: np.ndarray | None  # (N, ceil(K / group)) uint8; None: symmetric
    group: int

    def __post_init__(self) -> None:
        assert self.kind in BITS, f"kind {self.kind!r} is not one of {', '.join(BITS)}"
        groups = (self.codes.shape[0], -(-self.codes.shape[1] // self.group))
        assert self.codes.dtype == np.uint8 and self.codes.ndim == 2, "codes are (N, K) uint8"
        assert self.scales.shape == groups, f"scales are {self.scales.shape}, not {groups}"
        assert self.scales.dtype in (np.float16, np.uint16), "scales are float16 or bfloat16 bits"
        assert self.zeros is None or self.zeros.shape == groups, "one zero per scale"

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def bf16(self) -> bool:
        """Whether the scales are bfloat16."""
        return self.scales.dtype == np.uint16

    @property
    def symmetric(self) -> bool:
        """Whether the zero is implied by the kind."""
        return self.zeros is None

    def scales_float(self) -> np.ndarray:
        """Scales (N, groups) as float32."""
        return bf16_to_float(self.scales) if self.bf16 else self.scales.astype(np.float32)

    def dequantize(self) -> np.ndarray:
        """The weights (N, K) float32, exact."""
        columns = self.shape[1]
        zeros = ZERO[self.kind] if self.zeros is None else _spread(self.zeros, self.group, columns)
        centred = self.codes.astype(np.float32) - np.float32(zeros)
        return centred * _spread(self.scales_float(), self.group, columns)


@dataclass(frozen=True)
class Scheme:
    """How the matrices of a checkpoint are stored: `quantization_config` of config.json."""

    kind: str
    group: int
    symmetric: bool = True
    head: Scheme | None = None  # of lm_head, where it is in low bits too

    def to_config(self) -> dict[str, Any]:
        """The JSON object; `from_config` reads it."""
        config: dict[str, Any] = {
            "quant_method": METHOD,
            "bits": BITS[self.kind],
            "group_size": self.group,
            "sym": self.symmetric,
            "kind": self.kind,
        }
        if self.head is not None:
            config["head"] = {"kind": self.head.kind, "group_size": self.head.group}
            if not self.head.symmetric:
                config["head"]["sym"] = False
        return config

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Scheme:
        """Read and check; UserError names the wrong key."""
        kind, group = config.get("kind"), config.get("group_size")
        symmetric, head = config.get("sym", True), config.get("head")
        where = "config.json quantization_config"
        if kind not in tuple(BITS):  # a hostile file's kind may not be hashable
            raise UserError(f"{where}.kind is {kind!r}: use {', '.join(BITS)}")
        if type(group) is not int or not 1 <= group <= 1 << 20:
            raise UserError(f"{where}.group_size is {group!r}: it must be a positive whole number")
        if not isinstance(symmetric, bool):
            raise UserError(f"{where}.sym is {symmetric!r}: use true or false")
        if head is not None and not isinstance(head, dict):
            raise UserError(f"{where}.head is {head!r}: it must be an object")
        inner = None if head is None else cls.from_config({**head, "head": None})
        return cls(kind, group, symmetric, inner)


def round_to_nearest(
    weight: np.ndarray, kind: str, group: int, *, symmetric: bool = True, bf16: bool = False
) -> QuantizedLinear:
    """Weights (N, K) float -> the nearest codes, as the native packer chooses them.

    Symmetric scale: max|w| / 7 (int4) or / 127 (int8); ternary: mean|w|, or s where the group holds
    only -s, 0, +s, which is then kept exactly. Asymmetric: (max - min) / 15 or / 255 over a range
    that includes 0. The scale is rounded to 16 bits first, then codes are chosen with ties to even.
    """
    if kind == "ternary" and not symmetric:
        raise UserError("ternary weights are symmetric: leave asymmetric zeros to int4 and int8")
    if not np.isfinite(weight).all():
        raise UserError("a weight is infinite or no number: it cannot be stored in low bits")
    blocks = _grouped(np.asarray(weight, np.float32), group)  # (N, groups, group)
    zeros = None
    if kind == "ternary":
        wanted = _ternary_scale(blocks, weight.shape[1])
    elif symmetric:
        wanted = np.abs(blocks).max(-1) / np.float32(REACH[kind])
    else:
        low, high = np.minimum(blocks.min(-1), 0), np.maximum(blocks.max(-1), 0)
        wanted = (high - low) / np.float32(TOP[kind])
    scales = float_to_bf16(wanted) if bf16 else _to_half(wanted)
    step = bf16_to_float(scales) if bf16 else scales.astype(np.float32)
    # a scale that is 0 leaves only the zero code; dividing by 1 gives it without a special case
    divisor = np.where(step > 0, step, np.float32(1))
    if not symmetric:
        zeros = np.clip(np.rint(-low / divisor), 0, TOP[kind]).astype(np.uint8)
    steps = np.rint(blocks / divisor[..., None]) * (step > 0)[..., None]
    middle = np.float32(ZERO[kind]) if zeros is None else zeros[..., None].astype(np.float32)
    codes = np.clip(steps + middle, 0, TOP[kind]).astype(np.uint8)
    codes = codes.reshape(len(weight), -1)[:, : weight.shape[1]]
    return QuantizedLinear(kind, np.ascontiguousarray(codes), scales, zeros, group)


def _ternary_scale(blocks: np.ndarray, columns: int) -> np.ndarray:
    """mean|w| of each group, or s itself where the group holds nothing but -s, 0 and +s."""
    size = np.abs(blocks)
    peak = size.max(-1)
    exact = ((size == 0) | (size == peak[..., None])).all(-1)
    group = blocks.shape[2]
    counts = np.minimum(group, columns - np.arange(blocks.shape[1]) * group)
    mean = size.sum(-1, dtype=np.float64) / counts
    return np.where(exact, peak, mean.astype(np.float32))


def _grouped(weight: np.ndarray, group: int) -> np.ndarray:
    """(N, K) -> (N, groups, group), filled up with 0."""
    missing = -weight.shape[1] % group
    padded = np.pad(weight, ((0, 0), (0, missing))) if missing else weight
    return padded.reshape(len(weight), -1, group)


def _spread(per_group: np.ndarray, group: int, columns: int) -> np.ndarray:
    """(N, groups) -> (N, K): each group's value under each of its columns."""
    return np.repeat(per_group, group, axis=1)[:, :columns]


def _to_half(values: np.ndarray) -> np.ndarray:
    if values.size and values.max() > np.finfo(np.float16).max:
        raise UserError(
            f"a scale of {values.max():g} is beyond float16: store bfloat16 scales instead"
        )
    return values.astype(np.float16)


def pack_bits(codes: np.ndarray, kind: str, group: int) -> np.ndarray:
    """Codes (N, K) uint8 -> bytes (N, padded K * bits / 8), K filled up to whole groups."""
    per_byte = 8 // BITS[kind]
    missing = -codes.shape[1] % group
    padded = np.pad(codes, ((0, 0), (0, missing)), constant_values=ZERO[kind])
    if padded.shape[1] % per_byte:
        raise UserError(f"group size {group} does not fill bytes of {per_byte} {kind} codes")
    packed = padded[:, ::per_byte].copy()
    for place in range(1, per_byte):
        packed |= padded[:, place::per_byte] << np.uint8(place * BITS[kind])
    return packed


def unpack_bits(packed: np.ndarray, kind: str, columns: int) -> np.ndarray:
    """Bytes (N, any) -> the first `columns` codes of each row, (N, columns) uint8."""
    bits, per_byte = BITS[kind], 8 // BITS[kind]
    codes = np.empty((len(packed), packed.shape[1] * per_byte), np.uint8)
    for place in range(per_byte):
        codes[:, place::per_byte] = packed >> np.uint8(place * bits) & np.uint8((1 << bits) - 1)
    codes = codes[:, :columns]
    if codes.size and codes.max() > TOP[kind]:
        raise UserError(f"{kind} codes hold {codes.max()}, only 0 .. {TOP[kind]} have a meaning")
    return np.ascontiguousarray(codes)


def stored_names(name: str) -> dict[str, str]:
    """Part -> tensor name of the linear `name` (without ".weight")."""
    return {part: f"{name}.{part}" for part in ("codes", "scales", "zeros")}


def to_arrays(name: str, linear: QuantizedLinear) -> dict[str, np.ndarray]:
    """What is written for one linear, by tensor name; bfloat16 scales stay uint16 bits."""
    names = stored_names(name)
    codes = pack_bits(linear.codes, linear.kind, linear.group)
    arrays = {names["codes"]: codes, names["scales"]: linear.scales}
    return arrays if linear.zeros is None else {**arrays, names["zeros"]: linear.zeros}


def from_arrays(
    name: str, arrays: Mapping[str, np.ndarray], scheme: Scheme, columns: int
) -> QuantizedLinear:
    """The linear that `to_arrays` wrote; `columns` is K, which padding may have hidden."""
    names = stored_names(name)
    packed, scales = arrays[names["codes"]], arrays[names["scales"]]
    zeros = None if scheme.symmetric else arrays[names["zeros"]]
    groups = -(-columns // scheme.group)
    width = groups * scheme.group * BITS[scheme.kind] // 8
    wanted = {"codes": (len(packed), width), "scales": (len(packed), groups)}
    for part, array in (("codes", packed), ("scales", scales), ("zeros", zeros)):
        shape = wanted.get(part, wanted["scales"])
        if array is not None and array.shape != shape:
            raise UserError(f"tensor {names[part]} is {array.shape}, its scheme asks for {shape}")
    codes = unpack_bits(packed, scheme.kind, columns)
    return QuantizedLinear(scheme.kind, codes, scales, zeros, scheme.group)


def bf16_to_float(bits: np.ndarray) -> np.ndarray:
    """Bits of bfloat16 (uint16) -> float32, exact."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float_to_bf16(values: np.ndarray) -> np.ndarray:
    """float32 -> the nearest bfloat16 as uint16 bits, ties to even; finite values only."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)))
            >> np.uint32(16)).astype(np.uint16)  # fmt: skip
