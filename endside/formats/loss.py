"""What a conversion cost: every written tensor read back and compared with the one it came from.

The relative error of a tensor is rms(written - original) / rms(original), over its class the same
with all its tensors taken together; 0 means that every weight is the same number. Both sides go
through the readers of their formats, so this also proves that what was written can be read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from endside.formats.hf_config import HEAD
from endside.formats.weights import Source, to_float

EMBEDDING = "embed_tokens.weight"
CLASSES = {"embed_tokens": "embedding", "lm_head": "head", "self_attn": "attention",
           "mlp": "feed-forward", "norm": "norms"}  # fmt: skip
ROWS = 1 << 22  # weights compared at a time


@dataclass(frozen=True)
class Loss:
    """Relative rms errors of a conversion."""

    classes: dict[str, float]  # embedding, attention, feed-forward, norms, head
    worst: str  # our name of the tensor with the largest error
    worst_error: float

    @property
    def lossless(self) -> bool:
        """Whether every weight is the same number as before."""
        return self.worst_error == 0

    def __str__(self) -> str:
        if self.lossless:
            return "error: lossless, every weight is the same number"
        per_class = ", ".join(f"{name} {error:.3g}" for name, error in self.classes.items())
        return f"error (relative rms): {per_class}; worst {self.worst} {self.worst_error:.3g}"


def measure(source: Source, written: Source, factor: Callable[[str], float]) -> Loss:
    """Compare two models tensor by tensor; `factor` is what a parameter was multiplied by."""
    squares: dict[str, list[float]] = {}
    worst, worst_error = "", 0.0
    for name in written.parameters:
        origin = name if name in source.parameters else EMBEDDING
        before = to_float(source.parameters[origin].read())
        after = to_float(written.parameters[name].read())
        difference, size = _compare(before, after, factor(name))
        error = _ratio(difference, size)
        if error > worst_error or not worst:
            worst, worst_error = name, error
        total = squares.setdefault(_class(name), [0.0, 0.0])
        total[0] += difference
        total[1] += size
    return Loss({name: _ratio(*total) for name, total in squares.items()}, worst, worst_error)


def _compare(before: np.ndarray, after: np.ndarray, factor: float) -> tuple[float, float]:
    """Sums of squares of the difference and of the original, a few rows at a time."""
    step = max(1, ROWS // max(1, before[0].size))
    difference = size = 0.0
    for at in range(0, len(before), step):
        old = before[at : at + step].astype(np.float64) * factor
        gap = after[at : at + step] - old
        difference += float(np.vdot(gap, gap))
        size += float(np.vdot(old, old))
    return difference, size


def _ratio(difference: float, size: float) -> float:
    if difference == 0:
        return 0.0
    return math.sqrt(difference / size) if size else math.inf


def _class(name: str) -> str:
    if name == HEAD:
        return CLASSES["lm_head"]
    parts = name.split(".")
    return next((text for key, text in CLASSES.items() if key in parts), CLASSES["norm"])
