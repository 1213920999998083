"""Prompt lookup: what followed the same words before will follow them again. No model at all.

The last n tokens are looked for earlier in prompt and answer, longest n first; what stood behind an
occurrence is the guess. It pays where text is repeated: editing, summarising, code, tool calls.
(Saxena, "Prompt Lookup Decoding", 2023; LLMA, arXiv 2304.04487.)

Several occurrences rarely go on alike for long, so their continuations are merged into one tree:
the most recent one of the longest match first, as a full chain, then branches of others, as rows
allow. Every occurrence is found through an index of the last `LEAST` tokens, kept up to date as the
text grows, so a guess costs microseconds however long the context is.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from endside.engine.draft import Tree
from endside.engine.request import Request

LEAST = 2  # tokens that must agree; one alone matches almost anywhere
MOST = 16  # agreement beyond this makes no guess better
OCCURRENCES = 16  # looked at, most recent first
BRANCHES = 3  # continuations merged into one tree


class Lookup:
    """Implements `Drafts`."""

    name = "lookup"
    vocab_size = None
    feature_layers: tuple[int, ...] = ()
    inputs: np.ndarray | None = None

    def start(self, request: Request) -> LookupDrafter:
        """A drafter that knows the prompt and what is answered."""
        return LookupDrafter()


class LookupDrafter:
    """Implements `Drafter`; `_index` maps LEAST tokens to the places behind them, oldest first."""

    def __init__(self) -> None:
        self._index: dict[tuple[int, ...], list[int]] = defaultdict(list)
        self._seen = 0  # tokens of the history that are in the index

    def propose(self, history: np.ndarray, rows: int) -> Tree:
        """Continuations of earlier places that end like history (S,) does, as a tree."""
        self._extend(history)
        last = tuple(history[-LEAST:].tolist())
        places = [at for at in self._index.get(last, ())[-OCCURRENCES - 1 :] if at < len(history)]
        if not places:
            return Tree.empty()
        # Longest agreement first, then the most recent.
        ranked = sorted(places, key=lambda at: (_agreement(history, at), at), reverse=True)
        tree = _Growing(rows)
        for at in ranked[:BRANCHES]:
            tree.add(history[at : at + rows].tolist())
        return tree.done()

    def accepted(self, tokens: np.ndarray, features: np.ndarray | None) -> None:
        """The history holds all it needs."""

    def close(self) -> None:
        """Nothing is held outside this object."""

    def _extend(self, history: np.ndarray) -> None:
        start = max(self._seen, LEAST)
        tokens = history[start - LEAST :].tolist()
        for offset in range(len(history) - start + 1):
            key = tuple(tokens[offset : offset + LEAST])
            self._index[key].append(start + offset)
        self._seen = len(history) + 1


def _agreement(history: np.ndarray, at: int) -> int:
    """How many tokens before `at` equal the last ones of history (S,)."""
    size = min(MOST, at)
    same = history[at - size : at] == history[len(history) - size :]
    return size if same.all() else int(np.argmin(same[::-1]))


class _Growing:
    """A tree that shares the beginnings of the chains added to it."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._nodes: dict[tuple[int, int], int] = {}  # (parent, token) -> row
        self._tokens: list[int] = []
        self._parents: list[int] = []

    def add(self, chain: list[int]) -> None:
        parent = -1
        for token in chain:
            row = self._nodes.get((parent, token))
            if row is None:
                if len(self._tokens) == self._rows:
                    return
                row = self._nodes[parent, token] = len(self._tokens)
                self._tokens.append(token)
                self._parents.append(parent)
            parent = row

    def done(self) -> Tree:
        return Tree(np.array(self._tokens, np.int64), np.array(self._parents, np.int32))
