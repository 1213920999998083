"""Notices when training goes wrong, before the step that would spoil the weights.

    always     the loss, a part of it or the gradient norm is not a finite number
    sigma      loss > mean + max(sigma * deviation, rise), over the last `window` losses
    norm       gradient norm > norm * mean, over the last `window` norms

A rule over a window rests until the window is full. What happens then is one choice: `stop`, with a
message and a good checkpoint behind it, or `rewind`: back to the newest checkpoint and on with the
batches after the bad one, so that what was read since the checkpoint is skipped. The step does not
go backwards forever: `max_rewinds` bounds them. The window is in the checkpoint, so a run that was
killed rewinds where it would have.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from endside.errors import UserError

ADVICE = (
    "training stopped before it could spoil the weights; lower optim.learning_rate, lengthen "
    "schedule.warmup or look at the data, and start a new run"
)


@dataclass(frozen=True)
class SpikeConfig:
    """What counts as trouble, and what to do about it."""

    sigma: float = 0.0  # standard deviations of the loss above its mean; 0: not watched
    rise: float = 0.5  # nats above the mean at least, so that a flat curve is not all spikes
    norm: float = 0.0  # gradient norm as a multiple of its mean; 0: not watched
    window: int = 50  # steps that mean and deviation are taken over
    on_spike: Literal["stop", "rewind"] = "stop"
    max_rewinds: int = 3  # in the whole run

    def __post_init__(self) -> None:
        if min(self.sigma, self.rise, self.norm, self.max_rewinds) < 0 or self.window < 2:
            raise UserError(
                f"spikes.sigma {self.sigma}, rise {self.rise}, norm {self.norm} and max_rewinds "
                f"{self.max_rewinds} must be at least 0, window {self.window} at least 2"
            )


def check(spikes: SpikeConfig, checkpoint_every: int, checkpoint_seconds: float) -> None:
    """UserError where a run would rewind to a place that depends on the clock."""
    if spikes.on_spike == "rewind" and (not checkpoint_every or checkpoint_seconds):
        raise UserError(
            'spikes.on_spike is "rewind": give checkpoint_every, and checkpoint_seconds = 0, '
            "so that where it rewinds to does not depend on the clock"
        )


class Spikes:
    """The window of recent steps and the number of rewinds."""

    def __init__(self, config: SpikeConfig) -> None:
        self.config = config
        self.rewinds = 0
        self._losses: deque[float] = deque(maxlen=config.window)
        self._norms: deque[float] = deque(maxlen=config.window)

    def look(self, loss: float, norm: float, parts: Mapping[str, float]) -> str:
        """What is wrong with a step, or "" and the step joins the window."""
        trouble = _not_finite({"loss": loss, **parts, "gradient norm": norm})
        trouble = trouble or self._loss_spike(loss) or self._norm_spike(norm)
        if not trouble:
            self._losses.append(loss)
            self._norms.append(norm)
        return trouble

    def _loss_spike(self, loss: float) -> str:
        if not self.config.sigma or len(self._losses) < self.config.window:
            return ""
        mean = math.fsum(self._losses) / len(self._losses)
        square = math.fsum((each - mean) ** 2 for each in self._losses) / len(self._losses)
        limit = mean + max(self.config.sigma * math.sqrt(square), self.config.rise)
        if loss <= limit:
            return ""
        return f"loss {loss:.4f} is a spike: the last {len(self._losses)} allow {limit:.4f}"

    def _norm_spike(self, norm: float) -> str:
        if not self.config.norm or len(self._norms) < self.config.window:
            return ""
        limit = self.config.norm * math.fsum(self._norms) / len(self._norms)
        if norm <= limit:
            return ""
        return f"gradient norm {norm:.4f} is a spike: the last {len(self._norms)} allow {limit:.4f}"

    def count_rewind(self, trouble: str, step: int, run: Path) -> None:
        """Take one of the rewinds; UserError where stopping was asked for or none is left."""
        if self.config.on_spike == "stop":
            raise UserError(f"{trouble} at step {step} of {run}: {ADVICE}")
        if self.rewinds == self.config.max_rewinds:
            raise UserError(
                f"{trouble} at step {step} of {run}, after {self.rewinds} rewinds "
                f"(spikes.max_rewinds): {ADVICE}"
            )
        self.rewinds += 1

    def state(self) -> dict[str, Any]:
        """The window and the number of rewinds, for a checkpoint."""
        return {
            "rewinds": self.rewinds, "losses": list(self._losses), "norms": list(self._norms),
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` gave; an older checkpoint has none."""
        self.rewinds = state.get("rewinds", 0)
        for window, name in ((self._losses, "losses"), (self._norms, "norms")):
            window.clear()
            window.extend(state.get(name, ()))


def _not_finite(values: Mapping[str, float]) -> str:
    for name, value in values.items():
        if not math.isfinite(value):
            return f"{name} is {value}"
    return ""
