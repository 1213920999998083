"""A decoder that lives in the core: token ids in, logits out, one call per step.

Everything it needs is allocated when it is made, for a context length and a number of rows given
then. What belongs to whom: the core runs the layers and holds keys and values, in chunks of 1,024
tokens; which chunks a sequence has, who shares them and when they are free is the caller's to know.
The logits of a row depend on that row and its sequence alone, bit for bit, whatever runs beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Literal

import numpy as np

from endside import native
from endside.errors import UserError
from endside.native.packed import Packed

CHUNK = 1024  # tokens per chunk of the cache
CACHES = ("f16", "bf16", "int8")  # positions are the core's numbers
PIECES = ("chunk", "coarse", "fine")  # of a chunk of the cache: blocks, summaries
WANTS = {"none": 0, "last": 1, "all": 2}

CacheType = Literal["f16", "bf16", "int8"]


def cell_order(cache: CacheType, head_dim: int, isa: str) -> str:
    """How the numbers of such a cache lie for an instruction set: "rows", or "tiles" of a product.

    Tiles are read as they lie; rows are put into tiles for each query, where there are tiles.
    """
    return native.call("cell_order", CACHES.index(cache), head_dim, isa)


@dataclass(frozen=True)
class Shape:
    """Sizes of the model, and the muP scales."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ff: int  # a multiple of 8
    vocab: int
    norm_eps: float = 1e-6
    embed_scale: float = 1.0
    residual_scale: float = 1.0  # of what attention and mlp add
    logit_scale: float = 1.0


@dataclass(frozen=True)
class Layer:
    """One block's weights; norms (C) float32."""

    attention_norm: np.ndarray | None
    qkv: Packed  # rows of q, then k, then v
    output: Packed
    mlp_norm: np.ndarray | None
    gate_up: Packed  # see packed.interleave
    down: Packed


@dataclass(frozen=True)
class Weights:
    """All of them. Arrays, and the buffers of Packed, may be missing where only sizes are asked."""

    embed: np.ndarray | Packed | None  # (V, C): float32, float16, uint16 holding bfloat16; Packed
    layers: Sequence[Layer]
    final_norm: np.ndarray | None
    head: Packed  # (V, C)
    inverse_frequencies: np.ndarray | None  # (D / 2) float32
    rope_amplitude: float = 1.0


@dataclass(frozen=True)
class Sparse:
    """InfLLM v2, in blocks of 64 tokens."""

    init_blocks: int = 1
    window_blocks: int = 32
    topk: int = 64
    dense_len: int = 8192  # tokens: a row with fewer before it, itself included, is dense
    selection_41: bool = True  # False: as MiniCPM4.0 counts blocks
    coarse_lse: bool = True  # False: exact denominators


@dataclass(frozen=True)
class Limits:
    """What is allocated once."""

    rows: int = 512  # of one call, at most
    trees: int = 64  # rows of draft trees among them, at most
    context: int = 4096  # tokens of the longest sequence
    chunks: int = 4  # of 1,024 tokens, in the cache
    threads: int = 1


@dataclass(frozen=True)
class Request:
    """Rows of one sequence: T new tokens after its `start` stored ones."""

    tokens: np.ndarray  # (T,) int32
    chunks: np.ndarray  # int32: chunks of its tokens in order, those of the new ones included
    start: int
    parents: np.ndarray | None = None  # (T,) int32: a draft tree; -1 is the last stored token
    want: Literal["none", "last", "all"] = "last"  # rows whose logits are asked for


class Model:
    """The core's model. Not for two threads at once: a second call waits for the first."""

    def __init__(
        self,
        shape: Shape,
        weights: Weights,
        *,
        sparse: Sparse | None = None,
        cache: CacheType = "f16",
        limits: Limits | None = None,
        isa: str = "auto",
    ) -> None:
        """Allocates the cache and every buffer; the weights' arrays are used where they lie."""
        self.shape = shape
        self.limits = limits or Limits()
        self._parts = _parts(shape, weights, sparse, cache, self.limits)
        self._core = native.call("Model", *self._parts, isa)

    @staticmethod
    def memory(
        shape: Shape,
        weights: Weights,
        *,
        sparse: Sparse | None = None,
        cache: CacheType = "f16",
        limits: Limits | None = None,
    ) -> dict[str, int]:
        """Bytes the model would allocate, by purpose, beside its weights; allocates nothing."""
        parts = _parts(shape, weights, sparse, cache, limits or Limits())
        return dict(native.call("memory", *parts))

    def forward(
        self,
        requests: Sequence[Request],
        *,
        out: np.ndarray | None = None,
        trace: np.ndarray | None = None,
        visible: np.ndarray | None = None,
    ) -> np.ndarray:
        """Runs all rows (P of them) and stores their keys -> logits (rows wanted, V) float32.

        out: where to put the logits. trace (L + 1, P, C) float32: filled with the residual stream
        entering each layer and leaving the last. visible (L, P, G) int32: filled with the keys each
        row attended to. A tree's keys are not stored: `accept` does that.
        """
        if out is None:
            wanted = sum(
                len(each.tokens) if each.want == "all" else each.want == "last" for each in requests
            )
            out = np.empty((wanted, self.shape.vocab), np.float32)
        given = [
            (each.tokens, each.chunks, each.start, each.parents, WANTS[each.want])
            for each in requests
        ]
        try:
            self._core.forward(given, out, trace, visible)
        except ValueError as error:
            raise UserError(f"native {error}") from error
        return out

    def accept(self, index: int, rows: np.ndarray) -> None:
        """Stores rows (root to leaf, int32) of the tree that was request `index` of the last call.

        The tree's sequence is then len(rows) tokens longer.
        """
        try:
            self._core.accept(index, rows)
        except ValueError as error:
            raise UserError(f"native {error}") from error

    def set_inputs(self, rows: np.ndarray) -> None:
        """Tokens vocab, vocab + 1, … enter the first layer as rows (I, C) float32."""
        rows = np.ascontiguousarray(rows, dtype=np.float32)
        try:
            self._core.set_inputs(rows)
        except ValueError as error:
            raise UserError(f"native {error}") from error

    def copy_chunk(self, source: int, target: int) -> None:
        """The tokens of one chunk into another: before a shared chunk is written."""
        self._core.copy_chunk(source, target)

    def chunk(self, index: int) -> dict[str, np.ndarray]:
        """The bytes of one chunk where they lie, uint8: to be read or filled between calls.

        All blocks in a row (1, B); coarse and fine summaries, where there are some, of each layer
        and key head (L * G, B), which lie apart.
        """
        try:
            return dict(zip(PIECES, self._core.chunk(index), strict=False))
        except ValueError as error:
            raise UserError(f"native {error}") from error

    def plan(self) -> list[str]:
        """What one call does, in order."""
        return native.call("plan", *self._parts)

    @staticmethod
    def steps(
        shape: Shape,
        weights: Weights,
        *,
        sparse: Sparse | None = None,
        cache: CacheType = "f16",
        limits: Limits | None = None,
    ) -> list[str]:
        """`plan` before there is a model; like `memory`, it needs no buffers."""
        return native.call("plan", *_parts(shape, weights, sparse, cache, limits or Limits()))

    @property
    def core(self) -> object:
        """What the core made, for its other parts to work with."""
        return self._core

    def set_timing(self, on: bool) -> None:
        """Starts (from zero) or stops measuring the stages; it costs a look at a clock each."""
        self._core.set_timing(on)

    def timing(self) -> dict[str, float]:
        """Seconds the first thread spent in each stage since timing was started."""
        return dict(self._core.timing())


def _parts(
    shape: Shape, weights: Weights, sparse: Sparse | None, cache: CacheType, limits: Limits
) -> tuple:
    """What the core is given."""
    if cache not in CACHES:
        raise UserError(f"cache is {cache!r}: use {', '.join(CACHES)}")
    embed = weights.embed.parts if isinstance(weights.embed, Packed) else weights.embed
    layers = [
        (each.attention_norm, each.qkv.parts, each.output.parts,
         each.mlp_norm, each.gate_up.parts, each.down.parts)
        for each in weights.layers
    ]  # fmt: skip
    return (
        astuple(shape),
        (embed, layers, weights.final_norm, weights.head.parts, weights.inverse_frequencies,
         weights.rope_amplitude),
        astuple(sparse) if sparse else (),
        CACHES.index(cache),
        astuple(limits),
    )  # fmt: skip
