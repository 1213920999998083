"""`endside convert SRC DST --to hf|llama|gptq|gguf|endside`: from one format to another.

hf       the original's layout, plain weights; its config.json with all foreign keys kept
llama    muP scales folded into the weights, for any Llama implementation
endside  our own: low bits with --type (quant/pack.py), else plain under a config.json that holds
         only what endside reads
gptq     int4 or int8 as AutoGPTQ lays it out, for transformers and vLLM
gguf     one file for llama.cpp

The source may be any of these, AWQ, or CPM.cu's Marlin files. Without --type nothing is rounded:
codes and floats are kept as they are or the conversion is refused with the reason. Weights pass
through one tensor at a time, the destination appears whole or not at all, and what was written is
read back to report the error that was introduced.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from endside.checkpoint import Checkpoint
from endside.errors import UserError
from endside.formats.gguf import exact_kind, save_gguf
from endside.formats.gguf_types import PLAIN, TYPES
from endside.formats.gptq import Gptq, save_gptq
from endside.formats.llama import factor
from endside.formats.loss import EMBEDDING, Loss, measure
from endside.formats.packed import save_packed
from endside.formats.plain import cast, save_plain
from endside.formats.requantize import (
    Survey,
    fits_gguf,
    gguf_bytes,
    linears,
    survey,
    ternary_survey,
    to_scheme,
)
from endside.formats.source import open_source
from endside.formats.weights import SAFE, Source, Value, is_linear
from endside.quant.pack import Scheme

Layout = Literal["hf", "llama", "gptq", "gguf", "endside"]
LAYOUTS = ("hf", "llama", "gptq", "gguf", "endside")
GGUF_TYPES = {one.lower(): one for one in TYPES if "/" not in one and not one.endswith("_K")}
TYPES_OF = {
    "hf": ("auto",),
    "llama": ("auto",),
    "gptq": ("auto", "int4", "int8"),
    "endside": ("auto", "int4", "int8", "ternary"),
    "gguf": ("auto", *GGUF_TYPES),
}
DTYPES = tuple(SAFE)
GROUP = 128


@dataclass(frozen=True)
class Wanted:
    """What is asked of a conversion."""

    to: str
    type: str = "auto"
    group: int | None = None  # of int4 and int8 that are rounded; None: kept, or 128
    dtype: str = "auto"  # of plain weights
    overwrite: bool = False


class TextKeys(Protocol):
    """Tokenizers in GGUF."""

    def to_keys(
        self, files: Mapping[str, bytes | Path], vocab_size: int
    ) -> tuple[dict[str, Any], list[str]]:
        """Tokenizer files -> tokenizer.* keys, and notes."""
        ...

    def from_keys(
        self, keys: Mapping[str, Any], place: Path
    ) -> tuple[dict[str, bytes | Path], list[str]]:
        """Keys -> tokenizer files, and notes."""
        ...


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion did."""

    source: Path
    destination: Path
    layout: str
    tensors: int  # written
    bytes: int  # of all files written
    dtype: str  # of plain weights, or the type of the linears
    ignored: tuple[str, ...]  # keys of the source's configuration that were not used
    copied: tuple[str, ...]  # files beside the weights
    notes: tuple[str, ...]  # what changed or was left out, one sentence each
    loss: Loss

    def __str__(self) -> str:
        lines = [
            f"wrote {self.destination} ({self.layout}): {self.tensors} tensors in {self.dtype}, "
            f"{self.bytes / 1e6:.1f} MB",
            str(self.loss),
            *self.notes,
        ]
        if self.copied:
            lines.append(f"copied: {', '.join(self.copied)}")
        if self.ignored:
            lines.append(f"keys of the source's configuration not used: {', '.join(self.ignored)}")
        return "\n".join(lines)


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    to: Layout,
    type: str = "auto",
    group: int | None = None,
    dtype: str = "auto",
    overwrite: bool = False,
    texts: TextKeys | None = None,
) -> ConvertReport:
    """Write SRC (folder, hub name or .gguf) to DST in another format; all or nothing.

    texts: turns tokenizer files into GGUF keys and back (`endside.gguf_tokenizer`); without it a
    tokenizer is not carried into or out of a GGUF.
    """
    wanted = Wanted(to, type, group, dtype, overwrite)
    _check(wanted)
    target = Path(dst).expanduser()
    source = open_source(src)
    notes: list[str] = []
    if texts is not None and source.layout == "gguf":
        files, notes = texts.from_keys(source.text, source.place)
        source = replace(source, files=files)
    if target.resolve() == source.place.resolve():
        raise UserError(f"DST {dst} is the source itself: give the name of a new folder")
    if to == "gguf" and target.suffix != ".gguf":
        raise UserError(f"DST {dst} must end in .gguf: GGUF is a single file")
    if to == "gguf":
        vocab = source.config.vocab_size
        text, more = texts.to_keys(source.files, vocab) if texts else ({}, ["no tokenizer in it"])
        source, notes = replace(source, text=text), notes + more
    writers = {"gguf": _to_gguf, "gptq": _to_gptq, "endside": _to_endside}
    plain = to in ("hf", "llama") or (to == "endside" and type == "auto" and source.layout == "hf")
    kind, more = (_to_plain if plain else writers[to])(source, target, wanted)
    return _report(source, target, wanted, kind, (*source.notes, *notes, *more))


def _check(wanted: Wanted) -> None:
    if wanted.to not in LAYOUTS:
        raise UserError(f"--to is {wanted.to!r}: use {', '.join(LAYOUTS)}")
    if wanted.type not in TYPES_OF[wanted.to]:
        raise UserError(
            f"--type is {wanted.type!r}: --to {wanted.to} takes {', '.join(TYPES_OF[wanted.to])}"
        )
    if wanted.dtype not in ("auto", *DTYPES):
        raise UserError(f"--dtype is {wanted.dtype!r}: use auto, {', '.join(DTYPES)}")
    if wanted.group is not None and not 4 <= wanted.group <= 1 << 16:
        raise UserError(f"--group is {wanted.group}: use 32, 64 or 128")


def _report(
    source: Source, target: Path, wanted: Wanted, kind: str, notes: tuple[str, ...]
) -> ConvertReport:
    written = open_source(target)
    files = [target] if target.is_file() else list(target.iterdir())
    folded = wanted.to == "llama"
    names = {file.name for file in files}
    return ConvertReport(
        source=source.place,
        destination=target,
        layout=wanted.to,
        tensors=len(Checkpoint.open(target, verify=False).tensors)
        if target.is_dir()
        else len(written.parameters),
        bytes=sum(file.stat().st_size for file in files),
        dtype=kind,
        ignored=source.ignored,
        copied=tuple(name for name in source.files if name in names),
        notes=notes,
        loss=measure(source, written, lambda name: factor(name, source.config) if folded else 1.0),
    )


def _plain_dtypes(source: Source, dtype: str, low: str) -> dict[str, str]:
    """config.json's name of the number format in which each parameter is written when plain.

    low: of what is in low bits now; float32 holds every code, GPTQ's readers expect halves.
    """
    stored = {kind: name for name, kind in SAFE.items()}
    return {
        name: dtype if dtype != "auto" else stored.get(parameter.stored, low)
        for name, parameter in source.parameters.items()
    }


def _to_plain(source: Source, target: Path, wanted: Wanted) -> tuple[str, list[str]]:
    """hf, llama, and our own layout without low bits."""
    low = source.parameters[linears(source)[0]].stored not in SAFE.values()
    dtype = wanted.dtype
    if low and dtype == "auto":
        dtype = _unpacked_dtype(source)
    return save_plain(source, target, to=wanted.to, dtype=dtype, overwrite=wanted.overwrite)


def _unpacked_dtype(source: Source) -> str:
    """What unpacked low-bit weights are written in: exact for ternary, else as the model ran."""
    found = survey(source)
    if found is not None and found.scheme.kind == "ternary":
        return "bfloat16" if found.scales == "BF16" else "float16"
    named = source.raw.get("dtype") or source.raw.get("torch_dtype")
    return named if named in DTYPES else "float16"


def _scheme(source: Source, wanted: Wanted) -> Survey:
    """The scheme of a low-bit target: the source's own, or the one that was named."""
    if wanted.type == "ternary":
        return ternary_survey(source)
    found = survey(source)
    asked = None if wanted.type == "auto" else wanted.type
    if found is None and asked is None:
        raise UserError(
            f"{source.place} is not in low bits throughout, so there are no codes to keep: name "
            "the type to round to, such as --type int4"
        )
    same = found is not None and asked in (None, found.scheme.kind)
    if same and wanted.group in (None, found.scheme.group):
        return found
    ternary = found is not None and found.scheme.kind == "ternary" and asked == "int4"
    group = wanted.group or (found.scheme.group if ternary and found else GROUP)
    return Survey(Scheme(asked or found.scheme.kind, group), "F16", False)


def _refuse_order(found: Survey, wanted: Wanted, source: Source) -> None:
    if found.permuted and wanted.type == "auto":
        raise UserError(
            f"{source.place} has act-order (columns sorted by importance), which --to {wanted.to} "
            "has no place for: name a type to round to, such as --type int4, or quantize the "
            "original without act-order"
        )


def _to_endside(source: Source, target: Path, wanted: Wanted) -> tuple[str, list[str]]:
    found = _scheme(source, wanted)
    _refuse_order(found, wanted, source)
    dtypes = _plain_dtypes(source, wanted.dtype, "float32")
    save_packed(
        source, target, found.scheme,
        lambda name: to_scheme(source.parameters[name].read(), found.scheme, found.scales),
        plain=lambda name: cast(source.parameters[name].read(), dtypes[name]),
        dtypes=dtypes, scales=found.scales, overwrite=wanted.overwrite,
    )  # fmt: skip
    return f"{found.scheme.kind}, groups of {found.scheme.group}", []


def _to_gptq(source: Source, target: Path, wanted: Wanted) -> tuple[str, list[str]]:
    found = _scheme(source, wanted)
    scheme, notes = found.scheme, []
    if scheme.kind == "ternary":
        scheme = Scheme("int4", scheme.group)
        notes.append("ternary codes are written as int4, which holds them exactly")
    if any(source.parameters[name].shape[1] % scheme.group for name in linears(source)):
        notes.append(f"some linears have a short last group, which vLLM refuses ({scheme.group})")
    layout = Gptq(
        {"int4": 4, "int8": 8}[scheme.kind], scheme.group, 1, found.scales,
        symmetric=scheme.symmetric, act_order=found.permuted,
    )  # fmt: skip
    dtypes = _plain_dtypes(source, wanted.dtype, "float16")
    save_gptq(
        source, target, layout,
        lambda name: to_scheme(
            source.parameters[name].read(), scheme, found.scales, permuted=found.permuted
        ),
        plain=lambda name: cast(source.parameters[name].read(), dtypes[name]),
        dtypes=dtypes, overwrite=wanted.overwrite,
    )  # fmt: skip
    return f"{scheme.kind}, groups of {scheme.group}", notes


def _to_gguf(source: Source, target: Path, wanted: Wanted) -> tuple[str, list[str]]:
    names, notes = linears(source), []
    kind = GGUF_TYPES.get(wanted.type) or _exact_gguf(source, wanted)
    kinds = {}
    for name, parameter in source.parameters.items():
        chosen = kind if is_linear(name) and kind else exact_kind(parameter)
        if not is_linear(name) and wanted.type in ("f32", "f16", "bf16", "q8_0", "q4_0"):
            # llama.cpp wants an embedding that is not coarser than eight bits
            chosen = kind if kind in PLAIN else "Q8_0"
        if len(parameter.shape) == 1:
            chosen = "F32"
        elif chosen not in PLAIN and parameter.shape[1] % TYPES[chosen].block:
            if wanted.type not in ("q8_0", "q4_0"):
                raise UserError(
                    f"{name} has {parameter.shape[1]} columns, no multiple of the "
                    f"{TYPES[chosen].block} that {chosen} needs: use --type q8_0, q4_0 or f16"
                )
            notes.append(f"{name} stays F16: its {parameter.shape[1]} columns divide in no blocks")
            chosen = "F16"
        kinds[name] = chosen

    def encode(name: str, value: Value) -> np.ndarray:
        return gguf_bytes(name, value, kinds[name], exact=wanted.type == "auto")

    notes += save_gguf(source, target, kinds, encode, text=source.text, overwrite=wanted.overwrite)
    return f"{kind or kinds[names[0]]} (embedding {kinds[EMBEDDING]})", notes


def _exact_gguf(source: Source, wanted: Wanted) -> str | None:
    """The type that keeps the linears' codes; None: they are plain and keep their own type."""
    found = survey(source)
    if found is None:
        return None
    _refuse_order(found, wanted, source)
    candidates = {"int8": ("Q8_0",), "int4": ("Q4_0",), "ternary": ("TQ2_0", "Q4_0")}
    for kind in candidates[found.scheme.kind]:
        if fits_gguf(source, linears(source), kind):
            return kind
    raise UserError(
        f"no GGUF type holds {found.scheme.kind} in groups of {found.scheme.group}"
        f"{'' if found.scheme.symmetric else ' with zeros of their own'} exactly: name a type to "
        "round to, such as --type q8_0"
    )
