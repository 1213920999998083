"""`endside convert SRC DST --to hf|llama|endside`: from one folder layout to another.

hf       the original's layout: its config.json with all foreign keys kept
llama    muP scales folded into the weights, for any Llama implementation
endside  the same tensors under a config.json that holds only what endside reads, defaults filled in

Weights are mapped and streamed: an 8B model passes through one tensor at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from endside.checkpoint import Checkpoint, resolve
from endside.errors import UserError
from endside.formats.hf import DTYPES, companions, dtype_name, load_checkpoint, save
from endside.formats.hf_config import config_from_hf
from endside.formats.llama import fold_config, save_llama
from endside.model.transformer import Transformer

Layout = Literal["hf", "llama", "endside"]


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion did."""

    source: Path
    destination: Path
    layout: str
    tensors: int  # written
    bytes: int  # of all files written
    dtype: str
    ignored: tuple[str, ...]  # keys of the source's config.json that were not used
    copied: tuple[str, ...]  # files beside the weights
    notes: tuple[str, ...]  # what changed or was left out, one sentence each

    def __str__(self) -> str:
        lines = [
            f"wrote {self.destination} ({self.layout}): {self.tensors} tensors in {self.dtype}, "
            f"{self.bytes / 1e6:.1f} MB",
            *self.notes,
        ]
        if self.copied:
            lines.append(f"copied: {', '.join(self.copied)}")
        if self.ignored:
            lines.append(f"keys of the source's config.json not used: {', '.join(self.ignored)}")
        return "\n".join(lines)


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    to: Layout,
    dtype: str = "auto",
    overwrite: bool = False,
) -> ConvertReport:
    """Write SRC (folder or hub name) to the new folder DST in another layout; all or nothing."""
    if to not in ("hf", "llama", "endside"):
        raise UserError(f"--to is {to!r}: use hf, llama or endside")
    if dtype not in ("auto", *DTYPES):
        raise UserError(f"--dtype is {dtype!r}: use auto, {', '.join(DTYPES)}")
    folder = resolve(src)
    if Path(dst).expanduser().resolve() == folder.resolve():
        raise UserError(f"DST {dst} is the source itself: give the name of a new folder")
    checkpoint = Checkpoint.open(folder)
    model = load_checkpoint(checkpoint)
    kind = dtype_name(model) if dtype == "auto" else dtype
    write = save_llama if to == "llama" else save
    written = write(
        model,
        dst,
        tokenizer_files=folder,
        base_config=None if to == "endside" else checkpoint.config,
        dtype=kind,
        overwrite=overwrite,
    )
    result = Checkpoint.open(written, verify=False)
    return ConvertReport(
        source=folder,
        destination=written,
        layout=to,
        tensors=len(result.tensors),
        bytes=sum(file.stat().st_size for file in written.iterdir()),
        dtype=kind,
        ignored=tuple(config_from_hf(checkpoint.config)[1]),
        copied=tuple(name for name in companions(folder) if (written / name).is_file()),
        notes=tuple(_notes(model, to, kind)),
    )


def _notes(model: Transformer, to: Layout, dtype: str) -> list[str]:
    config, notes = model.config, []
    if dtype != dtype_name(model):
        notes.append(f"weights rounded from {dtype_name(model)} to {dtype}")
    if to != "llama":
        return notes
    if config.scale_emb != 1.0 or config.residual_scale != 1.0 or config.logit_divisor != 1.0:
        notes.append(
            f"folded: embeddings x {config.scale_emb:g}, residual increments x "
            f"{config.residual_scale:.7g}, logits / {config.logit_divisor:g}"
        )
    if config.tie_word_embeddings and not fold_config(config).tie_word_embeddings:
        notes.append("the tied head became a tensor of its own")
    if config.sparse is not None:
        notes.append("sparse attention left out: a Llama folder is always dense")
    if config.mtp_layers:
        notes.append("the multi-token prediction layer left out")
    if config.rope.long_factor != config.rope.short_factor:
        notes.append(
            "long and short rope factors differ: transformers changes list while a text grows, "
            "endside chooses once from the context"
        )
    return notes
