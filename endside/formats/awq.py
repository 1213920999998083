"""AutoAWQ's GEMM layout of int4 linears, read.

    qweight int32 (K, N / 8)   eight outputs of one input; nibble i holds output 8 c + ORDER[i]
    qzeros  int32 (K / g, N / 8)   packed the same way, the zero itself
    scales  float16 (K / g, N)
    w[n, k] = scales[k // g, n] * (code - zero)

The order and the absence of GPTQ's "minus one" are as in AutoAWQ's packing_utils and its GEMM
linear; many engines carry copies of the same table. AWQ's smoothing is folded into the neighbouring
tensors by whoever quantized, so nothing is left to undo. The GEMV layouts differ and are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from endside.errors import UserError
from endside.formats.gptq import SCALES, check_finite, unpack_words
from endside.formats.weights import Part, Value
from endside.quant.pack import ZERO, QuantizedLinear, Scheme

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Awq:
    """The layout of a folder with `quant_method` "awq"."""

    group: int  # -1: one group over all inputs
    name: str = "awq"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Awq:
        """Read quantization_config, in AutoAWQ's or transformers' spelling."""
        bits = config.get("bits", config.get("w_bit"))
        group = config.get("group_size", config.get("q_group_size", 128))
        version = str(config.get("version", "gemm")).lower()
        if bits != 4:
            raise UserError(f"config.json quantization_config.bits is {bits!r}: AWQ has 4 bits")
        if type(group) is not int or not (group == -1 or 1 <= group <= 1 << 20):
            raise UserError(
                f"config.json quantization_config.group_size is {group!r}: it must be a positive "
                "whole number, or -1"
            )
        if version != "gemm":
            raise UserError(
                f"config.json quantization_config.version is {version!r}: only AWQ's gemm layout "
                "is read; export the model in it"
            )
        return cls(group)

    def parts(self, base: str, shape: tuple[int, int]) -> dict[str, Part]:
        """The three tensors."""
        rows, columns = shape
        group = columns if self.group == -1 else self.group
        if rows % 8 or columns % group:
            raise UserError(
                f"linear {base} is {rows} x {columns}, which AWQ cannot pack: outputs must be a "
                f"multiple of 8 and inputs of the group {group}"
            )
        return {
            f"{base}.qweight": (("I32",), (columns, rows // 8)),
            f"{base}.qzeros": (("I32",), (columns // group, rows // 8)),
            f"{base}.scales": (SCALES, (columns // group, rows)),
        }

    def scheme_of(self, base: str, columns: int) -> Scheme:
        """AWQ has zeros of its own."""
        return Scheme("int4", columns if self.group == -1 else self.group, symmetric=False)

    def read(self, arrays: Mapping[str, np.ndarray], base: str, shape: tuple[int, int]) -> Value:
        """The linear."""
        codes = _unpack(arrays[f"{base}.qweight"]).T
        zeros = _unpack(arrays[f"{base}.qzeros"]).T
        scales = np.ascontiguousarray(arrays[f"{base}.scales"].T)
        check_finite(scales, f"{base}.scales")
        symmetric = bool((zeros == ZERO["int4"]).all())
        return QuantizedLinear(
            "int4", np.ascontiguousarray(codes), scales,
            None if symmetric else np.ascontiguousarray(zeros),
            shape[1] if self.group == -1 else self.group,
        )  # fmt: skip


def _unpack(words: np.ndarray) -> np.ndarray:
    """int32 (R, N / 8) -> (R, N) uint8 in the order of the outputs."""
    nibbles = unpack_words(words, 4).reshape(len(words), -1, 8)
    codes = np.empty_like(nibbles)
    codes[:, :, ORDER] = nibbles
    return codes.reshape(len(words), -1)
