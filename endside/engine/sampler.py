"""From logits to one token: penalties, bias, mask, temperature, top-k, top-p, min-p, one draw.

The order and the meaning of each filter are those of the `transformers` library, so that a model's
published settings mean what its authors measured; presence, frequency and bias are OpenAI's:

    penalty r      a token seen in prompt or answer: l / r where l > 0, l * r where l < 0
    presence p     a token seen in the answer: l - p
    frequency f    a token seen n times in the answer: l - n f
    bias b         l + b for the tokens it names; then -inf for what a grammar does not allow
    temperature t  l / t
    top-k          keep every logit >= the k-th largest (ties stay)
    top-p          sorted upward, drop tokens while the running probability is <= 1 - p
    min-p          drop probabilities below min_p * the largest

Filters shrink a list of candidate ids; probabilities are float64 throughout. One uniform number u
is drawn per token. Greedy does not look at it and takes the largest logit, the lowest id among
equals; otherwise the first candidate (in id order) with cumulative probability > u wins: the n-th
token of a request depends on its seed, n and its logits only, never on what else runs.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable

import numpy as np

from endside.engine.request import SamplingConfig
from endside.errors import UserError


def fresh_seed() -> int:
    """A seed from the system's entropy, small enough to be typed again."""
    return secrets.randbits(32)


def generator(seed: int) -> np.random.Generator:
    """The random stream of one request: Philox, the same on every platform."""
    return np.random.Generator(np.random.Philox(seed))


def sample(
    logits: np.ndarray,
    history: np.ndarray,
    config: SamplingConfig,
    rng: np.random.Generator,
    *,
    prompt: int = 0,
    allow: Callable[[np.ndarray], np.ndarray] | None = None,
) -> int:
    """The next token. logits (V,) float32; history (S,) int64, `prompt` tokens and then the answer.

    allow: logits -> logits with -inf for the tokens that may not come.
    """
    drawn = rng.random()
    adjusted = _penalised(logits, history, config, prompt)
    if allow is not None:
        adjusted = allow(adjusted)
    best = float(adjusted.max())
    # NaN wins over everything in max(); +inf and an all -inf row leave no distribution either.
    if not np.isfinite(best):
        raise UserError(
            f"the model's logits after {len(history):,} tokens hold no finite maximum ({best}): "
            "the checkpoint is damaged or its numbers overflow; try --dtype float32"
        )
    if config.greedy:
        return int(adjusted.argmax())
    ids, probabilities = distribution(adjusted, config)
    cumulative = np.cumsum(probabilities)
    return int(ids[np.searchsorted(cumulative, drawn * cumulative[-1], side="right")])


def log_probabilities(
    logits: np.ndarray, token: int, count: int
) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Of `token`, and of the `count` most likely ones, best first: the model's own, unfiltered."""
    scores = logits.astype(np.float64)
    scores -= scores.max()
    scores -= np.log(np.exp(scores).sum())
    best = np.argpartition(-scores, min(count, len(scores) - 1))[:count] if count else []
    ranked = sorted(
        ((int(one), float(scores[one])) for one in best), key=lambda it: (-it[1], it[0])
    )
    return float(scores[token]), tuple(ranked)


def distribution(logits: np.ndarray, config: SamplingConfig) -> tuple[np.ndarray, np.ndarray]:
    """What `sample` draws from: candidate ids ascending (N,) and their probabilities (N,) float64.

    logits (V,) float32, penalty already applied; config.temperature > 0.
    """
    # The maximum goes first, so that the smallest temperature cannot overflow.
    scores = (logits.astype(np.float64) - float(logits.max())) / config.temperature
    ids = _top_k(scores, config.top_k)
    weights = np.exp(scores[ids])
    ids, weights = _top_p(ids, weights, config.top_p)
    if config.min_p:
        keep = weights >= config.min_p * weights.max()
        ids, weights = ids[keep], weights[keep]
    return ids, weights / weights.sum()


def _penalised(
    logits: np.ndarray, history: np.ndarray, config: SamplingConfig, prompt: int
) -> np.ndarray:
    """The logits after penalties and bias; the same array where none acts."""
    repetition, bias = config.repetition_penalty, config.logit_bias
    presence, frequency = config.presence_penalty or 0.0, config.frequency_penalty or 0.0
    answer = history[prompt:]
    counted = bool(presence or frequency) and len(answer) > 0
    repeats = repetition is not None and repetition != 1
    if not (counted or repeats or bias):
        return logits
    logits = logits.copy()
    if repeats:
        # Ids repeated in the history write the same value twice.
        seen = logits[history]
        logits[history] = np.where(seen < 0, seen * repetition, seen / repetition)
    if counted:
        ids, counts = np.unique(answer, return_counts=True)
        logits[ids] -= (presence + frequency * counts).astype(np.float32)
    for token, value in (bias or {}).items():
        logits[token] += np.float32(value)
    return logits


def _top_k(scores: np.ndarray, k: int | None) -> np.ndarray:
    if not k or k >= len(scores):
        return np.flatnonzero(scores > -np.inf)
    kth = np.partition(scores, len(scores) - k)[len(scores) - k]
    return np.flatnonzero((scores >= kth) & (scores > -np.inf))


def _top_p(
    ids: np.ndarray, weights: np.ndarray, top_p: float | None
) -> tuple[np.ndarray, np.ndarray]:
    if top_p is None or top_p == 1:
        return ids, weights
    probabilities = weights / weights.sum()
    # All tokens below (1 - p) / N together are below 1 - p: dropped without sorting them.
    floor = (1 - top_p) / len(ids)
    # The largest is at least 1 / N, also when rounded, so it always stays.
    large = np.flatnonzero(probabilities >= floor)
    below = 1.0 - probabilities[large].sum()
    # Upward by probability; among equals the higher id is dropped first.
    order = large[np.lexsort((-ids[large], probabilities[large]))]
    dropped = below + np.cumsum(probabilities[order]) <= 1 - top_p
    dropped[-1] = False
    kept = np.sort(order[~dropped])
    return ids[kept], weights[kept]
