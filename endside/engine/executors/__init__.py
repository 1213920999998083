"""Which backend runs a model: `Plan` says what is wanted, `create` loads it.

A backend is imported only when it is chosen, so a path that does not need PyTorch never loads it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from endside.engine.executor import Executor
from endside.errors import UserError

if TYPE_CHECKING:
    from endside.checkpoint import Checkpoint

CHOICES = {
    "executor": ("auto", "torch"),
    "attention": ("auto", "dense", "sparse"),
    "device": ("auto", "cpu", "cuda"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "quant": ("none",),
}
CACHE_SHARE = 0.25  # of free memory: weights, activations and other programs need the rest


@dataclass(frozen=True)
class Plan:
    """How a model is loaded and run; "auto" and None are decided by the model and the machine."""

    executor: Literal["auto", "torch"] = "auto"
    attention: Literal["auto", "dense", "sparse"] = "auto"  # auto: what the checkpoint says
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: float32 on a CPU
    quant: Literal["none"] = "none"
    context: int | None = None  # tokens, prompt and answer together; None: the model's, if it fits
    capacity: int | None = None  # tokens of all running requests together; None: one context
    threads: int | None = None  # CPU threads; None: the backend's choice
    max_batch: int = 8  # requests that run at once

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"{name} is {getattr(self, name)!r}: use {', '.join(allowed)}")
        for name in ("context", "capacity", "threads", "max_batch"):
            value = getattr(self, name)
            wrong = isinstance(value, bool) or not isinstance(value, int) or value < 1
            if value is not None and wrong:
                raise UserError(f"{name} is {value!r}: give a whole number of at least 1")
        if self.capacity is not None and self.capacity < (self.context or 1):
            raise UserError(
                f"capacity {self.capacity} is below context {self.context}: "
                "the pool must hold at least one full context"
            )


def create(checkpoint: Checkpoint, plan: Plan) -> Executor:
    """Load the model of an opened folder with the backend that `plan` asks for."""
    from endside.engine.executors import torch

    return torch.load(checkpoint, plan)


def default_context(longest: int, token_bytes: float, memory_bytes: int) -> int:
    """The model's own maximum, or what a quarter of free memory holds if that is less; tokens."""
    fitting = int(memory_bytes * CACHE_SHARE / token_bytes) // 64 * 64
    return max(64, min(longest, fitting))


def free_memory() -> int:
    """Bytes of main memory that can be taken without swapping; all of it where that is unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    values = dict(line.split(":", 1) for line in lines)
    return int(values["MemAvailable"].split()[0]) * 1024
