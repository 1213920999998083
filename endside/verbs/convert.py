"""`endside convert SRC DST --to hf|llama|gptq|gguf|endside`: the same model in another format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from endside.verbs import parse


@dataclass(frozen=True)
class Convert:
    """Write a checkpoint in another format, and say what it cost."""

    source: Positional[str]
    """Local folder, .gguf file or hub name; plain, GPTQ, AWQ, Marlin (CPM.cu) or our own."""
    target: Positional[Path]
    """Folder to write, or a file that ends in .gguf; must not exist."""
    to: Literal["hf", "llama", "gptq", "gguf", "endside"]
    """hf: plain, as published; llama: muP scales folded into plain weights; gptq: AutoGPTQ's
    layout; gguf: one file for llama.cpp; endside: our own."""
    type: Literal[
        "auto", "int4", "int8", "ternary", "f32", "f16", "bf16", "q8_0", "q4_0", "tq1_0", "tq2_0",
        "q2_0",
    ] = "auto"  # fmt: skip
    """What the linears become; auto: nothing is rounded. gptq: int4, int8; endside: these and
    ternary; gguf: the rest. Ternary types take ternary weights only."""
    group: int | None = None
    """Columns that share a scale where int4 or int8 is rounded; default 128."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of plain weights; a fold of bfloat16 weights is exact in float32 only."""
    overwrite: bool = False
    """Replace a target that we wrote before."""


def main(argv: list[str]) -> None:
    """Convert, and print what was done."""
    from endside import gguf_tokenizer
    from endside.formats.convert import convert

    flags = parse(Convert, argv, "convert")
    print(
        convert(
            flags.source,
            flags.target,
            to=flags.to,
            type=flags.type,
            group=flags.group,
            dtype=flags.dtype,
            overwrite=flags.overwrite,
            texts=gguf_tokenizer,
        )
    )
