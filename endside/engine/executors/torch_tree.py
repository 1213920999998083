"""Draft trees on the PyTorch executor: every path from the root to a leaf is a row of one batch.

A path is a fork of the sequence (its pages are shared up to the last), so each node stands at its
own position and sees what plain decoding would see there: in sparse attention the same summaries
and the same blocks, provisional ones of its own path included, with nothing special in attention or
cache. A tree of T nodes runs as leaves x depth rows, more than T where paths share beginnings; in
exchange there is no mask to get wrong. The native core, where speculation pays most, has the mask.

Where pages are short the paths run in several batches, at worst one by one on the sequence itself,
and what is accepted is then run again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from endside.model.cache import Cache, CacheFull

Run = Callable[[list[int], np.ndarray], torch.Tensor]  # seqs, tokens (B, T) -> hidden (B, T, C)


@dataclass
class Draft:
    """A verified tree that waits for its verdict."""

    tokens: np.ndarray  # (T,)
    paths: list[list[int]]  # rows from the root to each leaf
    forks: list[int] = field(default_factory=list)  # a sequence for each path, or none

    def depth(self) -> int:
        """Rows of the longest path."""
        return max(map(len, self.paths))


def paths(parents: np.ndarray) -> list[list[int]]:
    """parents (T,), before their children -> the rows from the root to each leaf."""
    above: list[list[int]] = []
    for row, parent in enumerate(parents.tolist()):
        above.append([*(above[parent] if parent >= 0 else []), row])
    inner = set(parents.tolist())
    return [path for row, path in enumerate(above) if row not in inner]


def verify(
    cache: Cache, seq: int, tokens: np.ndarray, parents: np.ndarray, run: Run
) -> tuple[Draft, torch.Tensor, np.ndarray]:
    """Run a tree behind `seq` -> the draft, hidden (T, C), and (T, 2) the batch row and column.

    Rows of `run` are numbered over all of its calls.
    """
    draft = Draft(np.array(tokens), paths(parents))
    batch = np.zeros((len(draft.paths), draft.depth()), np.int64)
    place = np.full((len(tokens), 2), -1, np.int64)
    for number, path in enumerate(draft.paths):
        batch[number] = tokens[path[-1]]  # behind a leaf anything may stand
        batch[number, : len(path)] = tokens[path]
        for column, row in enumerate(path):
            place[row] = number, column
    parts: list[torch.Tensor] = []
    done = 0
    while done < len(batch):
        forks = _forks(cache, seq, len(batch) - done, batch.shape[1])
        group = batch[done : done + max(1, len(forks))]
        parts.append(run(forks or [seq], group))
        if len(group) == len(batch) and forks:
            draft.forks = forks
        elif forks:
            _close(cache, forks)
        else:
            cache.trim(seq, cache.length(seq) - batch.shape[1])
        done += len(group)
    hidden = torch.cat(parts)
    return draft, hidden[place[:, 0], place[:, 1]], place


def _forks(cache: Cache, seq: int, wanted: int, depth: int) -> list[int]:
    """As many forks of `seq` as there are pages for, each with room for `depth` more tokens."""
    forks: list[int] = []
    try:
        for _ in range(wanted):
            forks.append(cache.fork(seq, cache.length(seq) + depth))
    except CacheFull:
        pass
    return forks


def accept(cache: Cache, seq: int, draft: Draft, rows: list[int], run: Run) -> None:
    """Store these rows, root to leaf, behind `seq`, and forget the others."""
    if rows and draft.forks:
        fork = next(
            fork
            for fork, path in zip(draft.forks, draft.paths, strict=True)
            if path[: len(rows)] == rows
        )
        cache.extend(seq, fork, len(rows))
    elif rows:
        run([seq], draft.tokens[rows][None])
    _close(cache, draft.forks)


def drop(cache: Cache, draft: Draft) -> None:
    """Forget a tree."""
    _close(cache, draft.forks)


def _close(cache: Cache, forks: list[int]) -> None:
    for fork in forks:
        cache.close(fork)
