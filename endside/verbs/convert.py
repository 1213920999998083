"""`endside convert SRC DST --to hf|llama|endside`: the same model in another layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from endside.verbs import parse


@dataclass(frozen=True)
class Convert:
    """Write a checkpoint in another format."""

    source: Positional[str]
    """Local folder or hub name."""
    target: Positional[Path]
    """Folder to write; must not exist."""
    to: Literal["hf", "llama", "endside"]
    """hf: as published; llama: muP scales folded into the weights; endside: our own."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the written weights; a fold of bfloat16 weights is exact in float32 only."""
    overwrite: bool = False
    """Replace a target that we wrote before."""


def main(argv: list[str]) -> None:
    """Convert, and print what was done."""
    from endside.formats.convert import convert

    flags = parse(Convert, argv, "convert")
    print(
        convert(
            flags.source, flags.target, to=flags.to, dtype=flags.dtype, overwrite=flags.overwrite
        )
    )
