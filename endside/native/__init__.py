"""The native core: C++ kernels for this processor, or a plain word why there are none.

One library holds a variant of each kernel for every instruction set of its processor family (x86:
portable, AVX2, AVX-512; 64-bit Arm: portable, NEON), and the processor is asked at run time which
of them it can run. So a package built on one machine runs on its neighbour, and a test can put
each variant beside the others.

The core is optional. Where there was no C++ compiler at installation the package works on PyTorch
alone; `load` says so once, in one log line, and returns None.

Arrays go in and out as numpy; neither this package nor the core imports torch. What the core does
not hold, on purpose: models, files, tokenizers, global state, a way to end the process.
"""

from __future__ import annotations

import importlib
import logging
from functools import cache
from typing import Any, Protocol, cast

import numpy as np

from endside.errors import UserError


class Core(Protocol):
    """What the compiled module `endside.native._core` offers."""

    def available_isas(self) -> list[str]:
        """Names of the instruction sets that were built and run here, slowest first."""
        ...

    def rmsnorm(
        self, x: np.ndarray, weight: np.ndarray, eps: float, out: np.ndarray, isa: str
    ) -> None:
        """x (P, C), weight (C), out (P, C): float32, dense."""
        ...

    # packed.py and model.py reach the rest by `call`.


@cache
def _import_core() -> tuple[Core | None, str]:
    """The module, or None with the reason."""
    try:
        return cast(Core, importlib.import_module("endside.native._core")), ""
    except ModuleNotFoundError:
        return None, "not built: no working C++ compiler at installation"
    except ImportError as error:
        return None, f"built, but it does not load here ({error})"


@cache
def load() -> Core | None:
    """The compiled module, or None after one log line (the first call only) that says why."""
    core, _ = _import_core()
    if core is None:
        logging.getLogger(__name__).warning("%s; continuing on PyTorch", status())
    return core


def status() -> str:
    """One line: which instruction set the native core uses, or why there is no native core."""
    core, reason = _import_core()
    if core is None:
        return f"native core: {reason}"
    isas = core.available_isas()
    return f"native core: {isas[-1]} (available: {', '.join(isas)})"


def available_isas() -> list[str]:
    """Instruction sets that can be asked for here, slowest first; empty without a native core."""
    core, _ = _import_core()
    return [] if core is None else core.available_isas()


def rmsnorm(
    x: np.ndarray,
    weight: np.ndarray,
    eps: float,
    *,
    isa: str = "auto",
    out: np.ndarray | None = None,
) -> np.ndarray:
    """RMSNorm of rows: x (P, C), weight (C) -> (P, C), float32 and dense; `out` may be x itself."""
    _need()
    if out is None:
        out = np.empty_like(x)
    _check("x", x, 2)
    _check("weight", weight, 1)
    _check("out", out, 2)
    call("rmsnorm", x, weight, eps, out, isa)
    return out


def call(name: str, *arguments: object) -> Any:
    """A function of the core; what it refuses, and its absence, become a UserError."""
    try:
        return getattr(_need(), name)(*arguments)
    except (ValueError, TypeError) as error:
        raise UserError(f"native core: {error}") from error


def _need() -> Core:
    core, reason = _import_core()
    if core is None:
        raise UserError(f"native core {reason}: install a C++ compiler and install endside again")
    return core


def _check(name: str, array: np.ndarray, axes: int) -> None:
    """The core reads memory as it lies: anything but dense float32 rows is refused at the door."""
    dense = array.flags.c_contiguous and array.dtype == np.float32
    if not dense or array.ndim != axes:
        raise UserError(
            f"native {name} is {array.dtype} with shape {array.shape}: "
            f"give a contiguous float32 array with {axes} axes"
        )
