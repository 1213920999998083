"""`endside plot RUN…`: the curves of one or more run folders as a PNG."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from endside.verbs import parse


@dataclass(frozen=True)
class Plot:
    """Draw loss, held-out loss, learning rate and gradient norm of one or more runs."""

    runs: Positional[tuple[Path, ...]]
    """Run folders (each holds a metrics.jsonl)."""
    out: Path = Path("loss.png")
    """Where the picture goes."""


def main(argv: list[str]) -> None:
    """Draw, and print the path of the picture."""
    from endside.train.plot import loss_curves

    flags = parse(Plot, argv, "plot")
    loss_curves(flags.runs, flags.out)
    print(flags.out)
