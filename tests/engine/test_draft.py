"""Drafts change no token: trees, the walk over them, prompt lookup; on an executor of numbers."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from endside.engine.draft import FixedSize, Tree
from endside.engine.drafts.lookup import Lookup, LookupDrafter
from endside.engine.engine import Engine
from endside.engine.request import Request, SamplingConfig
from endside.errors import UserError

from .fake import FakeExecutor, history_logits

VOCAB = 32


class Guesser:
    """A drafter that knows the fake model: its tree holds the right path with chance `skill`."""

    def __init__(self, skill: float, seed: int) -> None:
        self.skill, self.noise = skill, np.random.default_rng(seed)
        self.stored: list[int] = []

    def propose(self, history: np.ndarray, rows: int) -> Tree:
        assert self.stored == history[:-1].tolist(), "accepted() tells what is stored, in order"
        tokens: list[int] = []
        parents: list[int] = []
        texts = [history.tolist()]
        while len(tokens) < rows:
            parent = int(self.noise.integers(-1, len(tokens)))
            text = texts[parent + 1]
            right = int(history_logits(text, VOCAB).argmax())
            token = right if self.noise.random() < self.skill else int(self.noise.integers(VOCAB))
            tokens.append(token)
            parents.append(parent)
            texts.append([*text, token])
        return Tree(np.array(tokens, np.int64), np.array(parents, np.int32))

    def accepted(self, tokens: np.ndarray, features: np.ndarray | None) -> None:
        assert features is None
        self.stored += tokens.tolist()

    def close(self) -> None:
        self.stored.clear()


class Guesses:
    """Implements `Drafts`."""

    name, feature_layers, inputs = "guesses", (), None

    def __init__(self, skill: float = 0.8, vocab_size: int | None = None) -> None:
        self.skill, self.vocab_size = skill, vocab_size
        self.made: list[Guesser] = []

    def start(self, request: Request) -> Guesser:
        self.made.append(Guesser(self.skill, len(self.made)))
        return self.made[-1]


BYTES = [bytes([97 + one % 26]) for one in range(VOCAB)]


def answers(engine: Engine, requests: list[Request]) -> list[tuple[list[int], str | None, bytes]]:
    handles = [engine.submit(one) for one in requests]
    while not engine.idle:
        engine.step()
    return [
        (one.token_ids, one.finish_reason, b"".join(token.text for token in one)) for one in handles
    ]


def requests(count: int, **sampling: object) -> list[Request]:
    make = np.random.default_rng(5)
    return [
        Request(
            tuple(make.integers(VOCAB, size=make.integers(1, 20)).tolist()),
            SamplingConfig(seed=number, max_tokens=int(make.integers(1, 30)), **sampling),
            frozenset({3}),
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("nodes", [1, 4, 11, 63])
@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.3},
        {"temperature": 1.0, "presence_penalty": 0.5, "frequency_penalty": 0.5},
        {"temperature": 0.0, "stop": ("ab", "q")},
    ],
)
def test_trees_change_no_token(nodes: int, sampling: dict) -> None:
    """Tokens, endings and shown text of 40 requests, four at a time, with and without drafts."""
    asked = requests(40, **sampling)
    make = lambda **more: Engine(FakeExecutor(), BYTES, max_batch=4, **more)
    plain = answers(make(), asked)
    engine = make(drafts=Guesses(), size=FixedSize(nodes))
    assert answers(engine, asked) == plain
    verified = [call for call in engine.executor.calls if call[0] == "verify"]
    assert verified, "no draft was ever verified"
    assert sum(len(one[0]) for one in plain) > 100, "the answers are too short to show anything"


def test_right_guesses_save_passes() -> None:
    engine = Engine(FakeExecutor(), drafts=Guesses(1.0), size=FixedSize(8))
    handle = engine.submit(Request((1, 2), SamplingConfig(max_tokens=40, temperature=0.0)))
    assert len(list(handle)) == 40
    assert handle.runs < 20, f"{handle.runs} passes for 40 tokens"


class Recording(FixedSize):
    """Counts the trees it is told of."""

    trees = 0

    def record(self, tree: Tree, path: list[int], seconds: float) -> None:
        object.__setattr__(self, "trees", self.trees + 1)


def test_what_is_settled_teaches_nothing_about_guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    from endside.engine.choice import Choice

    settled = lambda self: [int(history_logits(self.tokens.tolist(), VOCAB).argmax())]
    ask = Request((1, 2), SamplingConfig(max_tokens=20, temperature=0.0))
    for forced in (False, True):
        if forced:
            monkeypatch.setattr(Choice, "settled", settled)
        size = Recording(4)
        engine = Engine(FakeExecutor(), drafts=Guesses(1.0), size=size)
        handle = engine.submit(ask)
        assert len(list(handle)) == 20 and handle.drafted > 5
        assert bool(size.trees) is not forced
    assert handle.runs == 11, "two tokens a pass, where one of them was settled"


def test_room_is_never_exceeded() -> None:
    """The fake executor fails on more tokens than were reserved; the context's last token comes."""
    engine = Engine(FakeExecutor(context=24), drafts=Guesses(1.0), size=FixedSize(30))
    handle = engine.submit(Request((1, 2), SamplingConfig(temperature=0.0)))
    assert len(list(handle)) == 22 and handle.finish_reason == "length"


def test_interrupt_in_any_call_loses_and_changes_nothing() -> None:
    """Ctrl-C inside verify or accept, before or after it has worked; then the answer goes on."""
    asked = requests(6, temperature=0.8)
    plain = answers(Engine(FakeExecutor()), asked)
    struck = 0
    for number in range(0, 28, 3):
        executor = FakeExecutor()
        calls = iter(range(10**6))
        for name in ("verify", "accept", "decode", "prefill"):
            setattr(executor, name, _breaking(getattr(executor, name), calls, number))
        engine = Engine(executor, drafts=Guesses(), size=FixedSize(6))
        handles = [engine.submit(one) for one in asked]
        broken = 0
        while not engine.idle:
            try:
                engine.step()
            except KeyboardInterrupt:
                broken += 1
                for drafter in engine.drafts.made:  # it may have missed what was stored
                    drafter.propose = lambda history, rows: Tree.empty()
        struck += broken
        assert [one.token_ids for one in handles] == [one[0] for one in plain], number
    assert struck >= 15, "the interrupts did not strike"


def _breaking(method, calls, number):
    def broken(*arguments, **named):
        now = next(calls)
        if now == number:
            raise KeyboardInterrupt
        result = method(*arguments, **named)
        if now == number + 3:
            raise KeyboardInterrupt
        return result

    return broken


def chi_square(drafts: object, samples: int) -> tuple[float, int]:
    """Of two-token answers after one prompt against their exact distribution, and its freedom."""
    vocab = 4
    executor = FakeExecutor(vocab_size=vocab, capacity=64 * 64)
    prompt, counts = (1, 2, 3), Counter()
    engine = Engine(executor, drafts=drafts, size=FixedSize(5), max_batch=16)
    config = [SamplingConfig(seed=one, max_tokens=3, temperature=1.3) for one in range(samples)]
    handles = [engine.submit(Request(prompt, one)) for one in config]
    while not engine.idle:
        engine.step()
    counts.update(tuple(one.token_ids) for one in handles)
    assert sum(one.runs for one in handles) < 2.9 * samples, "the drafts hardly ever matched"
    total, cells = 0.0, 0
    for answer in np.ndindex(*[vocab] * 3):
        chance, text = 1.0, list(prompt)
        for token in answer:
            weights = np.exp(history_logits(text, vocab).astype(np.float64) / 1.3)
            chance *= weights[token] / weights.sum()
            text.append(token)
        if chance * samples >= 5:
            total += (counts[answer] - chance * samples) ** 2 / (chance * samples)
            cells += 1
    return total, cells - 1


class SmallGuesses(Guesses):
    """Trees over four tokens."""

    def start(self, request: Request) -> Guesser:
        drafter = super().start(request)
        drafter.propose = lambda history, rows: Tree(
            np.array([0, 1, 2, 0, 3], np.int64), np.array([-1, -1, -1, 0, 1], np.int32)
        )
        return drafter


def test_sampled_speculation_has_the_model_s_distribution() -> None:
    total, freedom = chi_square(SmallGuesses(), 10_000)
    bound = freedom + 4 * (2 * freedom) ** 0.5  # about one in 30,000
    print(f"chi-square {total:.1f} at {freedom} degrees of freedom, bound {bound:.1f}")
    assert freedom > 10 and total < bound


@pytest.mark.slow
def test_distribution_with_many_samples() -> None:
    total, freedom = chi_square(SmallGuesses(), 200_000)
    bound = freedom + 4 * (2 * freedom) ** 0.5
    print(f"chi-square {total:.1f} at {freedom} degrees of freedom, bound {bound:.1f}")
    assert freedom > 10 and total < bound


def test_draft_of_another_vocabulary_is_refused() -> None:
    with pytest.raises(UserError, match="vocabulary of 31 tokens, the model one of 32"):
        Engine(FakeExecutor(), drafts=Guesses(vocab_size=31))


@pytest.mark.parametrize(
    ("tokens", "parents", "message"),
    [
        (range(64), [-1] * 64, "at most 64 rows"),
        ([1, 2], [-1, 1], "parents must come before"),
        ([1, 2], [-2, 0], "parents must come before"),
        ([1, 99], [-1, 0], "made for another model"),
    ],
)
def test_impossible_trees_are_refused(tokens, parents, message: str) -> None:
    tree = Tree(np.array(list(tokens), np.int64), np.array(parents, np.int32))
    with pytest.raises(UserError, match=message):
        tree.check(VOCAB)


def test_cut_keeps_parents_and_depth() -> None:
    tree = Tree(np.arange(5), np.array([-1, 0, 1, 0, -1], np.int32))
    cut = tree.cut(rows=5, depth=2)
    assert cut.tokens.tolist() == [0, 1, 3, 4] and cut.parents.tolist() == [-1, 0, 0, -1]
    assert tree.cut(rows=2, depth=9).tokens.tolist() == [0, 1]


def test_lookup_finds_the_longest_and_latest_match() -> None:
    history = np.array([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3])
    tree = LookupDrafter().propose(history, 3)
    # Behind 1 2 3 stood 4 9 2; behind the later, shorter 2 3 stood 5.
    assert tree.tokens.tolist() == [4, 9, 2] and tree.parents.tolist() == [-1, 0, 1]
    wide = LookupDrafter().propose(history, 5)
    assert wide.tokens.tolist()[:5] == [4, 9, 2, 3, 5] and wide.parents.tolist() == [-1, 0, 1, 2, 3]


def test_lookup_merges_continuations() -> None:
    history = np.array([7, 8, 1, 2, 7, 8, 1, 3, 7, 8])
    tree = LookupDrafter().propose(history, 8)
    paths = {tuple(_path(tree, row)) for row in range(len(tree))}
    assert {(1, 3), (1, 2)} <= paths, paths
    assert tree.parents.tolist().count(-1) == 1, "the shared beginning is one node"


def _path(tree: Tree, row: int) -> list[int]:
    path = []
    while row >= 0:
        path.append(int(tree.tokens[row]))
        row = int(tree.parents[row])
    return path[::-1]


def test_lookup_index_follows_the_growing_text() -> None:
    """A drafter asked after every token guesses as a fresh one does."""
    history = np.random.default_rng(0).integers(3, size=200)
    drafter = LookupDrafter()
    for size in range(1, len(history) + 1):
        tree, fresh = drafter.propose(history[:size], 7), LookupDrafter().propose(history[:size], 7)
        assert tree.tokens.tolist() == fresh.tokens.tolist(), size
        assert tree.parents.tolist() == fresh.parents.tolist(), size


def test_lookup_through_the_engine_changes_no_token() -> None:
    asked = requests(40, temperature=0.3)
    plain = answers(Engine(FakeExecutor(), BYTES), asked)
    assert answers(Engine(FakeExecutor(), BYTES, drafts=Lookup()), asked) == plain
