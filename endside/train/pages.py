"""Memory that a step has freed stays with the process, for the next step.

GNU's allocator gives large blocks back to the system at once, which then clears each page anew. A
step asks for the same blocks as the one before, so training keeps them. Other allocators know no
such switch and are left as they are.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache

_TRIM, _MMAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of <malloc.h>
LARGEST = 1 << 30  # bytes up to which a freed block is kept
NEVER = (1 << 31) - 1  # bytes at the heap's end that are never given back


@cache
def keep_pages() -> bool:
    """Set the switches, once per process; whether the allocator took them."""
    if not sys.platform.startswith("linux"):
        return False
    switch = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(switch and switch(_MMAP, LARGEST) and switch(_TRIM, NEVER))
