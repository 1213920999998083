"""The draft head in the native core beside the same head in numpy.

Integers decide in products of low bits, so they are equal; float sums have another order. What may
differ is said by TOLERANCE: last bits in float32, and with int8 activations now and then one that
falls on the other side of a rounding edge.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from endside import native
from endside.engine.drafts.eagle import HeadDrafter, Heads
from endside.engine.drafts.expand import likeliest
from endside.engine.drafts.head import PIECE, Head, Rows
from endside.engine.drafts.native_head import NativeHead
from endside.errors import UserError
from endside.model.draft import KINDS
from endside.model.transformer import Transformer
from endside.native.draft import Team
from tests.engine.drafts.test_heads import made, plain, weights
from tests.engine.tiny import HAS_CORE, VOCAB, tokens

pytestmark = pytest.mark.skipif(not HAS_CORE, reason="core")

# Of a log-probability; the guesses of these heads lie several nats apart.
TOLERANCE = {"float32": 2e-5, "float": 2e-5, "int8": 0.02, "int4": 0.02}
BITS = list(TOLERANCE)


def pair(
    kind: str, model: Transformer, bits: str, *, isa: str = "auto", ids: np.ndarray | None = None
) -> tuple[Head, NativeHead]:
    """One head, in numpy and in the core."""
    table = model.embed_tokens.weight.detach().numpy()
    own = table if model.config.tie_word_embeddings else model.lm_head.weight.detach().numpy()
    scale = np.float32(model.config.scale_emb)
    head = weights(made(kind, model.config, rows=83 if kind == "eagle3" else 0), ids)
    given = {
        "embed": lambda ids: table[ids] * scale,
        "rows": lambda ids: own[ids],
        "context": model.config.max_position_embeddings,
        "bits": bits,
    }
    team = Team(threads=2, isa=isa)
    return Head(head, model.config, **given), NativeHead(head, model.config, team=team, **given)


def features(head: Head, count: int, seed: int = 0) -> np.ndarray:
    width = (3 if head.kind == "eagle3" else 1) * head.config.hidden_size
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


def scores(tree, head: Head) -> dict[tuple[int, ...], int]:
    """The paths of a tree, and their places."""
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens.tolist(), tree.parents.tolist(), strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    return {path: at for at, path in enumerate(paths)}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_trees_along_a_text(kind: str, bits: str) -> None:
    """Prompt in pieces, then tokens one by one or several: at each place the whole expansion.

    The same nodes in the same order; a node may change places with one that is as likely within
    the tolerance, and only such.
    """
    model = plain(max_position_embeddings=4096)
    ids = np.sort(np.random.default_rng(0).permutation(VOCAB)[:83])
    heads = pair(kind, model, bits, ids=ids)
    text, given = tokens(460), features(heads[0], 460)
    drafters = [Heads(head, depth=5, width=6).start(None) for head in heads]
    same = done = places = 0
    for size in [350, 1, 1, 3, 1, 40, *[1, 2] * 12]:
        trees, met = [], []
        for drafter in drafters:
            drafter.accepted(text[done : done + size], given[done : done + size])
            trees.append(drafter.propose(text[: done + size + 1], 24))
            met.append(drafter)
        done, places = done + size, places + 1
        numpy, core = met
        np.testing.assert_allclose(
            core._first.chances, numpy._first.chances, atol=TOLERANCE[bits], rtol=0
        )
        same += trees[0].tokens.tolist() == trees[1].tokens.tolist()
        assert set(trees[0].tokens.tolist()) <= set(ids.tolist())
        _only_near_ties_differ(heads[0], drafters[0], text[: done + 1], trees, TOLERANCE[bits])
    assert same >= (places if bits.startswith("float") else 0.8 * places), f"{same} of {places}"


def _only_near_ties_differ(head: Head, drafter: HeadDrafter, text, trees, bound: float) -> None:
    """Nodes that only one tree has are as likely as the least likely node of the other."""
    paths = [scores(tree, head) for tree in trees]
    odd = set(paths[0]) ^ set(paths[1])
    if not odd:
        return
    known = {path: _chance(head, drafter, text, path) for path in set(paths[0]) | odd}
    least = min(known[path] for path in paths[0])
    for path in odd:
        assert abs(known[path] - least) <= bound * len(path), (path, known[path], least)


def _chance(head: Head, drafter: HeadDrafter, text: np.ndarray, path: tuple[int, ...]) -> float:
    """What the head in numpy gives a path: the sum of its log-probabilities, one call a node."""
    place = {int(token): at for at, token in enumerate(head.ids)}
    state, count, total = drafter._state, drafter._window.count, 0.0
    for depth, token in enumerate(path):
        total += float(head.guess(state)[0, place[token]])
        rows = Rows(
            np.array([token]), state, np.array([len(text) - 1 + depth]), count + depth,
            np.array([count]), np.array([(1 << (depth + 1)) - 1], np.uint64),
        )  # fmt: skip
        state, _ = head.run(rows, drafter._window)
    return total


@pytest.mark.parametrize("isa", native.available_isas())
@pytest.mark.parametrize("kind", KINDS)
def test_states_of_every_instruction_set(kind: str, isa: str) -> None:
    """float32 weights: what the layer leaves, of a text and of a bush behind it."""
    numpy, core = pair(kind, plain(), "float32", isa=isa)
    text, given = tokens(150), features(numpy, 149)
    for head in (numpy, core):
        window, hidden = head.window(), head.hidden(given)
        first, one = head.run(Rows.text(text[1:], hidden, 7, 0), window, guesses=3, width=9)
        bush = Rows(
            text[:4], first[[-1, -1, -1, -1]], np.array([156, 156, 157, 157]), 149,
            np.full(4, 149), np.array([1, 2, 5, 10], np.uint64),
        )  # fmt: skip
        second, two = head.run(bush, window, guesses=4, width=9)
        if head is numpy:
            wanted = first, second, one, two
    np.testing.assert_allclose(first, wanted[0], atol=2e-4, rtol=2e-4)
    np.testing.assert_allclose(second, wanted[1], atol=2e-4, rtol=2e-4)
    for found, want in ((one, wanted[2]), (two, wanted[3])):
        np.testing.assert_array_equal(found.tokens, want.tokens)
        np.testing.assert_allclose(found.chances, want.chances, atol=5e-5)


@pytest.mark.parametrize("bits", ["float32", "int4"])
def test_both_windows_slide_alike(bits: str) -> None:
    """Past its end the window loses the same blocks of pairs, and guesses go on alike."""
    heads = pair("eagle2", plain(max_position_embeddings=4096), bits)
    text, given = tokens(1400), features(heads[0], 1400)
    drafters = [HeadDrafter(head, depth=2, width=3) for head in heads]
    done, counts = 0, []
    for size in [900, 100, *[7] * 30]:
        for drafter in drafters:
            drafter.accepted(text[done : done + size], given[done : done + size])
            drafter.propose(text[: done + size + 1], 4)
        done += size
        counts.append([drafter._window.count for drafter in drafters])
        first, second = (drafter._first for drafter in drafters)
        np.testing.assert_allclose(first.chances, second.chances, atol=TOLERANCE[bits])
    assert all(a == b for a, b in counts) and max(counts)[0] <= 1024
    assert sum(a[0] > b[0] for a, b in itertools.pairwise(counts)) >= 3, "it slid several times"


def test_a_sequence_alone_and_beside_another() -> None:
    """The window is the caller's: heads keep nothing of a sequence."""
    _, head = pair("eagle2", plain(), "int4")
    text, given = tokens(60), features(head, 60)
    alone = _last(head, [(text, given)])[0]
    other = (tokens(60, seed=4), features(head, 60, seed=4))
    both = _last(head, [(text, given), other])
    np.testing.assert_array_equal(both[0], alone)
    assert not np.array_equal(both[1], alone)


def _last(head: Head, sequences) -> list[np.ndarray]:
    windows = [head.window() for _ in sequences]
    for begin in range(0, 60, 20):
        found = []
        for window, (text, given) in zip(windows, sequences, strict=True):
            part = slice(begin, begin + 20)
            rows = Rows.text(text[part], given[part], begin, begin)
            found.append(head.run(rows, window)[0])
    return found


def test_what_does_not_fit_is_refused() -> None:
    _, head = pair("eagle2", plain(), "int4")
    given = features(head, PIECE + 1)
    text = tokens(PIECE + 1)
    window = head.window()
    with pytest.raises(UserError, match="too many rows"):
        head.run(Rows.text(text, given, 0, 0), window)
    with pytest.raises(UserError, match="no room"):
        head.run(Rows.text(text[:9], given[:9], 0, 1340), window)
    one = Rows(text[:1], given[:1], np.array([0]), 0, np.array([0]), np.array([2], np.uint64))
    with pytest.raises(UserError, match="nothing is in"):
        head.run(one, window)


@pytest.mark.parametrize("size", [1, 3, 15, 16, 64, 65, 331, 1000])
def test_the_likeliest_of_ties(size: int) -> None:
    """Equal logits: the lower token first, in the core as in numpy."""
    model = plain(vocab_size=max(size, 8), tie_word_embeddings=False)
    with_ties = np.repeat(np.arange(-(-size // 3)), 3)[:size]
    model.lm_head.weight.data[:size] = model.lm_head.weight.data[with_ties]
    numpy, core = pair("eagle2", model, "float32", ids=np.arange(size))
    rows = Rows.text(np.zeros(5, int), features(numpy, 5), 0, 0)
    _, wanted = numpy.run(rows, numpy.window(), guesses=5, width=10)
    _, found = core.run(rows, core.window(), guesses=5, width=10)
    assert found.tokens.shape == (5, min(10, size))
    first = likeliest(np.round(wanted.chances, 4), 1).chances
    np.testing.assert_allclose(found.chances[:, :1], first, atol=1e-3)
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
