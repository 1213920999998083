"""The learning rate over time: WSD, warm-up, stable, decay (MiniCPM, arXiv 2404.06395, section 4).

    share(t) = t / warmup                        t <= warmup
             = 1                                 until steps - decay
             = shape(x), x = (t - (steps - decay)) / decay      in the last `decay` steps

    exponential  floor ** x        linear  1 - (1 - floor) x        sqrt  1 - (1 - floor) sqrt(x)
    cosine  1 - (1 - floor) (1 - cos(pi x)) / 2      the usual schedule is that from warm-up to end

Nothing before the decay depends on `steps`: the stable phase can be extended at any time, and any
stable checkpoint can be annealed in a run of its own. The share multiplies every group's own rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from endside.errors import UserError


@dataclass(frozen=True)
class ScheduleConfig:
    """Lengths of the first and the last phase; the stable one is what remains."""

    warmup: int = 100  # optimiser steps
    decay: int = 0  # optimiser steps at the end of the run; 0: the run stays stable
    shape: Literal["exponential", "linear", "sqrt", "cosine"] = "exponential"
    floor: float = 0.1  # share of the peak reached at the last step

    def __post_init__(self) -> None:
        if self.warmup < 0 or self.decay < 0:
            raise UserError(
                f"schedule.warmup {self.warmup} and schedule.decay {self.decay} are counts of "
                "steps: use 0 or more"
            )
        if not 0 <= self.floor <= 1 or (self.floor == 0 and self.shape == "exponential"):
            raise UserError(
                f"schedule.floor is {self.floor}: it is a share of the peak, from 0 to 1 "
                "(exponential never reaches 0)"
            )


def share(step: int, steps: int, schedule: ScheduleConfig) -> float:
    """The factor on the peak learning rate in step `step` of 1..steps."""
    if step <= schedule.warmup:
        return step / schedule.warmup
    left = steps - step
    if left >= schedule.decay:
        return 1.0
    x = 1 - left / schedule.decay
    if schedule.shape == "exponential":
        return schedule.floor**x
    done = {"linear": x, "sqrt": math.sqrt(x), "cosine": (1 - math.cos(math.pi * x)) / 2}
    return 1 - (1 - schedule.floor) * done[schedule.shape]


def phase(step: int, steps: int, schedule: ScheduleConfig) -> Literal["warmup", "stable", "decay"]:
    """Which phase step `step` of 1..steps belongs to."""
    if step < schedule.warmup:
        return "warmup"
    return "decay" if steps - step < schedule.decay else "stable"


def check(steps: int, schedule: ScheduleConfig) -> None:
    """Raise UserError unless the phases fit into `steps`."""
    if schedule.warmup + schedule.decay > steps:
        raise UserError(
            f"schedule.warmup {schedule.warmup} + schedule.decay {schedule.decay} is more than "
            f"steps {steps}: shorten them or train longer"
        )
