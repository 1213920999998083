"""Thoughts: found across token borders, closed when the budget is spent, kept off constraints."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from endside.engine.thinking import GRACE, Thinking, Thought
from endside.errors import UserError

MARKS = {"<think>": "</think>", "<|thought_start|>": "<|thought_end|>"}
# ids 0-255 are the bytes; then a marker that is one token, and tokens that reach over its end
TABLE = [bytes([one]) for one in range(256)]
TABLE += [b"</think>", b"think>", b">\n\n", b'>{"', b"ink>", b""]
ONE, REACHING, END = 256, 259, 261
STOPS = frozenset({END})


def spell(text: str) -> list[int]:
    return list(text.encode())


def spell_one(text: str) -> list[int]:
    """As a vocabulary does it where the marker is a token."""
    before, marker, after = text.partition("</think>")
    return [*before.encode(), *[ONE] * bool(marker), *after.encode()]


def start(spelled=spell, **rules: object) -> Thought:
    return Thinking(TABLE, spelled, MARKS, **rules).start(STOPS)  # type: ignore[arg-type]


def write(thought: Thought, model: str | list[int], *, most: int = 200) -> bytes:
    """What is written by a model that would write `model`, until the thought is over."""
    wanted, written = list(model if isinstance(model, list) else model.encode()), b""
    while thought.open and len(written) < most:
        forced = thought.forced()
        token = forced if forced is not None else wanted.pop(0)
        thought.push(token)
        written += TABLE[token]
    return written


@pytest.mark.parametrize("spelled", [spell, spell_one])
@pytest.mark.parametrize("budget", [0, 1, 5])
def test_a_budget_closes_the_thought(spelled, budget: int) -> None:
    thought = start(spelled, opened=True, budget=budget)
    assert write(thought, "x" * 50) == b"x" * budget + b"\n</think>\n\n"
    assert thought.spent == budget
    assert thought.forced() is None
    thought.push(spell("y")[0])
    assert not thought.open


def test_a_thought_that_ends_by_itself_is_left_alone() -> None:
    thought = start(opened=True, budget=50)
    assert write(thought, "short\n</think>ok") == b"short\n</think>"
    assert thought.forced() is None


def test_without_a_budget_nothing_is_forced() -> None:
    assert write(start(opened=True), "x" * 199 + "</think>", most=300).endswith(b"x</think>")


def test_the_model_may_open_the_thought() -> None:
    for opener, closer in MARKS.items():
        thought = start(budget=3)
        for token in spell(" \n" + opener):
            assert not thought.open
            thought.push(token)
        assert write(thought, "x" * 50) == f"xxx\n{closer}\n\n".encode()
    thought = start(budget=3)
    for token in spell("An answer about <think> and more"):
        thought.push(token)
        assert not thought.open


def test_a_character_is_finished_first() -> None:
    """The budget falls between the bytes of one character."""
    for budget in range(1, 8):
        thought = start(opened=True, budget=budget)
        text = write(thought, "日" * 20).decode("utf-8")
        assert text == "日" * -(-budget // 3) + "\n</think>\n\n"
        assert thought.spent <= budget + 2


def test_a_character_that_never_ends_is_not_waited_for() -> None:
    thought = start(opened=True, budget=2)
    text = write(thought, [0xF0] * 20)
    assert text == b"\xf0" * (2 + GRACE) + b"\n</think>\n\n"


def test_a_marker_that_has_begun_is_completed() -> None:
    for begun in range(1, 8):
        thought = start(opened=True, budget=3 + begun)
        model = "abc" + "</think>"[:begun] + "x" * 20
        assert write(thought, model) == b"abc</think>\n\n"


def test_coming_are_the_forced_tokens() -> None:
    thought = start(opened=True, budget=1)
    assert thought.coming == ()
    thought.push(65)
    assert bytes(thought.coming) == b"\n</think>\n\n"
    thought.push(10)
    assert bytes(thought.coming) == b"</think>\n\n"
    with pytest.raises(AssertionError, match="instead of the forced"):
        thought.push(65)


def test_strict_thoughts_keep_off_the_answer() -> None:
    """No end id within; no token that ends the marker and begins the answer."""
    logits = np.zeros(len(TABLE), dtype=np.float32)
    thought = start(opened=True, strict=True)
    assert np.flatnonzero(np.isneginf(thought.restrict(logits))).tolist() == [END]
    for token in spell("hm </think"):
        thought.push(token)
    banned = np.flatnonzero(np.isneginf(thought.restrict(logits))).tolist()
    assert banned == [REACHING, END]
    assert np.isfinite(logits).all()
    thought.push(spell(">")[0])
    assert bytes(thought.coming) == b"\n\n", "the line ends that the constraint would not allow"
    assert write(thought, "") == b"\n\n"
    assert thought.restrict(logits) is logits
    free = start(opened=True)
    assert free.restrict(logits) is logits


def test_strict_thoughts_are_begun_only_where_asked_for() -> None:
    assert not start(strict=True).open
    thought = start(strict=True, begin=True, budget=2)
    assert write(thought, "abcdef") == b"<think>\nab\n</think>\n\n"
    assert write(start(strict=True, begin=True, budget=0), "abc") == b"<think>\n\n</think>\n\n"


def test_a_marker_token_with_line_ends_needs_no_more() -> None:
    thought = start(opened=True, strict=True)
    for token in [*spell("</think"), 258]:
        thought.push(token)
    assert not thought.open


@pytest.mark.parametrize("budget", [-1, 1.5, "3", True])
def test_a_wrong_budget_is_refused(budget: object) -> None:
    with pytest.raises(UserError, match="thinking_budget"):
        start(opened=True, budget=budget)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from([0x20, 0x3C, 0x2F, 0x61, 0xE6, 0x97, 0xA5, *range(256, 261)])),
    st.integers(0, 12),
)
def test_every_thought_is_closed_once(model: list[int], budget: int) -> None:
    """Whatever the model writes: one marker, in time."""
    thought = start(opened=True, budget=budget)
    text = write(thought, model + [0x61] * 40)
    assert text.count(b"</think>") == 1
    assert text.split(b"</think>")[1].strip() in (b"", b'{"')
    assert thought.spent <= budget + GRACE
