"""Quantization-aware training: from a high-precision checkpoint to a ternary or int4 model.

    endside pretrain runs/base.toml                      schedule.decay = 0: it stays stable
    endside qat runs/ternary.toml init_from=runs/base/checkpoints/step_3000

BitCPM's recipe (MiniCPM4, arXiv 2506.07900): two stages under one budget of tokens. The first is
the warm-up and the stable phase in high precision; the second has the blocks' projections in low
bits (`quant.ternary`), its learning rate re-warmed from zero to a peak of its own, about half of
the first, and carries the decay. With 40 % of all tokens or more in the second stage the final loss
comes close to that of training in low bits from the start.

A configuration is one of pre-training with two more keys, `kind` and `group`, and `init_from` names
the first stage. The optimizer starts fresh, since moments of the first stage belong to another
function. Without `init_from` the training is in low bits from the beginning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from endside.errors import UserError
from endside.model.transformer import Transformer
from endside.quant.pack import Scheme
from endside.quant.ternary import fake_transformer
from endside.train import pretrain
from endside.train.pretrain import Export, PretrainConfig
from endside.train.run_folder import RunFolder


@dataclass(frozen=True)
class QatConfig(PretrainConfig):
    """A run in low bits."""

    kind: Literal["ternary", "int4"] = "ternary"
    group: int = 128  # weights per scale

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group not in (32, 64, 128):
            raise UserError(f"group is {self.group}: use 32, 64 or 128")

    @property
    def scheme(self) -> Scheme:
        """How the projections are stored."""
        return Scheme(self.kind, self.group)


def from_file(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    init_from: Path | None = None,
    decay_from: Path | None = None,
    export: Export | None = None,
) -> Path:
    """Run, or resume, the training that a TOML file describes; returns its run folder."""
    extra = [f"init_from={init_from}"] if init_from else []
    extra += [f"decay_from={decay_from}"] if decay_from else []
    cfg = pretrain.read_config(path, [*overrides, *extra], QatConfig)
    folder = Path(cfg.run) if cfg.run else Path(path).with_suffix("")
    with RunFolder(folder) as run:
        main(cfg, run, export=export)
    return folder


def main(cfg: QatConfig, run: RunFolder, *, export: Export | None = None) -> Transformer:
    """Train from the run's newest checkpoint, or from `cfg.init_from`; returns the model."""
    return pretrain.main(cfg, run, make=make_model, export=export)


def make_model(cfg: QatConfig) -> Transformer:
    """The model in its low-bit slots, with the weights of `cfg.init_from`, or fresh ones."""
    return pretrain.begin(fake_transformer(pretrain.shape(cfg), cfg.scheme), cfg)
