"""`endside quantize SRC DST`: a checkpoint in 4 or 8 bits, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from endside.errors import UserError
from endside.verbs import parse

CHARACTERS = 20_000_000  # of text that are read at most
HELD_OUT = 8  # every eighth document is for measuring


@dataclass(frozen=True)
class Quantize:
    """Make a checkpoint small; the same command goes on after an interruption."""

    source: Positional[str]
    """Local folder or hub name."""
    target: Positional[Path]
    """Folder to write; must not exist."""
    method: Literal["rtn", "gptq", "pgptq"] = "pgptq"
    """rtn: nearest code; gptq: errors repaired on real text; pgptq: less its first positions."""
    bits: Literal[4, 8] = 4
    """Of a weight."""
    group: Literal[32, 64, 128] = 128
    """Weights per scale."""
    sym: bool = False
    """A grid with zero in the middle (the default)."""
    asym: bool = False
    """A grid with a zero of its own per group."""
    act_order: bool = False
    """Round the columns with the largest inputs first."""
    prefix: int = 4
    """Positions that pgptq leaves out at the start of each row of text."""
    damp: float = 0.01
    """Share of the mean of the Hessian's diagonal that is added to it."""
    smooth: bool = False
    """Activation-aware smoothing first: large inputs get finer weights."""
    rotate: bool = False
    """Hadamard rotation of the residual stream first: no channel stands out."""
    calibration: str = "builtin"
    """Text file or folder; builtin: documentation and sources of this Python."""
    samples: int = 128
    """Rows of calibration text; 0 (rtn only): none."""
    length: int = 512
    """Tokens of a row."""
    perplexity: int = 0
    """Rows of other text on which perplexity is measured before and after; 0: not."""
    overwrite: bool = False
    """Replace a target that we wrote before."""


def main(argv: list[str]) -> None:
    """Quantize, and print what it cost."""
    from endside.checkpoint import Checkpoint, resolve
    from endside.formats import hf
    from endside.formats.hf_config import config_to_hf, point_to_code
    from endside.log import Progress
    from endside.quant.quantize import Target, quantize

    flags = parse(Quantize, argv, "quantize")
    if flags.sym and flags.asym:
        raise UserError("--sym and --asym exclude each other: give one of them")
    recipe = _recipe(flags)
    folder = resolve(flags.source)
    checkpoint = Checkpoint.open(folder)
    dtype = hf.STORED[checkpoint.info(hf.EMBEDDING).dtype]
    model = hf.load_checkpoint(checkpoint, dtype=dtype)
    files = hf.companions(folder)

    def describe(config: Any) -> dict[str, Any]:
        return point_to_code(config_to_hf(config, checkpoint.config, dtype=dtype), set(files))

    target = Target(
        flags.target.expanduser().absolute(),
        describe,
        files,
        _identity(checkpoint),
        flags.overwrite,
    )
    print(quantize(model, recipe, _texts(flags, folder), target, Progress()))
    print(target.folder)


def _recipe(flags: Quantize) -> Any:
    from endside.quant.pack import Scheme
    from endside.quant.quantize import Recipe

    return Recipe(
        Scheme(f"int{flags.bits}", flags.group, not flags.asym),
        flags.method, flags.prefix, flags.smooth, flags.rotate, flags.act_order, flags.damp,
    )  # fmt: skip


def _texts(flags: Quantize, folder: Path) -> Any:
    """Calibration rows, and rows of other documents to measure on."""
    from endside.quant.calibrate import rows
    from endside.quant.quantize import Texts
    from endside.tokenizer import Tokenizer

    for name in ("samples", "perplexity"):
        if getattr(flags, name) < 0:
            raise UserError(
                f"--{name} is {getattr(flags, name)}: it is a number of rows, 0 or more"
            )
    if flags.length < 2:
        raise UserError(f"--length is {flags.length}: a row needs at least 2 tokens")
    if not flags.samples and not flags.perplexity:
        return Texts()
    tokenizer = Tokenizer.load(folder)
    texts = list(_documents(flags.calibration))
    parts: dict[str, Any] = {"calibration": None, "heldout": None}
    held = [index % HELD_OUT == HELD_OUT - 1 for index in range(len(texts))]
    wanted = {
        "calibration": (flags.samples, flags.length),
        "heldout": (flags.perplexity, flags.length + 1),
    }
    for name, (count, length) in wanted.items():
        if count:
            measured = name == "heldout"
            own = (
                t for t, h in zip(texts, held, strict=True) if h == measured or not flags.perplexity
            )
            ids = (tokenizer.encode(text, bos=False) for text in own)
            parts[name] = rows(ids, count, length, tokenizer.bos_id)
    return Texts(**parts)


def _documents(source: str) -> Iterator[str]:
    from endside.data import corpus

    found = corpus.standard_library() if source == "builtin" else corpus.read(source)
    taken = 0
    for document in found:
        if taken >= CHARACTERS:
            return
        taken += len(document.text)
        yield document.text


def _identity(checkpoint: Any) -> str:
    """What tells this source from another: its files with their sizes and times."""
    names = sorted({info.file for info in checkpoint.tensors.values()})
    states = [(checkpoint.folder / name).stat() for name in names]
    parts = [f"{n} {s.st_size} {s.st_mtime_ns}" for n, s in zip(names, states, strict=True)]
    return "; ".join([str(checkpoint.folder.resolve()), *parts])
