"""WSD: exact values of every phase and shape."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from endside.errors import UserError
from endside.train.schedule import ScheduleConfig, check, phase, share


def test_warm_up_is_linear_and_the_stable_phase_constant() -> None:
    schedule = ScheduleConfig(warmup=4, decay=5)
    assert [share(t, 20, schedule) for t in range(1, 5)] == [0.25, 0.5, 0.75, 1.0]
    assert {share(t, 20, schedule) for t in range(4, 16)} == {1.0}
    assert share(16, 20, schedule) < 1.0


@pytest.mark.parametrize(
    ("shape", "floor", "values"),
    [
        ("exponential", 0.0625, [0.5, 0.25, 0.125, 0.0625]),
        ("linear", 0.0, [0.75, 0.5, 0.25, 0.0]),
        ("linear", 0.2, [0.8, 0.6, 0.4, 0.2]),
        ("cosine", 0.0, [0.5 + 0.125**0.5, 0.5, 0.5 - 0.125**0.5, 0.0]),
        ("cosine", 0.2, [0.6 + 0.08**0.5, 0.6, 0.6 - 0.08**0.5, 0.2]),
        ("sqrt", 0.1, [0.55, 1 - 0.9 * 0.5**0.5, 1 - 0.9 * 0.75**0.5, 0.1]),
    ],
)
def test_decay(shape: str, floor: float, values: list[float]) -> None:
    schedule = ScheduleConfig(warmup=2, decay=4, shape=shape, floor=floor)
    assert [share(t, 10, schedule) for t in range(7, 11)] == pytest.approx(values, rel=1e-12)


@given(
    warmup=st.integers(0, 20), stable=st.integers(1, 30), decay=st.integers(0, 20),
    longer=st.integers(0, 50), shape=st.sampled_from(["exponential", "linear", "sqrt", "cosine"]),
)  # fmt: skip
def test_a_longer_run_differs_only_after_the_stable_phase(
    warmup: int, stable: int, decay: int, longer: int, shape: str
) -> None:
    schedule = ScheduleConfig(warmup, decay, shape, 0.1)
    steps = warmup + stable + decay
    for t in range(1, warmup + stable + 1):
        assert share(t, steps, schedule) == share(t, steps + longer, schedule)
    decayed = [share(t, steps, schedule) for t in range(warmup + stable, steps + 1)]
    assert decayed == sorted(decayed, reverse=True)
    assert len(set(decayed)) == decay + 1
    if decay:
        assert decayed[-1] == pytest.approx(0.1)


def test_phases() -> None:
    schedule = ScheduleConfig(warmup=3, decay=2)
    names = [phase(t, 8, schedule) for t in range(1, 9)]
    assert names == ["warmup"] * 2 + ["stable"] * 4 + ["decay"] * 2


@pytest.mark.parametrize(
    "wrong", [{"warmup": -1}, {"decay": -2}, {"floor": 1.5}, {"floor": -0.1}, {"floor": 0.0}]
)
def test_what_makes_no_schedule(wrong: dict) -> None:
    with pytest.raises(UserError, match=r"schedule\."):
        ScheduleConfig(**wrong)


def test_phases_must_fit() -> None:
    check(10, ScheduleConfig(warmup=4, decay=6))
    with pytest.raises(UserError, match=r"warmup 4 \+ schedule.decay 7 is more than steps 10"):
        check(10, ScheduleConfig(warmup=4, decay=7))
