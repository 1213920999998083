"""Passes of a training step in the native core, on PyTorch's tensors and with PyTorch's threads.

Between two matrix products a step is bound by memory: PyTorch reads and writes it once for every
operation of a chain, the core once for all. Which tensors it takes is asked of `able`; everything
else (GPUs, float64, sharded tensors, a package without its core) goes PyTorch's way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from endside import native

DTYPES = (torch.float32, torch.bfloat16)
ISA = "auto"  # which instructions; the best there are


@cache
def _core() -> tuple[bool, bool]:
    """Whether there is a core with these passes, and whether it finds PyTorch's threads."""
    there = hasattr(native.load(), "fused_team")
    return there, there and native.call("fused_team")


def _able() -> bool:
    there, team = _core()
    return team or (there and torch.get_num_threads() == 1)


def able(*tensors: torch.Tensor) -> bool:
    """Whether the core takes these: plain, on the CPU, float32 or bfloat16, with a gradient."""
    return (
        torch.is_grad_enabled()
        and all(
            t.dtype in DTYPES and t.device.type == "cpu" and type(t.data) is torch.Tensor
            for t in tensors
        )
        and any(t.requires_grad for t in tensors)
        and _able()
    )


def has_tiles() -> bool:
    """Whether the core multiplies float32 matrices in tiles here."""
    return hasattr(native.load(), "product_able") and native.call("product_able", ISA)


@contextmanager
def denormals_as_zero() -> Iterator[None]:
    """Meanwhile numbers below 2^-126 count as zero in every thread of PyTorch, then as before.

    Gradients of attention get there, and a product of them takes several times as long. PyTorch's
    own switch is the calling thread's: threads that it has already started do not hear of it.
    """
    before = not (torch.tensor([1e-39]) * 1.0).item()
    _flush(True)
    try:
        yield
    finally:
        _flush(before)


def _flush(wanted: bool) -> None:
    if _core()[0]:
        native.call("flush_denormals", torch.get_num_threads(), wanted)
    torch.set_flush_denormal(wanted)


def address(tensor: torch.Tensor | None) -> int:
    """Where a dense tensor begins; 0 for none."""
    if tensor is None:
        return 0
    assert tensor.is_contiguous() and tensor.device.type == "cpu", "a pass needs dense tensors"
    return tensor.data_ptr()


def narrow(tensor: torch.Tensor | None) -> bool:
    """Whether the numbers are bfloat16; float32 otherwise."""
    assert tensor is None or tensor.dtype in DTYPES, "a pass needs float32 or bfloat16"
    return tensor is not None and tensor.dtype == torch.bfloat16


def run(name: str, *arguments: object) -> None:
    """The pass `name` on PyTorch's number of threads."""
    native.call(f"fused_{name}", *arguments, torch.get_num_threads(), ISA)
