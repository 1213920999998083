"""Guesses of the next tokens, verified in one pass of the model: what a source of drafts is.

    propose ──► Tree ──► Executor.verify: logits of every node ──► the walk ──► Executor.accept

The walk draws the model's own next token at the root, exactly as plain decoding would; if a child
holds that token, its row already has the logits for the one after, and so on. A draft therefore
changes no token, greedy or sampled: with one uniform number per token the text of a seed stays the
same. Where the children of a node are given (not drawn at random), the chance to get one token
further is the sum of their probabilities under the model, which is also what testing them one by
one with renormalisation gives (EAGLE's rejection sampling); docs/decisions.md has the proof.

Not here: drafts that are sampled. Rejection sampling could accept more of them, but deterministic
trees of the likeliest tokens do better and keep the seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from endside.engine.request import Request
from endside.errors import UserError

MAX_ROWS = 64  # of a tree with its root: one bit of a mask each


@dataclass(frozen=True)
class Tree:
    """Tokens guessed, parents before children. A parent of -1 is the last token of the text."""

    tokens: np.ndarray  # (T,) int64
    parents: np.ndarray  # (T,) int32

    def __len__(self) -> int:
        return len(self.tokens)

    @staticmethod
    def empty() -> Tree:
        """No guess: the sequence decodes one token."""
        return Tree(np.empty(0, np.int64), np.empty(0, np.int32))

    @staticmethod
    def chain(tokens: list[int]) -> Tree:
        """One guess of several tokens in a row."""
        return Tree(np.array(tokens, np.int64), np.arange(-1, len(tokens) - 1, dtype=np.int32))

    def depths(self) -> np.ndarray:
        """(T,) tokens from the text to each node, 1 for the first."""
        depths = np.empty(len(self), np.int32)
        for row, parent in enumerate(self.parents.tolist()):
            depths[row] = 1 if parent < 0 else depths[parent] + 1
        return depths

    def cut(self, rows: int, depth: int) -> Tree:
        """The nodes among the first `rows` that are at most `depth` tokens deep."""
        return self._kept(np.flatnonzero(self.depths()[:rows] <= depth))

    def guesses(self, vocab_size: int) -> Tree:
        """Without questions: nodes whose tokens lie behind the vocabulary, which stand last."""
        return self._kept(np.flatnonzero(self.tokens < vocab_size))

    def _kept(self, keep: np.ndarray) -> Tree:
        if len(keep) == len(self):
            return self
        place = np.full(len(self), -1, np.int32)
        place[keep] = np.arange(len(keep))
        parents = self.parents[keep]
        # Depths grow along a path and parents come first; a guess never stands behind a question:
        # so every kept node's parent is kept.
        return Tree(self.tokens[keep], np.where(parents < 0, -1, place[parents]).astype(np.int32))

    def check(self, vocab_size: int) -> None:
        """Raises UserError for a tree that no executor could verify."""
        if len(self) >= MAX_ROWS:
            raise UserError(
                f"a draft of {len(self)} tokens: with the last token at most {MAX_ROWS} rows are "
                "verified at once; ask for a smaller tree"
            )
        rows = np.arange(len(self))
        if ((self.parents < -1) | (self.parents >= rows)).any():
            raise UserError("a draft's parents must come before their children, roots have -1")
        if len(self) and not 0 <= self.tokens.min() <= self.tokens.max() < vocab_size:
            raise UserError(
                f"a draft holds a token that the model's vocabulary of {vocab_size} lacks: "
                "it was made for another model"
            )


class Drafter(Protocol):
    """The source of one sequence's guesses."""

    def propose(self, history: np.ndarray, rows: int) -> Tree:
        """At most `rows` nodes that may follow history (S,), prompt and answer so far.

        Behind them may stand questions: tokens of its `Drafts.inputs`, which are not counted.
        """
        ...

    def accepted(self, tokens: np.ndarray, features: np.ndarray | None) -> None:
        """These tokens (N,) are stored now, in order; the model's features of them (N, ·).

        After an interrupt some may be missing: a drafter that needs all of them guesses no more
        once they do not add up to the history.
        """
        ...

    def close(self) -> None:
        """The sequence has ended."""
        ...


@runtime_checkable
class Asking(Protocol):
    """A drafter that puts questions into its trees."""

    def verified(self, tree: Tree, logits: np.ndarray, path: list[int]) -> None:
        """After `accepted`: logits (T + 1, V) of the root and the tree's nodes; path: rows kept."""
        ...


class Drafts(Protocol):
    """Makes drafters for the sequences of one engine."""

    name: str
    vocab_size: int | None  # None: it has no vocabulary of its own
    feature_layers: tuple[int, ...]  # what it wants to see of the model (Executor.features)
    inputs: np.ndarray | None  # (I, C) tokens of its own (Executor.set_inputs), to ask the model by

    def start(self, request: Request) -> Drafter:
        """A drafter for a new sequence, before its prompt is run."""
        ...


class Size(Protocol):
    """How many guesses a tree should have now."""

    def rows(self, running: int) -> int:
        """Guesses of the next tree while `running` sequences answer; 0: decode plainly."""
        ...

    def record(self, tree: Tree, path: list[int], seconds: float) -> None:
        """A tree (its guesses) that took `seconds` was verified and these nodes were kept."""
        ...


@dataclass(frozen=True)
class FixedSize:
    """Always as many nodes as given."""

    nodes: int = 11  # with the root, 12 rows: what CPM.cu verifies

    def rows(self, running: int) -> int:
        """As many as it was made with."""
        return self.nodes

    def record(self, tree: Tree, path: list[int], seconds: float) -> None:
        """Nothing is learnt."""


def check_drafts(drafts: Drafts, vocab_size: int) -> None:
    """Refuse a source whose tokens mean something else. Raises UserError."""
    if drafts.vocab_size is not None and drafts.vocab_size != vocab_size:
        raise UserError(
            f"the draft {drafts.name} has a vocabulary of {drafts.vocab_size:,} tokens, the model "
            f"one of {vocab_size:,}: use a draft made for this model"
        )
