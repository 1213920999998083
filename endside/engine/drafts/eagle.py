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
from endside.engine.drafts.expand import DEPTH, WIDTH, Guesses, expand
from endside.engine.drafts.head import BITS, PIECE, Head, Rows, Window
from endside.engine.request import Request


class Heads:
    """Implements `Drafts` with one head for all sequences."""

    def __init__(self, head: Head, *, depth: int = DEPTH, width: int = WIDTH) -> None:
        assert (depth - 1) * width <= BITS, "more nodes than bits would be asked for children"
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
        self._first: Guesses | None = None  # what may follow the last pair
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
        if self._first is None:
            return Tree.empty()
        grown = _Growing(self._head, self._window, self._state, len(history) - 1, self._width)
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
        for start in range(0, len(features), PIECE):
            hidden = self._head.hidden(features[start : start + PIECE])
            self._run(history, hidden, end - len(features) + start)

    def _run(self, history: np.ndarray, hidden: np.ndarray, begin: int) -> None:
        """Pairs begin .. of the text; their keys stay."""
        new = len(hidden)
        self._window.slide(new)
        tokens = history[begin + 1 : begin + 1 + new]
        rows = Rows.text(tokens, hidden, begin, self._window.count)
        states, self._first = self._head.run(rows, self._window, guesses=1, width=self._width)
        self._window.count += new
        self._state = states[-1:]


class _Growing:
    """The tree of one proposal: its keys lie behind those of the text, and are forgotten."""

    def __init__(
        self, head: Head, window: Window, state: np.ndarray, position: int, width: int
    ) -> None:
        self._head, self._window, self._position, self._width = head, window, position, width
        self._states = state  # row 0 is the text's last pair, node i is row i + 1
        self._depths = np.zeros(1, np.int64)
        self._above = np.zeros(1, np.uint64)  # a bit for each ancestor, itself included

    def step(self, tokens: np.ndarray, parents: np.ndarray) -> Guesses:
        """Implements `Step`."""
        old, count = len(self._states) - 1, self._window.count
        at = parents + 1
        depths = self._depths[at] + 1
        own = np.uint64(1) << np.arange(old, old + len(tokens), dtype=np.uint64)
        above = self._above[at] | own
        rows = Rows(
            self._head.names(tokens), self._states[at], self._position + depths - 1,
            count + old, np.full(len(tokens), count), above,
        )  # fmt: skip
        states, found = self._head.run(rows, self._window, guesses=len(tokens), width=self._width)
        self._states = np.concatenate([self._states, states])
        self._depths = np.concatenate([self._depths, depths])
        self._above = np.concatenate([self._above, above])
        return found
