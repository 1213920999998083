"""`endside check CONFIG.toml [key=value …]`: does a learning rate hold at every width?"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from tyro.conf import Positional

from endside.verbs import parse


@dataclass(frozen=True)
class Check:
    """muP coordinate check; exit code 1 where something grows with the width."""

    config: Positional[Path]
    """The TOML file of a pre-training run."""
    overrides: Positional[tuple[str, ...]] = ()
    """key=value pairs that win over the file, such as model.num_hidden_layers=2."""
    widths: str = ""
    """Four or more, such as 128,256,512,1024; without it four doublings from two heads."""
    steps: int = 8
    """Training steps at every width."""
    seeds: int = 2
    """Starts to average over."""
    out: Path = Path("coordinate.json")
    """Where the numbers go; the picture lies beside them as .png."""


def main(argv: list[str]) -> None:
    """Train a little at every width, print the table, say flat or growing."""
    from endside.errors import UserError
    from endside.train import coordinate
    from endside.train.pretrain import read_config

    flags = parse(Check, argv, "check")
    cfg = read_config(flags.config, flags.overrides)
    try:
        widths = tuple(int(part) for part in flags.widths.split(",") if part)
    except ValueError:
        raise UserError(
            f"--widths {flags.widths!r}: give whole numbers with commas, such as 128,256,512,1024"
        ) from None
    widths = widths or coordinate.default_widths(cfg.model)
    found = coordinate.check(cfg, widths, steps=flags.steps, seeds=flags.seeds)
    print(coordinate.table(found))
    trends = coordinate.trends(found)
    good = coordinate.sound(trends)
    bad = [
        f"{t.quantity} of {t.kind} {t.slope:+.2f}" for t in coordinate.last(trends) if not t.sound
    ]
    print(
        f"after {flags.steps} steps, slopes over widths {widths[0]} to {widths[-1]}, limit "
        f"{coordinate.LIMIT}: " + ("flat" if good else "not flat: " + ", ".join(bad))
    )
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "flat": good, "limit": coordinate.LIMIT, "widths": widths, "seeds": flags.seeds,
        "learning_rate": cfg.optim.learning_rate,
        "trends": [{**asdict(t), "verdict": t.verdict, "sound": t.sound} for t in trends],
        "coordinates": [asdict(one) for one in found],
    }  # fmt: skip
    flags.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    coordinate.plot(found, flags.out.with_suffix(".png"))
    if not good:
        sys.exit(1)
