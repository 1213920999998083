"""`endside sft CONFIG.toml [key=value …]`: fine-tune a model on conversations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from endside.verbs import parse


@dataclass(frozen=True)
class Sft:
    """Fine-tune on conversations; run it again to resume."""

    config: Positional[Path]
    """The TOML file of the run: start, steps, [data.sources] and what else differs."""
    overrides: Positional[tuple[str, ...]] = ()
    """key=value pairs that win over the file, such as lora.rank=16."""


def main(argv: list[str]) -> None:
    """Train, and print where the model lies."""
    from endside.train import sft

    flags = parse(Sft, argv, "sft")
    print(sft.from_file(flags.config, flags.overrides) / "model")
