"""The likeliest nodes of a tree, found level by level: the same as by trying every path."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from endside.engine.drafts.expand import Guesses, expand, likeliest

VOCAB = 7


class Markov:
    """A draft whose next token depends on the last two, and that remembers what it was given."""

    def __init__(self, seed: int, width: int = VOCAB) -> None:
        self.width = width
        noise = np.random.default_rng(seed).normal(size=(VOCAB, VOCAB, VOCAB)) * 2
        self.table = noise - np.log(np.exp(noise).sum(-1, keepdims=True))
        self.paths: list[tuple[int, ...]] = []
        self.calls = 0

    def after(self, path: tuple[int, ...]) -> np.ndarray:
        before, last = (0, 0, *path)[-2:]
        return self.table[before, last]

    def first(self) -> Guesses:
        return likeliest(self.after(())[None], self.width)

    def step(self, tokens: np.ndarray, parents: np.ndarray) -> Guesses:
        self.calls += 1
        known = len(self.paths)
        assert (parents < known).all(), "a parent was never given"
        for token, parent in zip(tokens.tolist(), parents.tolist(), strict=True):
            self.paths.append((*(self.paths[parent] if parent >= 0 else ()), token))
        return likeliest(np.stack([self.after(path) for path in self.paths[known:]]), self.width)

    def score(self, path: tuple[int, ...]) -> float:
        return sum(self.after(path[:n])[token] for n, token in enumerate(path))


def paths_of(tree) -> list[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens.tolist(), tree.parents.tolist(), strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    return paths


@pytest.mark.parametrize("rows", [1, 2, 5, 7])
@pytest.mark.parametrize("seed", range(6))
def test_the_likeliest_nodes_of_all(seed: int, rows: int) -> None:
    draft = Markov(seed)
    tree = expand(draft.first(), draft.step, rows=rows, depth=4, width=VOCAB)
    every = [p for n in range(1, 5) for p in itertools.product(range(VOCAB), repeat=n)]
    best = sorted(every, key=draft.score, reverse=True)[:rows]
    assert set(paths_of(tree)) == set(best)
    tree.check(VOCAB)


@pytest.mark.parametrize("depth,width,rows", [(1, 3, 9), (2, 1, 4), (6, 2, 40), (3, 99, 63)])
def test_bounds_hold(depth: int, width: int, rows: int) -> None:
    draft = Markov(1, width)
    tree = expand(draft.first(), draft.step, rows=rows, depth=depth, width=width)
    tree.check(VOCAB)
    assert len(tree) <= rows and tree.depths().max() <= depth
    assert len(set(paths_of(tree))) == len(tree), "no node twice"
    assert draft.calls <= depth - 1


def test_any_beginning_of_the_tree_is_the_smaller_tree() -> None:
    """The engine cuts trees: what is left must be the likeliest of them."""
    whole = paths_of(expand(Markov(3).first(), Markov(3).step, rows=20, depth=4))
    draft = Markov(3)
    some = paths_of(expand(draft.first(), draft.step, rows=6, depth=4))
    assert whole[:6] == some


def test_a_sure_draft_is_asked_for_a_chain() -> None:
    """Every level is one node when the first guess is nearly certain."""
    sure = np.full((1, VOCAB), -20.0)
    sure[0, 2] = -1e-8
    asked = []

    def step(tokens: np.ndarray, parents: np.ndarray) -> Guesses:
        asked.append(len(tokens))
        return likeliest(np.repeat(sure, len(tokens), 0), VOCAB)

    tree = expand(likeliest(sure, VOCAB), step, rows=4, depth=6)
    assert tree.tokens.tolist() == [2, 2, 2, 2] and tree.parents.tolist() == [-1, 0, 1, 2]
    assert asked == [1, 1, 1], "only what can enter the tree is asked for"


def test_equal_chances_come_in_the_order_of_tokens() -> None:
    chances = np.array([[1, 3, 3, 0, 3, 1, 1], [2, 2, 2, 2, 2, 2, 2], [0, 1, 2, 3, 4, 5, 6]], float)
    found = likeliest(chances, 4)
    assert found.tokens.tolist() == [[1, 2, 4, 0], [0, 1, 2, 3], [6, 5, 4, 3]]
    assert found.chances.tolist() == [[3, 3, 3, 1], [2, 2, 2, 2], [6, 5, 4, 3]]
    assert likeliest(chances, 99).tokens.shape == (3, VOCAB)
