"""`endside trace A B`: one prompt through two executors, compared stage by stage.

A and B name a model and how it is run:

    MODEL[:EXECUTOR][,OPTION=VALUE ...]        options are those of `run`, without their dashes

    endside trace models/m:torch models/m:native
    endside trace models/m:native models/m:native,quant=int4,kv=int8
    endside trace models/m:torch converted.gguf:native

An executor hands out the residual stream behind the embedding and behind every layer, the last norm
and the logits. Each stage's rows are compared in float64: the error of a row is |b - a| / |a|, and
a stage is as good as its worst row, because one wrong row (the first sparse one, say) must not
vanish in a mean. The first stage whose error exceeds the tolerance is named: what is wrong lies
there, since everything before it agrees. Errors add up over layers, so a low-bit model against a
float one needs a larger tolerance; the table shows where they jump.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from endside.engine.executors import CHOICES, Plan, create
from endside.errors import UserError
from endside.models import open_model
from endside.verbs import lazily, parse

if TYPE_CHECKING:
    import tyro

    from endside.checkpoint import Checkpoint
else:
    tyro = lazily("tyro")

PROMPT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on in the sun."


@dataclass(frozen=True)
class Trace:
    """Run two executors on one prompt, compare every stage, name the first that differs."""

    a: tyro.conf.Positional[str]
    """MODEL[:EXECUTOR][,OPTION=VALUE ...], such as models/m:torch."""
    b: tyro.conf.Positional[str]
    """The same for the other side, such as models/m:native,quant=int4."""
    prompt: str | None = None
    """Text to run, encoded by the tokenizer of A."""
    file: Path | None = None
    """Read the text from this file."""
    tokens: int | None = None
    """Use that many tokens: the text is repeated or cut."""
    tolerance: float = 0.02
    """Largest |b - a| / |a| of a row that counts as agreement."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class Side:
    """One of the two: a model and how it is run."""

    model: str
    plan: Plan

    @classmethod
    def parse(cls, text: str, length: int | None = None) -> Side:
        """Read MODEL[:EXECUTOR][,OPTION=VALUE ...]; UserError says what is wrong with it."""
        head, *given = text.split(",")
        options: dict[str, Any] = {} if length is None else {"context": length}
        for one in given:
            name, equals, value = one.partition("=")
            if name not in Plan.__dataclass_fields__ or not equals:
                known = ", ".join(Plan.__dataclass_fields__)
                raise UserError(f"{text}: {one!r} is no option: write NAME=VALUE with {known}")
            options[name] = int(value) if value.isdigit() else value
        model, colon, executor = head.rpartition(":")
        if colon and executor in CHOICES["executor"]:
            return cls(model, Plan(**{**options, "executor": executor}))
        return cls(head, Plan(**options))


@dataclass(frozen=True)
class Stage:
    """How far apart two executors are behind one stage; of its worst row."""

    stage: str
    max_abs: float
    relative: float  # |b - a| / |a|
    cosine: float
    row: int  # the token whose error is largest


def main(argv: list[str]) -> None:
    """Run both, print the table or the JSON."""
    flags = parse(Trace, argv, "trace")
    report = run(flags)
    print(json.dumps(report, indent=1) if flags.json else table(report))


def run(flags: Trace) -> dict[str, Any]:
    """The report: the sides, every stage, and the first beyond the tolerance, as plain values."""
    models = {text: open_model(Side.parse(text).model, verify=False) for text in (flags.a, flags.b)}
    tokens = _tokens(flags, models[flags.a])
    traces = []
    for text in (flags.a, flags.b):
        executor = create(models[text], Side.parse(text, len(tokens)).plan)
        if max(tokens) >= executor.vocab_size:
            raise UserError(
                f"token {max(tokens)} of the prompt is unknown to {text}, which has "
                f"{executor.vocab_size}: compare models of one vocabulary"
            )
        traces.append(executor.trace(np.array(tokens, dtype=np.int64)))
        del executor  # one model in memory at a time
    stages = compare(*traces)
    first = next((one for one in stages if not one.relative <= flags.tolerance), None)
    return {
        "a": flags.a,
        "b": flags.b,
        "tokens": len(tokens),
        "tolerance": flags.tolerance,
        "stages": [asdict(one) for one in stages],
        "first": None if first is None else asdict(first),
    }


def _tokens(flags: Trace, checkpoint: Checkpoint) -> list[int]:
    from endside.tokenizer import Tokenizer

    if flags.prompt is not None and flags.file is not None:
        raise UserError("both --prompt and --file are given: give one")
    text = flags.prompt or PROMPT
    if flags.file is not None:
        try:
            text = flags.file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read --file {flags.file}: {error}") from error
    ids = Tokenizer.load(checkpoint.folder, whole=False).encode(text, bos=True)
    if not ids:
        raise UserError("the prompt is empty: give some text to run")
    count = len(ids) if flags.tokens is None else flags.tokens
    if count < 1:
        raise UserError(f"--tokens {count}: at least one is needed")
    return (ids * -(-count // len(ids)))[:count]


def compare(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> list[Stage]:
    """Traces stage -> (T, C) of the same tokens -> how far apart they are, in the order of a."""
    if [(name, one.shape) for name, one in a.items()] != [(k, one.shape) for k, one in b.items()]:
        raise UserError(
            f"the two models have other shapes ({len(a)} stages of width {a['embed'].shape[1]}, "
            f"{len(b)} of {b['embed'].shape[1]}): compare two forms of one model"
        )
    return [_stage(name, a[name].astype(np.float64), b[name].astype(np.float64)) for name in a]


def _stage(name: str, a: np.ndarray, b: np.ndarray) -> Stage:
    """a, b (T, C) float64. What is not finite on one side counts as infinitely far."""
    gap = np.where(np.isfinite(b - a), b - a, np.inf)
    length = np.sqrt((a**2).sum(-1))
    errors = np.sqrt((gap**2).sum(-1)) / np.maximum(length, np.finfo(np.float64).tiny)
    row = int(errors.argmax())
    both = length[row] * np.sqrt((b[row] ** 2).sum())
    cosine = float(a[row] @ b[row] / both) if np.isfinite(errors[row]) and both else 0.0
    return Stage(name, float(np.abs(gap).max()), float(errors[row]), cosine, row)


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [
        f"A {report['a']}",
        f"B {report['b']}",
        f"{report['tokens']} tokens; the worst row of each stage",
        "",
        f"{'stage':<12}{'max |b-a|':>12}{'|b-a|/|a|':>12}{'cosine':>12}{'token':>8}",
    ]
    for one in report["stages"]:
        mark = "  <- first beyond" if one == report["first"] else ""
        lines.append(
            f"{one['stage']:<12}{one['max_abs']:>12.3e}{one['relative']:>12.3e}"
            f"{one['cosine']:>12.6f}{one['row']:>8}{mark}"
        )
    first, tolerance = report["first"], report["tolerance"]
    verdict = (
        f"no stage differs by more than {tolerance:g}"
        if first is None
        else f"{first['stage']} is the first stage to differ by more than {tolerance:g}: "
        f"by {first['relative']:.3g} at token {first['row']}"
    )
    return "\n".join([*lines, "", verdict])
