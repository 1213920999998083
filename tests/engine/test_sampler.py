"""The sampler against transformers' own processors, against its probabilities, flag by flag."""

from __future__ import annotations

import numpy as np
import pytest

from endside.engine.request import SamplingConfig
from endside.engine.sampler import distribution, generator, sample
from endside.errors import UserError

V = 300
SETTINGS = [
    dict(temperature=1.0),
    dict(temperature=0.7),
    dict(temperature=1.7, top_k=20),
    dict(temperature=0.9, top_p=0.8),
    dict(temperature=1.3, min_p=0.07),
    dict(temperature=0.8, top_k=50, top_p=0.6),
    dict(temperature=2.0, top_k=40, top_p=0.95, min_p=0.03),
    dict(temperature=1.5, top_p=0.01),
    dict(temperature=1.1, top_k=10_000, top_p=0.99),
]


def _logits(seed: int, scale: float = 4.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=V) * scale).astype(np.float32)


def _theirs(logits: np.ndarray, history: np.ndarray, settings: dict) -> np.ndarray:
    """Probabilities (V,) float64 after transformers' processors, in its own order."""
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as theirs

    ids, scores = torch.from_numpy(history)[None], torch.from_numpy(logits)[None].clone()
    for name, kind, given in (
        ("repetition_penalty", theirs.RepetitionPenaltyLogitsProcessor, "penalty"),
        ("temperature", theirs.TemperatureLogitsWarper, "temperature"),
        ("top_k", theirs.TopKLogitsWarper, "top_k"),
        ("top_p", theirs.TopPLogitsWarper, "top_p"),
        ("min_p", theirs.MinPLogitsWarper, "min_p"),
    ):
        if name in settings:
            scores = kind(**{given: settings[name]})(ids, scores)
    return torch.softmax(scores[0].double(), dim=-1).numpy()


@pytest.mark.parametrize("settings", SETTINGS)
def test_distribution_is_transformers(settings: dict) -> None:
    history = np.array([0], dtype=np.int64)
    for seed in range(25):
        logits = _logits(seed, scale=1.0 + seed / 5)
        ids, probabilities = distribution(logits, SamplingConfig(**settings))
        expected = _theirs(logits, history, settings)
        assert ids.tolist() == np.flatnonzero(expected).tolist()
        np.testing.assert_allclose(probabilities, expected[ids], rtol=0, atol=1e-6)


def test_repetition_penalty_is_transformers() -> None:
    """Greedy after the penalty equals their argmax, where the penalty changes the choice."""
    changed = 0
    for seed in range(60):
        logits = _logits(seed)
        order = np.argsort(-logits)
        history = np.array([order[0], order[0], order[2], order[-1]], dtype=np.int64)
        config = SamplingConfig(temperature=0, repetition_penalty=1.4)
        chosen = sample(logits, history, config, generator(0))
        assert chosen == _theirs(logits, history, {"repetition_penalty": 1.4}).argmax()
        changed += chosen != order[0]
    assert changed > 20


def test_penalty_leaves_the_executors_logits_alone() -> None:
    logits = _logits(3)
    before = logits.copy()
    sample(
        logits, np.arange(9), SamplingConfig(temperature=0, repetition_penalty=2.0), generator(0)
    )
    np.testing.assert_array_equal(logits, before)


def test_draws_follow_the_distribution() -> None:
    """Chi-square at 99.9 % over the kept tokens of a small vocabulary."""
    from math import sqrt

    logits = np.array([2.0, 0.5, 1.0, -1.0, 0.0, 1.5, -9.0, 0.3], dtype=np.float32)
    config = SamplingConfig(temperature=0.9, top_k=7, top_p=0.97)
    ids, probabilities = distribution(logits, config)
    rng, draws = generator(11), 10_000
    counts = np.zeros(len(logits))
    for _ in range(draws):
        counts[sample(logits, np.array([0]), config, rng)] += 1
    assert counts.sum() == counts[ids].sum()
    expected = probabilities * draws
    chi_square = ((counts[ids] - expected) ** 2 / expected).sum()
    freedom = len(ids) - 1
    # Wilson-Hilferty: the 99.9 % point of chi-square from the normal one.
    bound = freedom * (1 - 2 / (9 * freedom) + 3.09 * sqrt(2 / (9 * freedom))) ** 3
    assert chi_square < bound


@pytest.mark.parametrize(
    ("off", "on"),
    [
        (dict(temperature=0.2), dict(temperature=5.0)),
        (dict(temperature=5.0), dict(temperature=5.0, top_k=3)),
        (dict(temperature=5.0), dict(temperature=5.0, top_p=0.2)),
        (dict(temperature=5.0), dict(temperature=5.0, min_p=0.5)),
        (dict(temperature=5.0, top_k=4), dict(temperature=5.0, top_k=4, repetition_penalty=9.0)),
    ],
)
def test_every_flag_acts(off: dict, on: dict) -> None:
    logits = _logits(1)
    history = np.argsort(-logits)[:2]

    def drawn(settings: dict) -> list[int]:
        rng = generator(5)
        return [sample(logits, history, SamplingConfig(**settings), rng) for _ in range(200)]

    assert drawn(off) != drawn(on)
    assert drawn(on) == drawn(on)


def test_greedy_takes_the_lowest_of_equals() -> None:
    logits = np.array([1.0, 7.0, 7.0, 7.0], dtype=np.float32)
    assert sample(logits, np.array([0]), SamplingConfig(temperature=0), generator(0)) == 1


def test_equal_logits_stay_in_top_k_and_leave_top_p_from_above() -> None:
    logits = np.zeros(8, dtype=np.float32)
    ids, _ = distribution(logits, SamplingConfig(temperature=1.0, top_k=3))
    assert ids.tolist() == list(range(8))
    ids, _ = distribution(logits, SamplingConfig(temperature=1.0, top_p=0.3))
    assert ids.tolist() == [0, 1, 2]


@pytest.mark.parametrize("top_p", [1e-30, 1 - 1e-16, 0.5])
@pytest.mark.parametrize("temperature", [1e-300, 1.0, 1e300])
def test_extreme_values_leave_a_distribution(top_p: float, temperature: float) -> None:
    for logits in (_logits(2), np.zeros(V, dtype=np.float32)):
        config = SamplingConfig(temperature=temperature, top_p=top_p)
        ids, probabilities = distribution(logits, config)
        assert len(ids) >= 1
        assert probabilities.sum() == pytest.approx(1.0)
        assert logits.argmax() in ids or temperature == 1e300


def test_masked_tokens_are_never_drawn() -> None:
    logits = np.full(V, -np.inf, dtype=np.float32)
    logits[[7, 9]] = 0.0
    for extra in ({}, {"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.1}):
        config = SamplingConfig(temperature=2.0, **extra)
        rng = generator(0)
        assert {sample(logits, np.array([0]), config, rng) for _ in range(60)} == {7, 9}


def test_the_smallest_draw_skips_probabilities_that_round_to_zero() -> None:
    class Zero:
        def random(self) -> float:
            return 0.0

    logits = np.array([-5000.0, 0.0, 1.0], dtype=np.float32)
    assert sample(logits, np.array([0]), SamplingConfig(temperature=1.0), Zero()) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_are_refused(bad: float, temperature: float) -> None:
    logits = _logits(0)
    logits[4] = bad
    with pytest.raises(UserError, match="no finite maximum"):
        sample(logits, np.array([0]), SamplingConfig(temperature=temperature), generator(0))
