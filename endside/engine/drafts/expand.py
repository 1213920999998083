"""Which tokens a draft model should be asked about, and which of its guesses are worth verifying.

EAGLE-2 (arXiv 2406.16858, section 4): what a draft model believes in is about what the model will
accept, so the product of its probabilities along a path tells how likely the path is to be kept.

    expand     a level at a time: of all children of the last level the `width` likeliest paths
               become the next level, whose children are then asked for in one call
    re-rank    of all nodes met, the `rows` likeliest are the tree. A path is never likelier than
               its beginning, so every node kept has its parent kept too

A level is not asked for where no path of it could enter the tree: where `rows` likelier nodes are
known already. With few rows and a sure draft the tree is a chain, with many a bush.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

from endside.engine.draft import Tree

DEPTH = 6  # levels at most
WIDTH = 10  # nodes of a level that are asked for their children, and children looked at of each


class Guesses(NamedTuple):
    """What may follow n rows: tokens (n, w) and their log-probabilities (n, w), likeliest first."""

    tokens: np.ndarray
    chances: np.ndarray


class Step(Protocol):
    """A draft model that has seen the text and the nodes given before."""

    def __call__(self, tokens: np.ndarray, parents: np.ndarray) -> Guesses:
        """Nodes of one level: tokens (n,), parents (n,) -> what may follow each.

        parents number the nodes given so far, in order; -1 is the text's last token.
        """
        ...


def expand(
    first: Guesses, step: Step, *, rows: int, depth: int = DEPTH, width: int = WIDTH
) -> Tree:
    """The `rows` likeliest nodes of a tree; first (1, w): what may follow the text."""
    grown = _Nodes()
    level = grown.add(np.array([-1]), np.zeros(1), first)
    asked = np.empty(0, np.int64)  # nodes given to `step`, in its order
    for _ in range(depth - 1):
        level = _worth(grown, level, rows, width)
        if not len(level):
            break
        parents = _places(asked, grown.parents[level])
        asked = np.concatenate([asked, level])
        after = step(grown.tokens[level], parents)
        level = grown.add(level, grown.scores[level], after)
    return _best(grown, rows)


class _Nodes:
    """All nodes met so far."""

    def __init__(self) -> None:
        self.tokens = np.empty(0, np.int64)
        self.parents = np.empty(0, np.int64)  # nodes, -1: none
        self.scores = np.empty(0, np.float64)  # log-probability of the path

    def add(self, nodes: np.ndarray, scores: np.ndarray, after: Guesses) -> np.ndarray:
        """Children of nodes (n,) -> their numbers."""
        tokens, chances = after
        paths = scores[:, None] + chances
        begin = len(self.tokens)
        self.tokens = np.concatenate([self.tokens, tokens.ravel()])
        self.parents = np.concatenate([self.parents, np.repeat(nodes, tokens.shape[1])])
        self.scores = np.concatenate([self.scores, paths.ravel()])
        return np.arange(begin, len(self.tokens))


def likeliest(chances: np.ndarray, count: int) -> Guesses:
    """chances (n, V) -> the largest of each row; of equal ones the lower token first."""
    count = min(count, chances.shape[1])
    least = np.partition(chances, -count, axis=1)[:, -count]
    tokens = np.empty((len(chances), count), np.int64)
    for row, (values, bound) in enumerate(zip(chances, least, strict=True)):
        some = np.flatnonzero(values >= bound)
        tokens[row] = some[np.argsort(-values[some], kind="stable")][:count]
    return Guesses(tokens, np.take_along_axis(chances, tokens, 1))


def _worth(grown: _Nodes, level: np.ndarray, rows: int, width: int) -> np.ndarray:
    """The likeliest nodes of a level whose children might still be among the best `rows`."""
    ranked = level[np.argsort(-grown.scores[level], kind="stable")][:width]
    if len(grown.scores) <= rows:
        return ranked
    least = np.partition(grown.scores, -rows)[-rows]
    return ranked[grown.scores[ranked] > least]


def _places(asked: np.ndarray, parents: np.ndarray) -> np.ndarray:
    """Where each parent stands among the nodes that were asked about; -1 stays."""
    place = np.full(1 + max(asked.max(initial=-1), parents.max()) + 1, -1, np.int64)
    place[asked] = np.arange(len(asked))
    return place[parents]


def _best(grown: _Nodes, rows: int) -> Tree:
    """The likeliest nodes, likeliest first: parents stand before children, and a cut keeps both."""
    # A child as likely as its parent was met later, and a stable sort keeps that order.
    kept = np.argsort(-grown.scores, kind="stable")[:rows]
    place = np.full(len(grown.scores) + 1, -1, np.int32)  # the last entry: a parent of -1
    place[kept] = np.arange(len(kept))
    return Tree(grown.tokens[kept], place[grown.parents[kept]])
