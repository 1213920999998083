"""A draft head that lives in the core: pairs of embedding and hidden state in, guesses out.

The equations stand in engine/drafts/head.py, what a call does in src/draft_head.h. Where a model
of the core is given, the head works with that model's threads, between its calls.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields

import numpy as np

from endside import native
from endside.errors import UserError
from endside.native.model import Model
from endside.native.packed import Packed, aligned

BLOCK = 64  # rooms of a window that lie together


@dataclass(frozen=True)
class Shape:
    """Sizes of the one layer, and its scales."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ff: int  # a multiple of 8
    norm_eps: float = 1e-6
    residual_scale: float = 1.0
    logit_scale: float = 1.0


@dataclass(frozen=True)
class Weights:
    """All of them, in the order that the core reads. A norm (C) that is None does nothing."""

    joined: bool  # fc of the pair is the stream; else hidden is, and the layer reads the pair
    embed_norm: np.ndarray | None
    hidden_norm: np.ndarray | None
    fc: Packed
    fc_bias: np.ndarray | None
    attention_norm: np.ndarray | None
    qkv: Packed  # rows of q, then k, then v
    output: Packed
    mlp_norm: np.ndarray | None
    gate_up: Packed  # see packed.interleave
    down: Packed
    state_norm: np.ndarray | None  # of what the layer leaves
    final_norm: np.ndarray | None  # of that, before `out`
    out: Packed  # (Vd, C)
    inverse_frequencies: np.ndarray  # (D / 2) float32
    rope_amplitude: float


@dataclass(frozen=True)
class Limits:
    """What is allocated once."""

    rows: int = 256  # of one call, at most
    guesses: int = 64  # rows of them that guess
    blocks: int = 21  # of 64 rooms, in a window
    threads: int = 1  # without a model to share threads with


@dataclass(frozen=True)
class Team:
    """Who computes: the threads of a model of the core, or some of its own."""

    model: Model | None = None
    threads: int = 1
    isa: str = "auto"


class DraftHead:
    """The core's draft head."""

    def __init__(self, shape: Shape, weights: Weights, limits: Limits, team: Team) -> None:
        """Allocates every buffer; the weights' arrays are used where they lie."""
        self.shape, self.limits = shape, limits
        parts = [getattr(weights, one.name) for one in fields(weights)]
        given = tuple(one.parts if isinstance(one, Packed) else one for one in parts)
        shared = team.model.core if team.model is not None else None
        self._core = native.call(
            "DraftHead", astuple(shape), given, astuple(limits), shared, team.isa
        )

    def window(self) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values of one sequence, flat; zeroed, and nothing until they are written."""
        shape = self.shape
        cells = shape.kv_heads * self.limits.blocks * BLOCK * shape.head_dim
        return aligned(4 * cells).view(np.float32), aligned(4 * cells + 64).view(np.float32)

    def run(
        self,
        pairs: tuple[np.ndarray, np.ndarray, np.ndarray],
        rooms: tuple[int, np.ndarray, np.ndarray],
        window: tuple[np.ndarray, np.ndarray],
        guesses: int,
        width: int,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """States (P, C), and of the last `guesses` rows tokens and log-probabilities (·, width).

        pairs: embeddings and hidden (P, C), positions (P); rooms: the first row's, how many of the
        first ones each row sees (P), and a bit for each of the 64 behind those (P).
        """
        embeds, hidden, positions = pairs
        at, seen, above = rooms
        states = np.empty((len(embeds), self.shape.width), np.float32)
        tokens = np.empty((guesses, width), np.int32)
        chances = np.empty((guesses, width), np.float32)
        try:
            self._core.run(
                np.ascontiguousarray(embeds, np.float32),
                np.ascontiguousarray(hidden, np.float32),
                np.ascontiguousarray(positions, np.int32),
                at,
                np.ascontiguousarray(seen, np.int32),
                np.ascontiguousarray(above, np.uint64),
                window, states, tokens, chances,
            )  # fmt: skip
        except ValueError as error:
            raise UserError(f"native {error}") from error
        return states, tokens, chances

    def project(self, x: np.ndarray) -> np.ndarray:
        """x (P, K) -> fc x (P, C), where the pair does not go through fc."""
        out = np.empty((len(x), self.shape.width), np.float32)
        self._core.project(np.ascontiguousarray(x, np.float32), out)
        return out

    def set_timing(self, on: bool) -> None:
        """Starts (from zero) or stops measuring the stages."""
        self._core.set_timing(on)

    def timing(self) -> dict[str, float]:
        """Seconds of the layer, of the output product ("out") and of finding the likeliest."""
        return dict(self._core.timing())
