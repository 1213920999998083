"""A run as it is watched: its records, its live view, and when the next checkpoint is due.

Every step goes to metrics.jsonl, and to TensorBoard where the configuration says so. A terminal
shows a small board that is redrawn in place, anything else one line every few seconds.

    tokens/s    targets per second of the step
    MFU         training operations of all positions fed (flops.training_flops), over what this
                machine can do at most (`train.peak`); left out where either is unknown
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

from endside.errors import UserError
from endside.log import duration
from endside.model.config import ModelConfig
from endside.model.flops import training_flops
from endside.model.transformer import Transformer
from endside.train.peak import peak_flops
from endside.train.run_folder import RunFolder

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FROZEN = 2 / 3  # of the operations are left where the weights' own gradients are not needed
REMEMBERED = 16  # losses in the live curve


class WatchConfig(Protocol):
    """What is read of a stage's configuration."""

    steps: int
    checkpoint_every: int
    checkpoint_seconds: float
    precision: str
    tensorboard: bool


class Watch:
    """Told of every step by the loop."""

    def __init__(
        self, cfg: WatchConfig, run: RunFolder, start: int, model: nn.Module, *, processes: int = 1
    ) -> None:
        self._cfg, self._run, self._start = cfg, run, start
        self._operations = _operations(model)
        device = next(model.parameters()).device
        peak = peak_flops(device, cfg.precision) if self._operations else None
        self._peak = peak * processes if peak else None
        self._board = board(run, start) if cfg.tensorboard and run.main else None
        self._heldout, self._losses = "", []
        self._latest: tuple[int, dict[str, float], float] | None = None  # shown last
        self._begun = self._saved_at = self._ticked = time.monotonic()

    def tick(self, step: int, record: dict[str, float], *, targets: int, shape: list[int]) -> None:
        """Record a step that has just ended; shape: rows of the step and positions of a row."""
        now = time.monotonic()
        seconds, self._ticked = max(now - self._ticked, 1e-9), now
        speed = {"tokens_per_s": round(targets / seconds, 1)}
        if self._operations and self._peak:
            rows, length = shape
            work = training_flops(self._operations[0], length) * self._operations[1] * rows * length
            speed["mfu"] = round(work / seconds / self._peak, 4)
        self._write(step, {**record, **speed})
        left = (now - self._begun) / (step - self._start) * (self._cfg.steps - step)
        self._losses = [*self._losses[1 - REMEMBERED :], record["loss"]]
        self._latest = step, {**record, **speed}, left
        self._show(*self._latest)

    def _show(self, step: int, record: dict[str, float], left: float) -> None:
        cells = {
            "loss": f"{record['loss']:.4f}", "held out": self._heldout,
            "lr": f"{record['learning_rate']:.2e}", "norm": f"{record['gradient_norm']:.2f}",
            "tok/s": f"{record['tokens_per_s']:,.0f}",
            "MFU": f"{record['mfu']:.0%}" if "mfu" in record else "", "left": duration(left),
        }  # fmt: skip
        line = f"step {step}/{self._cfg.steps}  " + "  ".join(
            f"{value} {name}" if name in ("tok/s", "MFU", "left") else f"{name} {value}"
            for name, value in cells.items()
            if value
        )
        self._run.progress.board(
            line, {"step": f"{step}/{self._cfg.steps}", **cells},
            share=step / self._cfg.steps, trend=self._losses,
        )  # fmt: skip

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        """Record an evaluation, which does not count as training time."""
        self._write(step, values)
        if "heldout_loss" in values:
            self._heldout = f"{values['heldout_loss']:.4f}"
            if self._latest:
                self._show(*self._latest)
        self._ticked = time.monotonic()

    def _write(self, step: int, values: dict[str, float]) -> None:
        self._run.metrics.append(step, values)
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def checkpoint_due(self, step: int) -> bool:
        """Whether a checkpoint is due by steps or by seconds."""
        every, seconds = self._cfg.checkpoint_every, self._cfg.checkpoint_seconds
        by_time = seconds and time.monotonic() - self._saved_at >= seconds
        return bool(by_time or (every and step % every == 0))

    def saved(self) -> None:
        """A checkpoint was written just now."""
        self._saved_at = self._ticked = time.monotonic()

    def close(self) -> None:
        """End the live view."""
        if self._board is not None:
            self._board.close()
        self._run.progress.close()


def _operations(model: nn.Module) -> tuple[ModelConfig, float] | None:
    """The shape whose operations count, and the share of them that is done; None: not known."""
    if not isinstance(model, Transformer):
        return None
    frozen = any(not parameter.requires_grad for parameter in model.parameters())
    return model.config, FROZEN if frozen else 1.0


def board(run: RunFolder, start: int) -> SummaryWriter | Any:
    """TensorBoard's writer in the run folder; what it wrote after step `start` is overwritten."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            f"tensorboard = true needs the package tensorboard ({error}): install endside[track], "
            "or leave tensorboard out"
        ) from error
    return SummaryWriter(str(run.path / "tensorboard"), purge_step=start + 1)
