"""AutoGPTQ's layout of int4 and int8 linears, in both directions.

For a linear of K inputs and N outputs with groups of g inputs (formats §3.1; the layout that
transformers, vLLM, GPTQModel and AutoGPTQ share):

    qweight int32 (K b / 32, N)   the codes of 32 / b neighbours along K, lowest bits first
    qzeros  int32 (K / g, N b / 32)   the same along N; "gptq" stores zero - 1, "gptq_v2" zero
    scales  float16 (K / g, N)    g_idx int32 (K,)  the group of each input
    w[n, k] = scales[g_idx[k], n] * (code - zero)

g_idx counts up in steps of g, unless act-order sorted the inputs by importance: then the matrix
with its columns in group order is the canonical form, and the order is kept beside it (`Permuted`).
An engine that wants neighbours in a group must requantize, which is never done silently.

A version 1 zero of 0 was stored as -1, that is all ones: adding 1 wraps around to 0 again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from endside.checkpoint import write_folder
from endside.errors import UserError
from endside.formats.hf_config import config_to_hf, hf_name, json_bytes, point_to_code
from endside.formats.weights import SAFE, Part, Permuted, Source, Value, is_linear
from endside.quant.pack import ZERO, QuantizedLinear, Scheme
from endside.shards import TensorSource

KINDS = {4: "int4", 8: "int8"}
SCALES = ("F16", "BF16")


@dataclass(frozen=True)
class Gptq:
    """The layout of a folder with `quant_method` "gptq"."""

    bits: int
    group: int  # -1: one group over all inputs
    version: int  # 1 stores zero - 1
    scale_type: str = "F16"
    symmetric: bool = True  # said in config.json; reading looks at the zeros
    act_order: bool = False  # said likewise
    name: str = "gptq"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Gptq:
        """Read quantization_config; UserError names what is not supported."""
        bits, group = config.get("bits"), config.get("group_size", 128)
        form = config.get("checkpoint_format") or "gptq"
        if bits not in KINDS:
            raise UserError(
                f"config.json quantization_config.bits is {bits!r}: GPTQ is read with 4 or 8 bits"
            )
        if type(group) is not int or not (group == -1 or 1 <= group <= 1 << 20):
            raise UserError(
                f"config.json quantization_config.group_size is {group!r}: use 1 .. 2^20"
            )
        if form not in ("gptq", "gptq_v2"):
            raise UserError(
                f"config.json quantization_config.checkpoint_format is {form!r}: gptq and gptq_v2 "
                "are read; export the model in one of them"
            )
        symmetric = config.get("sym") is not False
        return cls(bits, group, 2 if form == "gptq_v2" else 1, symmetric=symmetric)

    def group_of(self, columns: int) -> int:
        """The group size for K inputs."""
        return columns if self.group == -1 else self.group

    def parts(self, base: str, shape: tuple[int, int]) -> dict[str, Part]:
        """The four tensors; g_idx may be missing."""
        rows, columns = shape
        per = 32 // self.bits
        if rows % per or columns % per:
            raise UserError(
                f"linear {base} is {rows} x {columns}, which {self.bits}-bit GPTQ cannot pack: "
                f"both must be multiples of {per}"
            )
        groups = -(-columns // self.group_of(columns))
        return {
            f"{base}.qweight": (("I32",), (columns // per, rows)),
            f"{base}.qzeros": (("I32",), (groups, rows // per)),
            f"{base}.scales": (SCALES, (groups, rows)),
            f"{base}.g_idx?": (("I32", "I64"), (columns,)),
        }

    def scheme_of(self, base: str, columns: int) -> Scheme:
        """As config.json says it."""
        return Scheme(KINDS[self.bits], self.group_of(columns), self.symmetric)

    def read(self, arrays: Mapping[str, np.ndarray], base: str, shape: tuple[int, int]) -> Value:
        """The linear; its columns permuted where g_idx says so."""
        columns = shape[1]
        group = self.group_of(columns)
        codes = unpack_words(arrays[f"{base}.qweight"].T, self.bits)
        zeros = unpack_words(arrays[f"{base}.qzeros"], self.bits).T
        if self.version == 1:
            zeros = zeros + np.uint8(1) & np.uint8((1 << self.bits) - 1)
        kind = KINDS[self.bits]
        symmetric = bool((zeros == ZERO[kind]).all())
        scales = np.ascontiguousarray(arrays[f"{base}.scales"].T)
        check_finite(scales, f"{base}.scales")
        order = None
        if f"{base}.g_idx" in arrays:
            order = _order(arrays[f"{base}.g_idx"], group, base)
        if order is not None:
            codes = codes[:, order]
        linear = QuantizedLinear(
            kind, np.ascontiguousarray(codes), scales,
            None if symmetric else np.ascontiguousarray(zeros), group,
        )  # fmt: skip
        return linear if order is None else Permuted(linear, order)

    def write(self, value: QuantizedLinear | Permuted, base: str) -> dict[str, np.ndarray]:
        """The four tensors of a linear."""
        order = value.order if isinstance(value, Permuted) else None
        linear = value.linear if isinstance(value, Permuted) else value
        index = np.arange(linear.shape[1], dtype=np.int32) // np.int32(linear.group)
        codes = linear.codes
        if order is not None:
            codes, index = np.empty_like(codes), index.copy()
            codes[:, order] = linear.codes
            index[order] = np.arange(len(order), dtype=np.int32) // np.int32(linear.group)
        zeros = linear.zeros
        if zeros is None:
            zeros = np.full(linear.scales.shape, ZERO[linear.kind], np.uint8)
        if self.version == 1:
            zeros = zeros - np.uint8(1) & np.uint8((1 << self.bits) - 1)
        return {
            f"{base}.qweight": np.ascontiguousarray(pack_words(codes, self.bits).T),
            f"{base}.qzeros": pack_words(np.ascontiguousarray(zeros.T), self.bits),
            f"{base}.scales": np.ascontiguousarray(linear.scales.T),
            f"{base}.g_idx": index,
        }


def unpack_words(words: np.ndarray, bits: int) -> np.ndarray:
    """int32 (R, W) -> codes (R, 32 W / bits) uint8, lowest bits first."""
    raw = np.ascontiguousarray(words).view(np.uint8)  # little-endian bytes
    if bits == 8:
        return raw
    codes = np.empty((len(raw), raw.shape[1] * 2), np.uint8)
    codes[:, 0::2] = raw & np.uint8(15)
    codes[:, 1::2] = raw >> np.uint8(4)
    return codes


def pack_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes (R, 32 W / bits) uint8 -> int32 (R, W)."""
    raw = codes if bits == 8 else codes[:, 0::2] | codes[:, 1::2] << np.uint8(4)
    return np.ascontiguousarray(raw).view("<i4")


def _order(index: np.ndarray, group: int, base: str) -> np.ndarray | None:
    """The permutation that sorts inputs by group; None when they are sorted already."""
    plain = np.arange(len(index)) // group
    if np.array_equal(index, plain):
        return None
    order = np.argsort(index, kind="stable")
    if not np.array_equal(index[order], plain):
        raise UserError(
            f"tensor {base}.g_idx does not give each group its {group} inputs: "
            "the file is damaged, get it again"
        )
    return order


def check_finite(scales: np.ndarray, name: str) -> None:
    """Refuse infinite and undefined scales (float16, or bfloat16 bits)."""
    exponent = 0x7F80 if scales.dtype == np.uint16 else 0x7C00
    if (scales.view(np.uint16) & exponent == exponent).any():
        raise UserError(f"tensor {name} holds an infinite scale: the file is damaged, get it again")


def save_gptq(
    source: Source,
    dst: str | Path,
    layout: Gptq,
    quantize: Callable[[str], Value],
    *,
    plain: Callable[[str], np.ndarray],
    dtypes: Mapping[str, str],
    overwrite: bool = False,
) -> Path:
    """Write a folder that transformers, vLLM and AutoGPTQ load.

    quantize(our name) gives a linear that fits `layout`, plain(name) the rest in `dtype`. Each
    linear is asked for four times, once per tensor.
    """  # fmt: skip
    tensors: dict[str, TensorSource] = {}
    for name, parameter in source.parameters.items():
        if not is_linear(name):
            read = lambda name=name: plain(name)
            tensors[hf_name(name)] = TensorSource(SAFE[dtypes[name]], parameter.shape, read)
            continue
        base = hf_name(name).removesuffix(".weight")
        shape = (parameter.shape[0], parameter.shape[1])
        for part, (kinds, size) in layout.parts(base, shape).items():
            part = part.removesuffix("?")
            read = lambda name=name, base=base, part=part: layout.write(quantize(name), base)[part]
            kind = layout.scale_type if kinds == SCALES else "I32"
            tensors[part] = TensorSource(kind, size, read)
    config = config_to_hf(source.config, source.raw or None, dtype=dtypes["embed_tokens.weight"])
    config["quantization_config"] = {
        "quant_method": "gptq", "bits": layout.bits, "group_size": layout.group,
        "desc_act": layout.act_order, "sym": layout.symmetric,
        "static_groups": False, "lm_head": False,
        "true_sequential": True, "damp_percent": 0.01,
        "checkpoint_format": "gptq" if layout.version == 1 else "gptq_v2",
    }  # fmt: skip
    config = point_to_code(config, set(source.files))
    block = {key: value for key, value in config["quantization_config"].items()
             if key != "quant_method"}  # fmt: skip
    files = {
        "config.json": json_bytes(config),
        # read by AutoGPTQ and older vLLM instead of config.json
        "quantize_config.json": json_bytes(block),
        **source.files,
    }
    return write_folder(dst, tensors, files, overwrite=overwrite)
