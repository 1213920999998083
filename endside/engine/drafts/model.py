"""A smaller model with the same vocabulary as the source of drafts (arXiv 2211.17192).

It keeps its own keys of the text. Before it guesses, what it stored is cut back to where it agrees
with the text, and the rest is run. The tree grows level by level (`expand`); a level is one pass
over the whole tree so far, since an executor keeps no keys of a tree between passes: its rows are
few, and a model worth drafting with is small.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from endside.checkpoint import Checkpoint
from endside.engine.draft import MAX_ROWS, Tree
from endside.engine.drafts.expand import DEPTH, Guesses, expand, likeliest
from endside.engine.executor import Executor, Full
from endside.engine.executors import Plan, create
from endside.engine.request import Request

PIECE = 512  # tokens of a prompt at a time
WIDTH = 4  # nodes of a level: every one is a row of a pass


def load(checkpoint: Checkpoint, target: Executor, plan: Plan) -> ModelDrafts:
    """The model of a folder on the target's executor, for as many and as long texts."""
    sizes = {"context": target.context, "capacity": target.capacity}
    return ModelDrafts(create(checkpoint, replace(plan, draft="none", **sizes)))


class ModelDrafts:
    """Implements `Drafts` with an executor of its own."""

    feature_layers: tuple[int, ...] = ()
    inputs: np.ndarray | None = None

    def __init__(self, executor: Executor, *, depth: int = DEPTH, width: int = WIDTH) -> None:
        self.name, self.vocab_size = "model", executor.vocab_size
        self.executor, self.depth, self.width = executor, depth, width

    def start(self, request: Request) -> ModelDrafter:
        """A drafter that takes pages when it is first asked."""
        wanted = request.sampling.max_tokens
        longest = self.executor.context
        if wanted is not None:
            longest = min(longest, len(request.tokens) + wanted + MAX_ROWS)
        return ModelDrafter(self, longest)


class ModelDrafter:
    """Implements `Drafter`. longest: tokens of text and tree together."""

    def __init__(self, drafts: ModelDrafts, longest: int) -> None:
        self._drafts, self._executor, self._longest = drafts, drafts.executor, longest
        self._seq: int | None = None
        self._stored = np.empty(0, np.int64)

    def propose(self, history: np.ndarray, rows: int) -> Tree:
        """The likeliest `rows` nodes after history (S,); none where its pages are all taken."""
        rows = min(rows, self._longest - len(history))
        if rows < 1 or not self._open():
            return Tree.empty()
        first = self._follow(history)
        drafts = self._drafts
        grown = _Growing(self._executor, self._seq, len(history), drafts.width)
        return expand(
            likeliest(first, drafts.width),
            grown.step,
            rows=rows,
            depth=drafts.depth,
            width=drafts.width,
        )

    def accepted(self, tokens: np.ndarray, features: np.ndarray | None) -> None:
        """The history holds all it needs."""

    def close(self) -> None:
        """Give its pages back."""
        if self._seq is not None:
            self._executor.close(self._seq)
            self._seq = None

    def _open(self) -> bool:
        if self._seq is None:
            try:
                self._seq = self._executor.open(self._longest)
            except Full:
                return False
        return True

    def _follow(self, history: np.ndarray) -> np.ndarray:
        """Store history (S,), and give the log-probabilities behind it (1, V)."""
        size = min(len(self._stored), len(history) - 1)
        same = self._stored[:size] == history[:size]
        agreed = size if same.all() else int(np.argmin(same))
        self._executor.trim(self._seq, agreed)
        missing = history[agreed:]
        logits = None
        for start in range(0, len(missing), PIECE):
            logits = self._executor.prefill(self._seq, missing[start : start + PIECE])
        self._stored = history.copy()
        assert logits is not None, "the last token is always run"
        return _log_probabilities(logits[None])


class _Growing:
    """The tree of one proposal."""

    def __init__(self, executor: Executor, seq: int | None, length: int, width: int) -> None:
        assert seq is not None, "pages are taken first"
        self._executor, self._seq = executor, seq
        self._length, self._width = length, width
        self._tokens = np.empty(0, np.int64)
        self._parents = np.empty(0, np.int32)

    def step(self, tokens: np.ndarray, parents: np.ndarray) -> Guesses:
        """Implements `Step`."""
        self._tokens = np.concatenate([self._tokens, tokens])
        self._parents = np.concatenate([self._parents, parents.astype(np.int32)])
        logits = self._executor.verify(self._seq, self._tokens, self._parents)
        self._executor.trim(self._seq, self._length)
        return likeliest(_log_probabilities(logits[-len(tokens) :]), self._width)


def _log_probabilities(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
