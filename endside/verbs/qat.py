"""`endside qat CONFIG.toml [key=value …]`: train a ternary or int4 model, packed without loss."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from endside.dist import world
from endside.verbs import parse


@dataclass(frozen=True)
class Qat:
    """Train in low bits; run it again to resume."""

    config: Positional[Path]
    """The TOML file of the run: one of pretrain with kind (ternary, int4) and group."""
    overrides: Positional[tuple[str, ...]] = ()
    """key=value pairs that win over the file, such as optim.learning_rate=0.005."""
    init_from: Path | None = None
    """Begin with these weights: a checkpoint of a run, or a model folder."""
    decay_from: Path | None = None
    """Branch a decay run from this checkpoint of a stable run in low bits."""


def main(argv: list[str]) -> None:
    """Train, and print where the packed model lies."""
    from endside.train import pretrain, qat

    flags = parse(Qat, argv, "qat")
    cfg = pretrain.read_config(flags.config, flags.overrides, qat.QatConfig)

    def export(model: Any, folder: Path) -> None:
        write_packed(model, folder, cfg.scheme, cfg.data.tokenizer)

    run = qat.from_file(
        flags.config,
        flags.overrides,
        init_from=flags.init_from,
        decay_from=flags.decay_from,
        export=export,
    )
    if world().main:
        print(run / "model")


def write_packed(model: Any, folder: Path, scheme: Any, tokenizer: str = "") -> None:
    """Write a trained model with exactly the weights its forward pass sees.

    They are the latent ones rounded to nearest, so the errors that quantization.json lists are the
    distance of the latent weights, not a loss.
    """
    from endside.formats import hf
    from endside.formats.hf_config import config_to_hf
    from endside.log import Progress
    from endside.quant.quantize import Recipe, Target, Texts, quantize

    files = hf.companions(Path(tokenizer) if tokenizer else None)

    def describe(config: Any) -> dict[str, Any]:
        return config_to_hf(config, dtype=hf.dtype_name(model))

    digest = sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().numpy().tobytes())
    target = Target(folder, describe, files, digest.hexdigest(), overwrite=True)
    quantize(model, Recipe(scheme, "rtn"), Texts(), target, Progress())
