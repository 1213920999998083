"""The model drafts for itself: mask tokens behind its text ask what comes there.

    tree   guesses, and behind the text's last token and every guess the same soft tokens:

           last ─┬─ P₁ … Pₚ M₁ … Mₘ           P prompts, M masks: rows of numbers tuned for this
                 └─ guess ─┬─ P₁ … Pₚ M₁ … Mₘ    (train/bita.py), tokens behind the vocabulary
                           └─ guess …
    pass   verifies the guesses and, at M₁ … Mₘ behind the last one kept, says what comes two,
           three … tokens further: the next guesses, for no pass of their own and no second model

(BiTA, arXiv 2401.12522.) A soft row is never on the path kept, so nothing of it enters the cache,
and every guess is verified like any other's. Guesses of several levels make a tree by the product
of their probabilities (`expand`), though a mask does not know which guess stands before it.

What we chose not to do: BiTA's prompts stand before the whole text and only masks see them, which
takes a second kind of visibility in every attention kernel. Here they stand between text and masks,
which takes rows: a pass over g guesses has g + (1 + g)(p + m) of them behind the last token.
"""

from __future__ import annotations

import numpy as np

from endside.engine.draft import MAX_ROWS, Tree
from endside.engine.drafts.expand import Guesses, expand, likeliest
from endside.engine.request import Request
from endside.formats.draft_soft import SoftTokens

WIDTH = 4  # guesses of each mask that are looked at


class Bita:
    """Implements `Drafts` for one model."""

    name = "bita"
    feature_layers: tuple[int, ...] = ()

    def __init__(self, soft: SoftTokens) -> None:
        self.vocab_size = soft.config.vocab_size
        self.inputs: np.ndarray | None = soft.rows
        self.prompts = soft.prompts

    def start(self, request: Request) -> BitaDrafter:
        """A drafter that asks first."""
        return BitaDrafter(self.vocab_size, self.inputs, self.prompts)


class BitaDrafter:
    """Implements `Drafter`."""

    def __init__(self, vocab_size: int, inputs: np.ndarray, prompts: int) -> None:
        self._vocab, self._prompts = vocab_size, prompts
        self._soft = np.arange(vocab_size, vocab_size + len(inputs))
        self._answers = np.empty((0, 0), np.float32)  # (m, V) log-probabilities of what comes

    def propose(self, history: np.ndarray, rows: int) -> Tree:
        """At most `rows` guesses behind history (S,), and the questions behind them."""
        size = len(self._soft)
        tree = Tree.empty()
        rows = min(rows, (MAX_ROWS - 1 - size) // (1 + size))
        if len(self._answers) and rows > 0:
            tree = _guesses(self._answers, rows)
        asked = np.tile(self._soft, 1 + len(tree))
        first = len(tree) + size * np.arange(1 + len(tree))[:, None]
        chains = first + np.arange(-1, size - 1)
        chains[:, 0] = np.arange(-1, len(tree))
        return Tree(
            np.concatenate([tree.tokens, asked]),
            np.concatenate([tree.parents, chains.ravel()]).astype(np.int32),
        )

    def accepted(self, tokens: np.ndarray, features: np.ndarray | None) -> None:
        """The text is longer: what was answered about it is old."""
        self._answers = self._answers[:0]

    def verified(self, tree: Tree, logits: np.ndarray, path: list[int]) -> None:
        """What the masks behind the last row kept say; a tree that was cut has fewer of them."""
        rows, node = [], path[-1] - 1
        for token in self._soft.tolist():
            behind = np.flatnonzero((tree.parents == node) & (tree.tokens == token))
            if not len(behind):
                break
            node = int(behind[0])
            rows.append(node + 1)
        said = logits[rows[self._prompts :]].astype(np.float32)
        shifted = said - said.max(1, keepdims=True)
        self._answers = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))

    def close(self) -> None:
        """Nothing is held outside this object."""


def _guesses(answers: np.ndarray, rows: int) -> Tree:
    """answers (m, V): what each level of a tree is -> its `rows` likeliest nodes."""
    levels = zip(*likeliest(answers, WIDTH), strict=True)  # (w,) tokens, (w,) chances

    def following(count: int) -> Guesses:
        tokens, chances = next(levels)
        return Guesses(np.tile(tokens, (count, 1)), np.tile(chances, (count, 1)))

    def step(nodes: np.ndarray, parents: np.ndarray) -> Guesses:
        return following(len(nodes))

    return expand(following(1), step, rows=rows, depth=len(answers), width=WIDTH)
