"""Memory for packed weights: many matrices beside each other in huge pages.

A decode step reads every weight once, so with pages of 4 KiB a good part of its time is spent on
finding pages, and the processor's own prefetching ends at each. Most matrices are smaller than, or
no multiple of, a huge page: only together do they fill some. Where the system has no huge pages the
same memory is only slower. It comes zeroed and costs nothing until it is written.
"""

from __future__ import annotations

import mmap
import threading
import weakref

import numpy as np

ALIGNMENT = 64  # bytes: a cache line, and the widest vector
HUGE = 2 << 20  # bytes of a huge page
SLAB = 32 * HUGE  # asked for at once
SMALL = 16 << 10  # below, huge pages gain nothing


class Slabs:
    """Hands out parts of one mapping after another; each lives as long as its parts do."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._slab: weakref.ref[np.ndarray] | None = None
        self._used = 0  # bytes of it

    def part(self, size: int) -> np.ndarray:
        """uint8 (size,) of zeros."""
        with self._lock:
            slab = self._slab() if self._slab else None
            if slab is None or self._used + size > len(slab):
                slab, self._used = _mapping(max(SLAB, size)), 0
                self._slab = weakref.ref(slab)
            part = slab[self._used : self._used + size]
            self._used += -(-size // ALIGNMENT) * ALIGNMENT
            return part


SLABS = Slabs()


def zeroed(size: int) -> np.ndarray:
    """uint8 (size,) of zeros that starts at a multiple of 64 bytes."""
    if size >= SMALL:
        return SLABS.part(size)
    memory = np.zeros(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size]


def _mapping(size: int) -> np.ndarray:
    """uint8 (size,) of whole huge pages, which are taken as they are written."""
    size = -(-size // HUGE) * HUGE
    memory = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, np.uint8)
    start = -whole.ctypes.data % HUGE
    # an array of its own, to which a weak reference can be kept: views of views refer to the first
    return np.frombuffer(memory, np.uint8, count=size, offset=start)
