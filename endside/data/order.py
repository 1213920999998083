"""Which row comes next: a seeded order that is a function of counters, and shares that are kept.

    order     epoch e of a source visits its rows in a permutation drawn from (seed, e); its i-th
              row is the (i mod n)-th of epoch i div n, so a cursor is one number
    shares    of several sources the one that is furthest behind its share comes next, the first of
              those that are equal. There is nothing random to be stored: the counts are the state

Both are the same for any number of processes: each follows the whole sequence and reads its part.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

PARTS = 10**9  # a weight counts in parts of it


class Order:
    """The rows of one source, epoch after epoch. `key`: what its permutations are drawn from."""

    def __init__(self, rows: int, key: Sequence[int]) -> None:
        assert rows > 0, "a source without rows has no order"
        self.rows, self._key = rows, list(key)
        self._epoch = -1
        self._permutation = np.empty(0, dtype=np.int64)

    def at(self, place: int) -> int:
        """The row that is read as number `place`, counted from 0 over all epochs."""
        epoch, within = divmod(place, self.rows)
        if epoch != self._epoch:
            # RandomState's stream is frozen by NumPy's own promise (NEP 19): an order is for ever.
            seeds = np.random.SeedSequence([*self._key, epoch])
            random = np.random.RandomState(np.random.MT19937(seeds))
            self._epoch, self._permutation = epoch, random.permutation(self.rows)
        return int(self._permutation[within])


class Shares:
    """Chooses among sources so that what each has given stays beside its share.

    One choice of source i gives sizes[i] of whatever is shared out. All is done in whole numbers.
    """

    def __init__(self, weights: Sequence[float], sizes: Sequence[int] | None = None) -> None:
        self._weights = [round(weight * PARTS) for weight in weights]
        self._sizes = list(sizes or [1] * len(weights))
        self.chosen = [0] * len(weights)  # how often each came

    def next(self) -> int:
        """The number of the source that comes now."""
        given = [count * size for count, size in zip(self.chosen, self._sizes, strict=True)]
        total, whole = sum(given), sum(self._weights)
        # Where each would stand against its share once what now comes is given.
        behind = [
            weight * (total + size) - had * whole
            for weight, size, had in zip(self._weights, self._sizes, given, strict=True)
        ]
        best = max((i for i, weight in enumerate(self._weights) if weight), key=behind.__getitem__)
        self.chosen[best] += 1
        return best
