"""Low-bit matrices for a target format: the codes a source has, or the nearest ones.

Three rules. Codes that the target can hold are kept as they are, whatever the source calls them
(ternary codes are int4 codes, a large group is several small ones with one scale). Rounding is done
where the user named a type to round to. Everything else is refused with the reason: a matrix is
made ternary only if it is ternary already, and act-order is given up only for a type that is named.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from endside.errors import UserError
from endside.formats.bitcpm import to_ternary
from endside.formats.gguf_types import PLAIN, TYPES, encode_codes, encode_floats
from endside.formats.weights import Permuted, Source, Value, is_linear, to_float
from endside.quant.pack import (
    ZERO,
    QuantizedLinear,
    Scheme,
    bf16_to_float,
    float_to_bf16,
    round_to_nearest,
)

TERNARY = ("TQ1_0", "TQ2_0", "Q2_0")


@dataclass(frozen=True)
class Survey:
    """What all low-bit linears of a source have in common."""

    scheme: Scheme
    scales: str  # F16 or BF16
    permuted: bool  # some have act-order


def linears(source: Source) -> list[str]:
    """The parameters that are stored in low bits."""
    return [name for name in source.parameters if is_linear(name)]


def survey(source: Source) -> Survey | None:
    """Read every linear once. None when they are not all in low bits of one kind and group."""
    found: set[tuple[str, int, bool]] = set()
    symmetric, permuted = True, False
    for name in linears(source):
        value = source.parameters[name].read()
        if isinstance(value, np.ndarray):
            return None
        inner = value.linear if isinstance(value, Permuted) else value
        found.add((inner.kind, inner.group, inner.bf16))
        symmetric, permuted = symmetric and inner.symmetric, permuted or inner is not value
    if len(found) != 1:
        return None
    kind, group, bf16 = found.pop()
    return Survey(Scheme(kind, group, symmetric), "BF16" if bf16 else "F16", permuted)


def ternary_survey(source: Source) -> Survey:
    """The scheme of a source whose linears are all ternary, in whatever form; else UserError."""
    groups, bf16 = set(), set()
    for name in linears(source):
        linear = to_ternary(source.parameters[name].read())
        if linear is None:
            raise UserError(
                f"{name} of {source.place} is not ternary (|w| differs inside every group), and "
                "rounding a model that was not trained for it destroys it: train it with "
                "`endside qat`, or take int4"
            )
        groups.add(linear.group)
        bf16.add(linear.bf16)
    group = min(groups)
    if any(one % group for one in groups) or len(bf16) > 1:
        raise UserError(f"the linears of {source.place} have groups of {sorted(groups)}: "
                        "no single group size holds them all")  # fmt: skip
    return Survey(Scheme("ternary", group), "BF16" if bf16.pop() else "F16", False)


def to_scheme(
    value: Value, scheme: Scheme, scales: str, *, permuted: bool = False
) -> QuantizedLinear | Permuted:
    """The value in `scheme`, scales F16 or BF16: its own codes where they fit, else the nearest.

    permuted: act-order may stay (the target has a place for it).
    """
    if scheme.kind == "ternary":
        linear = to_ternary(value, scheme.group)
        if linear is None:
            raise UserError("a matrix is not ternary in these groups: name another type")
        return linear
    inner = value.linear if isinstance(value, Permuted) and permuted else value
    kept = _keep(inner, scheme, scales) if isinstance(inner, QuantizedLinear) else None
    if kept is None:
        return round_to_nearest(
            to_float(value), scheme.kind, scheme.group,
            symmetric=scheme.symmetric, bf16=scales == "BF16",
        )  # fmt: skip
    return Permuted(kept, value.order) if isinstance(value, Permuted) else kept


def _keep(linear: QuantizedLinear, scheme: Scheme, scales_type: str) -> QuantizedLinear | None:
    """The same numbers in the scheme; None where it cannot hold them."""
    codes, zeros, scales = linear.codes, linear.zeros, linear.scales
    if linear.kind == "ternary" and scheme.kind == "int4":
        codes = codes + np.uint8(ZERO["int4"] - ZERO["ternary"])
    elif linear.kind != scheme.kind:
        return None
    if scheme.symmetric and zeros is not None:
        return None
    if linear.bf16 != (scales_type == "BF16"):
        wanted = linear.scales_float()
        scales = float_to_bf16(wanted) if scales_type == "BF16" else wanted.astype(np.float16)
        again = bf16_to_float(scales) if scales_type == "BF16" else scales.astype(np.float32)
        if not np.array_equal(again, wanted):
            return None
    if linear.group != scheme.group:
        repeat, rest = divmod(linear.group, scheme.group)
        if rest or linear.shape[1] % linear.group:
            return None
        scales = np.repeat(scales, repeat, axis=1)
        zeros = None if zeros is None else np.repeat(zeros, repeat, axis=1)
    if not scheme.symmetric and zeros is None:
        zeros = np.full(scales.shape, ZERO[scheme.kind], np.uint8)
    return QuantizedLinear(scheme.kind, codes, scales, zeros, scheme.group)


def gguf_bytes(name: str, value: Value, kind: str, *, exact: bool) -> np.ndarray:
    """The bytes of a parameter in a GGUF type. exact: nobody asked for rounding, so refuse it."""
    if kind in PLAIN:
        return encode_floats(to_float(value), kind)
    raw = encode_codes(value, kind) if isinstance(value, QuantizedLinear) else None
    if raw is None:
        ternary = to_ternary(value)
        raw = None if ternary is None else encode_codes(ternary, kind)
    if raw is not None:
        return raw
    if kind in TERNARY:
        raise UserError(_why_not(name, value, kind))
    if exact:
        raise UserError(
            f"{name} cannot be kept exactly in {kind}: name a type to round to, such as "
            "--type q8_0, or --type f16 which changes less"
        )
    return encode_floats(to_float(value), kind)


def _why_not(name: str, value: Value, kind: str) -> str:
    """Why a matrix does not fit a ternary type, and what would."""
    ternary = to_ternary(value)
    size = TYPES[kind].block
    if ternary is None:
        return (
            f"{name} is not ternary, and rounding it to {kind} would destroy it: train it with "
            "`endside qat`, or use --type q4_0"
        )
    return (
        f"{name} is ternary in groups of {ternary.group} columns, but {kind} has one scale for "
        f"{size}: nothing smaller than --type q2_0 (groups of 64) or --type q4_0 (32, four bits) "
        "keeps it exactly"
    )


def fits_gguf(source: Source, names: Iterable[str], kind: str) -> bool:
    """Whether every matrix of the names is kept exactly by a block type."""
    for name in names:
        value = source.parameters[name].read()
        if not isinstance(value, QuantizedLinear) or encode_codes(value, kind) is None:
            return False
    return True
