"""How large a draft tree should be: as large as it pays on this machine, for this text.

A pass over n rows costs c(n) seconds, measured once and remembered; with a tree of n nodes it
brings 1 + p(0) + … + p(n-1) tokens, where p(i) is how often node number i was on the path kept of
late. The size with the most tokens per second wins, and none at all where that wins: a 4-bit model
on few cores verifies 4 rows at nearly the price of one and 16 at several times that, so small trees
are best there (SpecMQuant's finding), while a GPU takes 60.

    tokens per second (n) = (1 + p(0) + … + p(n - 1)) / (c(rows) + g(n))     g: guessing n nodes
    rows                  = 1 + n + (1 + n) q          q: questions behind each node (drafts/bita)
    without a tree        = running / c(running)                     the others share the pass

g is measured as it happens: a head guesses level by level, so 8 nodes may take hardly longer than
4, and between the sizes met lie straight lines. Sizes not in use are not measured, so now and then
(`LARGER`) a larger tree is tried; more and more rarely (`PROBE` to `RARELY`) where none pays, and
again at once when the try kept two tokens, or could only ask questions and has its guesses next.
Costs depend on machine, threads and model and lie in the user's cache folder, one small file each.
"""

from __future__ import annotations

import hashlib
import json
import platform
import statistics
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from endside.atomic import write_atomic
from endside.engine.draft import MAX_ROWS, Tree
from endside.engine.executor import Executor, Full

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # that are timed
REPEATS = 5
BUDGET = 2.0  # seconds of timing at most
DEAR = 8.0  # times the price of one row: no tree brings that many tokens
CONTEXT = 32  # tokens before the timed rows
MEMORY = 0.97  # of what is known about a node's luck, after each tree
RECENT = 8  # guesses of one size whose time is remembered
LARGER = 16  # passes between tries of a larger tree than the one in use
PROBE = 32  # the same where none is in use
RARELY = 8 * PROBE  # and where none has paid for long
VERSION = 1


def measure(executor: Executor) -> dict[int, float] | None:
    """Seconds of a pass by its rows, (median); None where no sequence can be opened now."""
    try:
        seq = executor.open(CONTEXT + MAX_ROWS)
    except Full:
        return None
    try:
        executor.prefill(seq, np.arange(CONTEXT) % executor.vocab_size, logits="none")
        return _timed(executor, seq)
    finally:
        executor.close(seq)


def _timed(executor: Executor, seq: int) -> dict[int, float]:
    costs: dict[int, float] = {}
    begun = time.perf_counter()
    for rows in ROWS:
        tokens = np.arange(rows, dtype=np.int64) % executor.vocab_size
        parents = np.full(rows, 0, np.int32)
        parents[0] = -1
        spent = []
        for _ in range(REPEATS + 1):
            start = time.perf_counter()
            executor.verify(seq, tokens, parents)
            spent.append(time.perf_counter() - start)
            executor.trim(seq, CONTEXT)
        costs[rows] = statistics.median(spent[1:])
        late = time.perf_counter() - begun > BUDGET
        if rows > 2 and (late or costs[rows] > DEAR * costs[1]):
            break
    return costs


def remembered(executor: Executor, folder: Path) -> dict[int, float] | None:
    """The costs of this executor on this machine, from `folder` or measured now and kept there."""
    key = [VERSION, platform.node(), platform.processor(), executor.name, executor.identity()]
    key.append(getattr(executor, "threads", 0))
    name = hashlib.sha256(json.dumps(key, default=str).encode()).hexdigest()[:24]
    file = folder / f"verify-{name}.json"
    found = _read(file)
    if found is not None:
        return found
    costs = measure(executor)
    if costs is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(file, json.dumps({"seconds_by_rows": costs}) + "\n")
        except OSError:
            return costs  # it is only measured again next time
    return costs


def _read(file: Path) -> dict[int, float] | None:
    """The costs in a file; None for one that is missing or damaged."""
    try:
        written: Any = json.loads(file.read_text(encoding="utf-8"))["seconds_by_rows"]
        costs = {int(rows): float(cost) for rows, cost in written.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    good = 1 in costs and 2 in costs and all(0 < cost < 3600 for cost in costs.values())
    return costs if good else None


class AutoSize:
    """Implements `Size`. questions: tokens that a drafter asks behind the text and each guess."""

    def __init__(self, costs: dict[int, float], *, questions: int = 0) -> None:
        known = sorted(costs)
        self.largest = max(0, min(known[-1], MAX_ROWS) // (1 + questions) - 1)  # guesses
        self._rows = (1 + questions) * np.arange(2, self.largest + 2)  # of a pass over 1, 2, …
        self._cost = np.interp(np.arange(MAX_ROWS + 1), known, [costs[one] for one in known])
        # Before anything is known, a chain whose tokens are right two times in three.
        self._luck = (2 / 3) ** np.arange(1, MAX_ROWS)
        self._times: dict[int, deque[float]] = {}  # seconds of guesses by their nodes
        self._guessing = np.zeros(self.largest)  # seconds to guess 1, 2, … nodes
        self._pause = self._until = PROBE  # passes between tries, and until the next one
        self._off = self._asked = False

    def rows(self, running: int) -> int:
        """Nodes of the next tree; 0 where plain decoding brings more tokens per second."""
        best = self.best(running)
        self._off = best == 0
        self._until -= 1
        if self._asked:
            self._asked = False
            return max(best, min(4, self.largest))
        if self._until > 0:
            return best
        self._pause = min(2 * self._pause, RARELY) if self._off else PROBE
        self._until = self._pause if self._off else LARGER
        return min(max(2 * best, 4), self.largest)

    def best(self, running: int) -> int:
        """The size that pays most, as far as is known."""
        if not self.largest:
            return 0
        shared = min(running, MAX_ROWS)
        plain = shared / self._cost[shared]
        tokens = 1 + np.cumsum(self._luck[: self.largest])
        speed = tokens / (self._cost[self._rows] + self._guessing)
        at = int(speed.argmax())
        return at + 1 if speed[at] > plain else 0

    def record(self, tree: Tree, path: list[int], seconds: float) -> None:
        """A tree was guessed in `seconds` and verified; path: its nodes that were kept."""
        if not len(tree):
            self._asked = True
            return
        self._time(len(tree), seconds)
        kept = np.zeros(len(tree))
        kept[path] = 1.0
        luck = self._luck[: len(tree)]
        luck *= MEMORY
        luck += (1 - MEMORY) * kept
        if self._off and len(path) > 1:
            self._until, self._pause = 1, PROBE

    def _time(self, nodes: int, seconds: float) -> None:
        first = not self._times
        self._times.setdefault(nodes, deque(maxlen=RECENT)).append(seconds)
        if first:
            return
        # The least of some: a guess may have to catch up with a prompt, or with passes without one.
        sizes = sorted(self._times)
        least = np.array([min(self._times[size]) for size in sizes])
        # A larger tree takes no less time, whatever was measured.
        least = np.minimum.accumulate(least[::-1])[::-1]
        wanted = np.arange(1, self.largest + 1)
        between = np.interp(wanted, [0, *sizes], [0.0, *least])
        self._guessing = np.where(wanted > sizes[-1], least[-1] / sizes[-1] * wanted, between)


class LazySize:
    """Implements `Size`: measures when the first tree is wanted, so that loading costs nothing.

    folder: where costs are kept; questions: as `AutoSize`.
    """

    def __init__(self, executor: Executor, folder: Path, *, questions: int = 0) -> None:
        self._executor, self._questions = executor, questions
        self._folder = folder
        self._size: AutoSize | None = None

    def rows(self, running: int) -> int:
        """As `AutoSize`; 0 until there is room to measure."""
        if self._size is None:
            costs = remembered(self._executor, self._folder)
            if costs is None:
                return 0
            self._size = AutoSize(costs, questions=self._questions)
        return self._size.rows(running)

    def record(self, tree: Tree, path: list[int], seconds: float) -> None:
        """Passed on."""
        if self._size is not None:
            self._size.record(tree, path, seconds)
