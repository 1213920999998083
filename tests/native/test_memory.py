"""Memory for packed weights: zeroed, apart from each other, given back when nobody needs it."""

from __future__ import annotations

import gc
import weakref

import numpy as np

from endside.native import memory


def test_parts_lie_beside_each_other_and_do_not_meet() -> None:
    sizes = (memory.SMALL + 3, 5, memory.SMALL, 3 * memory.SMALL + 64)
    parts = [memory.zeroed(size) for size in sizes]
    for number, (part, size) in enumerate(zip(parts, sizes, strict=True), 1):
        assert part.shape == (size,), "another size"
        assert part.ctypes.data % memory.ALIGNMENT == 0, "not on a cache line"
        assert not part.any(), "not zeroed, or a neighbour's bytes"
        part[:] = number
    assert all((part == number).all() for number, part in enumerate(parts, 1)), "overwritten"
    large = [part for part in parts if len(part) >= memory.SMALL]
    assert large[1].ctypes.data - large[0].ctypes.data < 2 * memory.SMALL, "a slab for each"


def test_more_than_a_slab_and_the_end_of_one() -> None:
    whole = memory.zeroed(memory.SLAB + 1)
    rest = memory.zeroed(memory.SLAB - memory.SMALL)  # the next one does not fit behind it
    more = memory.zeroed(2 * memory.SMALL)
    for part in (whole, rest, more):
        part[[0, -1]] = 1
    assert whole.ctypes.data % memory.HUGE == 0, "a slab starts with a huge page"


def test_a_slab_ends_with_its_last_array() -> None:
    part = memory.zeroed(memory.SMALL)
    slab = weakref.ref(part.base if isinstance(part.base, np.ndarray) else part)
    kept = memory.zeroed(memory.SMALL)
    del part
    gc.collect()
    assert slab() is not None and not kept.any(), "gone while one needs it"
    del kept
    gc.collect()
    assert slab() is None, "kept for nobody"
