"""`endside pretrain CONFIG.toml [key=value …]`: train a model from a run configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from endside.dist import world
from endside.verbs import parse


@dataclass(frozen=True)
class Pretrain:
    """Train from tokens; run it again to resume."""

    config: Positional[Path]
    """The TOML file of the run."""
    overrides: Positional[tuple[str, ...]] = ()
    """key=value pairs that win over the file, such as optim.learning_rate=0.01."""
    decay_from: Path | None = None
    """Branch a decay run from this checkpoint of a stable run."""


def main(argv: list[str]) -> None:
    """Train, and print where the model lies."""
    from endside.formats import hf
    from endside.train import pretrain

    flags = parse(Pretrain, argv, "pretrain")
    cfg = pretrain.read_config(flags.config, flags.overrides)
    tokenizer = Path(cfg.data.tokenizer) if cfg.data.tokenizer else None
    run = pretrain.from_file(
        flags.config,
        flags.overrides,
        decay_from=flags.decay_from,
        export=lambda model, folder: hf.save(
            model, folder, tokenizer_files=tokenizer, overwrite=True
        ),
    )
    if world().main:
        print(run / "model")
