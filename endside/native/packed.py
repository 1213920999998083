"""Weights in few bits, laid out for the core: packing, unpacking, one product.

A `Packed` is a matrix W (N, K) as the kernels read it: flat buffers of codes, group scales and
group zeros, in blocks of 8 rows (the layout stands in src/linear.h and is the same for every
instruction set, so packed buffers can be kept in a file and moved between machines). The buffers
may be views of a mapped file, as long as each starts at a multiple of 64 bytes.

numpy has no bfloat16: arrays of uint16 hold its bits, everywhere here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from endside import native
from endside.errors import UserError
from endside.native.memory import zeroed

Kind = Literal["f32", "bf16", "int8", "int4", "ternary2", "ternary3"]
ScaleType = Literal["f16", "bf16"]
Then = Literal["store", "add", "silu_mul"]

# Positions are the core's numbers.
KINDS = ("f32", "bf16", "int8", "int4", "ternary2", "ternary3")
SCALE_TYPES = ("f16", "bf16")
THEN = ("store", "add", "silu_mul")
# How the core calls what is packed: the name of an array's type -> its number.
SOURCES = {"float32": 0, "uint16": 1, "float16": 2}


def aligned(count: int, dtype: type = np.uint8) -> np.ndarray:
    """Zeroed (count,) that starts at a multiple of 64 bytes; pages cost nothing until written."""
    return zeroed(count * np.dtype(dtype).itemsize).view(dtype)


@dataclass(frozen=True)
class Packed:
    """W (N, K) packed; without buffers it only says how large they would be."""

    kind: Kind
    n: int
    k: int
    group: int = 0  # weights of a row that share a scale: 32, 64 or 128; 0 for f32 and bf16
    asymmetric: bool = False
    scale_type: ScaleType = "f16"
    codes: np.ndarray | None = None  # uint8, flat
    scales: np.ndarray | None = None  # uint16 (bits of scale_type), flat
    zeros: np.ndarray | None = None  # uint8, flat; only when asymmetric

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.scale_type not in SCALE_TYPES:
            raise UserError(
                f"packed weight is {self.kind!r} with {self.scale_type!r} scales: "
                f"use one of {', '.join(KINDS)} with one of {', '.join(SCALE_TYPES)}"
            )
        if self.kind in ("f32", "bf16") and (self.group or self.asymmetric):
            raise UserError(f"packed weight is {self.kind}, which has no groups: leave group at 0")

    @property
    def parts(self) -> tuple:
        """What the core is given."""
        kind, scale_type = KINDS.index(self.kind), SCALE_TYPES.index(self.scale_type)
        sizes = (kind, self.n, self.k, self.group, self.asymmetric, scale_type)
        return (*sizes, self.codes, self.scales, self.zeros)

    def sizes(self) -> tuple[int, int, int]:
        """Bytes of codes, scales and zeros."""
        return native.call("packed_sizes", self.parts)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers: what a product reads."""
        return sum(self.sizes())

    def allocate(self) -> Packed:
        """The same with zeroed buffers, beside those of other matrices (`memory`)."""
        codes, scales, zeros = self.sizes()
        return replace(
            self,
            codes=zeroed(codes),
            scales=zeroed(scales).view(np.uint16) if scales else None,
            zeros=zeroed(zeros) if zeros else None,
        )

    def write(self, weight: np.ndarray, row: int = 0) -> None:
        """Rounds weight (rows, K), float32, float16 or uint16, into rows `row` .. (blocks of 8)."""
        source = SOURCES.get(str(weight.dtype))
        if source is None:
            raise UserError(
                f"weight is {weight.dtype}: give float32, float16, or uint16 holding bfloat16"
            )
        words = np.ascontiguousarray(weight)
        native.call(
            "pack_float", self.parts, words if source == 0 else words.view(np.uint16), source, row
        )

    def write_codes(
        self, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, row: int = 0
    ) -> None:
        """Stores what a quantizer chose: codes (rows, K), scales and zeros (rows, K / group)."""
        native.call(
            "pack_codes",
            self.parts,
            np.ascontiguousarray(codes),
            np.ascontiguousarray(scales).view(np.uint16),
            None if zeros is None else np.ascontiguousarray(zeros),
            row,
        )

    def unpack(self, first: int = 0, rows: int | None = None) -> np.ndarray:
        """Rows first .. first + rows (to the end by default) as float32 (rows, K)."""
        out = np.empty((self.n - first if rows is None else rows, self.k), np.float32)
        native.call("unpack_rows", self.parts, first, out)
        return out

    def unpack_row(self, row: int) -> np.ndarray:
        """One row as float32 (K)."""
        return self.unpack(row, 1)[0]


def pack(
    weight: np.ndarray,
    kind: Kind,
    *,
    group: int = 128,
    asymmetric: bool = False,
    scale_type: ScaleType = "f16",
) -> Packed:
    """weight (N, K), rounded to nearest within groups of a row -> Packed."""
    n, k = weight.shape
    plain = kind in ("f32", "bf16")
    packed = Packed(kind, n, k, 0 if plain else group, asymmetric, scale_type).allocate()
    packed.write(weight)
    return packed


def from_codes(
    codes: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray | None,
    kind: Kind,
    *,
    group: int,
    scale_type: ScaleType = "f16",
) -> Packed:
    """codes uint8 (N, K), scales (N, K / group), zeros alike or None -> Packed, exactly these."""
    n, k = codes.shape
    packed = Packed(kind, n, k, group, zeros is not None, scale_type).allocate()
    packed.write_codes(codes, scales, zeros)
    return packed


def interleave(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """gate, up (F, ...) -> (2F, ...): eight rows of gate, eight of up, and so on; F % 8 == 0.

    So one pass over the matrix has both halves of silu(gate) * up at hand. Weights, codes, scales
    and zeros are all interleaved this way.
    """
    if gate.shape != up.shape or gate.shape[0] % 8:
        raise UserError(
            f"gate is {gate.shape} and up {up.shape}: the native core needs both alike, with a "
            "multiple of 8 rows"
        )
    blocks = (gate.shape[0] // 8, 8, *gate.shape[1:])
    both = np.stack([gate.reshape(blocks), up.reshape(blocks)], axis=1)
    return both.reshape(2 * gate.shape[0], *gate.shape[1:])


def linear(
    x: np.ndarray,
    packed: Packed,
    *,
    norm: tuple[np.ndarray, float] | None = None,
    then: Then = "store",
    alpha: float = 1.0,
    out: np.ndarray | None = None,
    threads: int = 1,
    isa: str = "auto",
) -> np.ndarray:
    """x (P, K) float32 -> (P, N): RMSNorm by `norm` (weight, eps) if given, quantization, product.

    then: "store" alpha * y; "add" out += alpha * y; "silu_mul" (P, N / 2), for `interleave`.
    """
    if out is None:
        columns = packed.n // 2 if then == "silu_mul" else packed.n
        out = np.zeros((x.shape[0], columns), np.float32)
    weight, eps = norm or (None, 0.0)
    native.call("linear", packed.parts, x, weight, eps, THEN.index(then), alpha, out, threads, isa)
    return out
