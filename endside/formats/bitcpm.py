"""BitCPM checkpoints: ternary weights stored as ordinary bfloat16, found and packed without loss.

Quantization-aware training writes w = s t with t in {-1, 0, +1} and one s per row and group, so a
file of plain weights is ternary when |w| is constant wherever it is not zero, group by group. The
group size is not in the file: it is the largest one for which that holds in every row of a matrix.
Sizes of 256 and more are then stored as groups of 128 with equal scales, which kernels can hold.

Scales keep the type of the weights, so packed and unpacked weights are equal to the last bit, with
one exception: a negative zero (a small negative weight times s, rounded) becomes zero.

What we chose not to do: call a matrix ternary that is merely close to it. One odd weight, and it is
a plain matrix; rounding it would be a loss that somebody else has to ask for.
"""

from __future__ import annotations

import numpy as np

from endside.formats.weights import Permuted, Value, to_float
from endside.quant.pack import QuantizedLinear, bf16_to_float, float_to_bf16

SIZES = (1 << 14, 8192, 4096, 2048, 1024, 512, 256, 128, 64, 32, 16)
KEPT = 128  # larger groups are stored as several of this size
PROBE = 64  # rows looked at before all of them are


def detect(weight: np.ndarray) -> int | None:
    """The group size of ternary weights (N, K), None when they are not ternary.

    weight: float32 or float16, or uint16 bits of bfloat16. One scale for a whole row gives K.
    """
    size = np.abs(bf16_to_float(weight) if weight.dtype == np.uint16 else weight)
    columns = size.shape[1]
    candidates = [columns, *(group for group in SIZES if group < columns and columns % group == 0)]
    for group in candidates:
        if _constant(size[:PROBE], group) and _constant(size, group):
            return group
    return None


def _constant(size: np.ndarray, group: int) -> bool:
    """Whether each group of |w| (N, K) holds one value beside zero."""
    blocks = size.reshape(len(size), -1, group)
    peak = blocks.max(-1, keepdims=True)
    return bool(np.isfinite(peak).all() and ((blocks == 0) | (blocks == peak)).all())


def to_ternary(value: Value, group: int | None = None) -> QuantizedLinear | None:
    """The matrix as ternary codes when it is exactly that, else None; group: the size to store.

    Values in low bits are looked at through their weights, so int4 that uses three levels counts.
    """
    if isinstance(value, QuantizedLinear) and value.kind == "ternary" and group is None:
        return value
    weight = value if isinstance(value, np.ndarray) else to_float(value)
    found = detect(weight)
    if found is None:
        return None
    wanted = group or (KEPT if found > KEPT and found % KEPT == 0 else found)
    if found % wanted:
        return None
    scales_bf16 = weight.dtype == np.uint16 or (
        isinstance(value, QuantizedLinear | Permuted) and _is_bf16(value)
    )
    return _pack(to_float(weight), wanted, scales_bf16)


def _is_bf16(value: QuantizedLinear | Permuted) -> bool:
    return (value.linear if isinstance(value, Permuted) else value).bf16


def _pack(weight: np.ndarray, group: int, bf16: bool) -> QuantizedLinear | None:
    """Codes of weights that are ternary in groups; None when 16 bits cannot hold a scale."""
    blocks = weight.reshape(len(weight), -1, group)
    peak = np.abs(blocks).max(-1).astype(np.float32)
    scales = float_to_bf16(peak) if bf16 else peak.astype(np.float16)
    linear = QuantizedLinear("ternary", (np.sign(weight) + 1).astype(np.uint8), scales, None, group)
    return linear if np.array_equal(linear.scales_float(), peak) else None
