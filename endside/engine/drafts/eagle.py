"""EAGLE-2, EAGLE-3 and multi-token prediction as sources of drafts: a head, and a tree it grows.

    accepted   the model's hidden states of what was stored are kept until the next token is known
    propose    pairs of state and next token run through the head; from the last of them a tree is
               grown level by level (`expand`)

Pairs are counted by their position in the text. Those of a prompt that was taken over from another
request have no states, and are simply missing from the window; so is everything before a gap.
"""

from __future__ import annotations

import numpy as np

from endside.engine.draft import Tree
from endside.engine.drafts.expand import DEPTH, WIDTH, expand
from endside.engine.drafts.head import PIECE, Head, Window
from endside.engine.request import Request


class Heads:
    """Implements `Drafts` with one head for all sequences."""

    def __init__(self, head: Head, *, depth: int = DEPTH, width: int = WIDTH) -> None:
        self.name = head.kind
        self.vocab_size = head.config.vocab_size
        self.feature_layers = head.feature_layers
        self.inputs: np.ndarray | None = None
        self.head, self.depth, self.width = head, depth, width

    def start(self, request: Request) -> HeadDrafter:
        """A drafter with an empty window."""
        return HeadDrafter(self.head, depth=self.depth, width=self.width)


class HeadDrafter:
    """Implements `Drafter`."""

    def __init__(self, head: Head, *, depth: int, width: int) -> None:
        self._head, self._depth, self._width = head, depth, width
        self._window: Window = head.window()
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []  # tokens and features, not yet run
        self._first = np.empty(0, np.float32)  # log-probabilities behind the last pair
        self._state = np.empty((0, 0), np.float32)  # what the last pair left (1, C)

    def accepted(self, tokens: np.ndarray, features: np.ndarray | None) -> None:
        """Keep the features (N, F) of what was stored; what the window would not hold goes."""
        assert features is not None, "a head was given no features of the model"
        rows = features.astype(np.float32)
        self._waiting.append((np.asarray(tokens[-len(rows) :]), rows))
        held = sum(len(one) for one, _ in self._waiting)
        while held - len(self._waiting[0][0]) >= self._window.size:
            held -= len(self._waiting.pop(0)[0])

    def propose(self, history: np.ndarray, rows: int) -> Tree:
        """The likeliest `rows` nodes after history (S,), whose last token is not stored yet."""
        self._commit(history)
        if not len(self._state):
            return Tree.empty()
        grown = _Growing(self._head, self._window, self._state, len(history) - 1)
        tree = expand(self._first, grown.step, rows=rows, depth=self._depth, width=self._width)
        return Tree(self._head.names(tree.tokens), tree.parents)

    def close(self) -> None:
        """Nothing is held outside this object."""

    def _commit(self, history: np.ndarray) -> None:
        """Run the pairs whose next token is known by now."""
        end = len(history) - 1
        kept, begin = [], end
        for tokens, features in reversed(self._waiting):
            if not np.array_equal(history[begin - len(tokens) : begin], tokens):
                break
            begin -= len(tokens)
            kept.append(features)
        self._waiting = []
        if not kept:
            return
        features = np.concatenate(kept[::-1])[-self._window.size :]
        begin = end - len(features)
        state = self._state
        for start in range(0, len(features), PIECE):
            part = slice(start, start + PIECE)
            hidden = self._head.hidden(features[part])
            state = self._run(history, hidden, begin + start)
        self._state = state[-1:]
        self._first = self._head.guess(self._state)[0]

    def _run(self, history: np.ndarray, hidden: np.ndarray, begin: int) -> np.ndarray:
        """Pairs begin .. of the text, each seeing the pairs before it; their keys stay."""
        new = len(hidden)
        self._window.slide(new)
        at = self._window.count
        positions = np.arange(begin, begin + new)
        seen = np.tril(np.ones((new, at + new), bool), at)
        states = self._head.run(history[positions + 1], hidden, positions, self._window, at, seen)
        self._window.count += new
        return states


class _Growing:
    """The tree of one proposal: its keys lie behind those of the text, and are forgotten."""

    def __init__(self, head: Head, window: Window, state: np.ndarray, position: int) -> None:
        self._head, self._window, self._position = head, window, position
        self._states = state  # row 0 is the text's last pair, node i is row i + 1
        self._depths = np.zeros(1, np.int64)
        self._above = np.zeros((0, 0), bool)  # who is an ancestor of whom, itself included

    def step(self, tokens: np.ndarray, parents: np.ndarray) -> np.ndarray:
        """Implements `Step`."""
        old, new, count = len(self._above), len(tokens), self._window.count
        above = np.zeros((old + new, old + new), bool)
        above[:old, :old] = self._above
        inner = parents >= 0
        above[old:][inner, :old] = self._above[parents[inner]]
        above[np.arange(old, old + new), np.arange(old, old + new)] = True
        self._above = above
        depths = self._depths[parents + 1] + 1
        self._depths = np.concatenate([self._depths, depths])
        seen = np.concatenate([np.ones((new, count), bool), above[old:]], 1)
        states = self._head.run(
            self._head.names(tokens), self._states[parents + 1], self._position + depths - 1,
            self._window, count + old, seen,
        )  # fmt: skip
        self._states = np.concatenate([self._states, states])
        return self._head.guess(states)
