"""Rotary frequencies: one inverse frequency per pair of channels, stretched for long contexts.

RoPE turns channel pair i of a head by position x inv_freq[i], inv_freq[i] = theta^(-2i/D). Every
extension only rescales that list and, some, the amplitude of cos and sin:

    linear     inv_freq / factor
    llama3     long waves / factor, short waves kept, a linear blend between (Llama 3.1)
    yarn       inv_freq / factor for long waves, blended over "correction dims", 0.1 ln(s) + 1
    longrope   inv_freq / list[i], amplitude sqrt(1 + ln(s) / ln(original)) (arXiv 2402.13753)

MiniCPM's published 128K lists are YaRN applied on top of its LongRoPE list, amplitude 1
(`extend_longrope`). Where the long and the short list differ, we choose once, from the context the
model is built for: keys in a cache are stored rotated, so a list cannot change while a text grows.

numpy alone: executors without a tensor library need the list too. theta^x is taken in float64 and
rounded to float32; everything after it is float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from endside.errors import UserError

RopeKind = Literal["default", "linear", "llama3", "yarn", "longrope"]


@dataclass(frozen=True)
class RopeConfig:
    """How positions are rotated. Lengths in tokens; lists hold one value per channel pair (D/2).

    Raises UserError for a kind that is unknown or lacks what its formula needs.
    """

    theta: float = 10000.0
    kind: RopeKind = "default"
    factor: float | None = None  # context stretch s; None: derived from the two lengths
    original: int | None = None  # context the frequencies were trained for
    long_factor: tuple[float, ...] = ()
    short_factor: tuple[float, ...] = ()
    beta_fast: float = 32.0  # yarn: rotations over `original` above which a wave is kept
    beta_slow: float = 1.0  # yarn: rotations below which a wave is stretched in full
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    amplitude: float | None = None  # cos and sin are multiplied by it; None: the kind's formula
    mscale: float | None = None  # yarn: DeepSeek's pair of amplitude exponents
    mscale_all_dim: float | None = None
    truncate: bool = True  # yarn: correction dims rounded outwards to whole channels

    def __post_init__(self) -> None:
        if self.kind not in ("default", "linear", "llama3", "yarn", "longrope"):
            raise UserError(
                f"rope_scaling type {self.kind!r} is not known: "
                "use default, linear, llama3, yarn or longrope"
            )
        if self.kind in ("linear", "llama3", "yarn") and not self.factor:
            raise UserError(
                f'rope_scaling type {self.kind} needs a factor: add "factor" to rope_scaling'
            )
        if self.kind == "longrope" and not (self.long_factor and self.short_factor):
            raise UserError(
                "rope_scaling type longrope needs long_factor and short_factor: add both lists"
            )
        if self.kind in ("llama3", "yarn", "longrope") and not self.original:
            raise UserError(
                f"rope_scaling type {self.kind} needs original_max_position_embeddings: "
                "add it to rope_scaling"
            )


def inverse_frequencies(
    rope: RopeConfig, head_dim: int, context: int, max_position: int
) -> tuple[np.ndarray, float]:
    """The inverse frequencies (D/2,) float32 and the amplitude of cos and sin.

    context: tokens the model is built for, which chooses the long or short list of longrope;
    max_position: the configured maximum, from which a missing `factor` is derived.
    """
    powers = _powers(rope.theta, head_dim)
    plain = 1 / powers
    if rope.kind == "default":
        return plain, rope.amplitude or 1.0
    if rope.kind == "linear":
        return plain / np.float32(rope.factor), rope.amplitude or 1.0
    if rope.kind == "llama3":
        return _llama3(rope, plain), rope.amplitude or 1.0
    if rope.kind == "yarn":
        return _yarn(rope, powers, head_dim), _yarn_amplitude(rope)
    return _longrope(rope, head_dim, context), _longrope_amplitude(rope, max_position)


def _powers(theta: float, head_dim: int) -> np.ndarray:
    """theta^(2i/D) (D/2,) float32."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return (np.float64(theta) ** exponents.astype(np.float64)).astype(np.float32)


def _llama3(rope: RopeConfig, plain: np.ndarray) -> np.ndarray:
    # a reciprocal and a product where one division would do: the published bits
    wave = 1 / plain * np.float32(2 * math.pi)
    low, high = rope.low_freq_factor, rope.high_freq_factor
    turns = 1 / wave * np.float32(rope.original)
    blend = ((turns - np.float32(low)) / np.float32(high - low)).clip(0, 1)
    return (1 - blend) * plain / np.float32(rope.factor) + blend * plain


def correction_dims(
    head_dim: int, theta: float, original: int, rope: RopeConfig
) -> tuple[float, float]:
    """The channel pairs between which YaRN blends (arXiv 2309.00071, 3.2), within [0, D - 1]."""

    def pair(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, head_dim - 1)


def _kept(head_dim: int, low: float, high: float) -> np.ndarray:
    """gamma (D/2,): 1 where a wave is kept, 0 where it is stretched in full."""
    pairs = np.arange(head_dim // 2, dtype=np.float32)
    return 1 - ((pairs - np.float32(low)) / np.float32(max(high - low, 1e-3))).clip(0, 1)


def _yarn(rope: RopeConfig, powers: np.ndarray, head_dim: int) -> np.ndarray:
    kept = _kept(head_dim, *correction_dims(head_dim, rope.theta, rope.original, rope))
    return 1 / (np.float32(rope.factor) * powers) * (1 - kept) + 1 / powers * kept


def _yarn_amplitude(rope: RopeConfig) -> float:
    if rope.amplitude is not None:
        return rope.amplitude

    def scale(exponent: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * exponent * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)


def _longrope(rope: RopeConfig, head_dim: int, context: int) -> np.ndarray:
    chosen = rope.long_factor if context > rope.original else rope.short_factor
    if len(chosen) != head_dim // 2:
        raise UserError(
            f"rope_scaling holds {len(chosen)} factors for a head width of {head_dim}: "
            f"it needs {head_dim // 2}"
        )
    return 1 / (np.array(chosen, dtype=np.float32) * _powers(rope.theta, head_dim))


def _longrope_amplitude(rope: RopeConfig, max_position: int) -> float:
    if rope.amplitude is not None:
        return rope.amplitude
    stretch = rope.factor if rope.factor else max_position / rope.original
    return 1.0 if stretch <= 1 else math.sqrt(1 + math.log(stretch) / math.log(rope.original))


def extend_longrope(
    factors: tuple[float, ...], stretch: float, *, theta: float = 10000.0, original: int = 4096
) -> tuple[float, ...]:
    """YaRN on top of a LongRoPE list: f'[i] = f[i] / ((1 - gamma_i) / s + gamma_i) (formats §2).

    stretch 4 takes MiniCPM4 from 32K to 128K, 2 takes MiniCPM4.1 from 64K to 128K. `original` is
    the short context that MiniCPM was pre-trained at, which places the correction dims.
    """
    head_dim = 2 * len(factors)
    low, high = correction_dims(head_dim, theta, original, RopeConfig(theta=theta))
    kept = [1 - min(max((i - low) / (high - low), 0.0), 1.0) for i in range(len(factors))]
    return tuple(f / ((1 - g) / stretch + g) for f, g in zip(factors, kept, strict=True))
