"""A decoder in numpy, float64, one row after the other: the truth the core's model is held to.

Keys and values are rounded to half precision, as the cache does; everything else is exact
arithmetic on the weights it is given. `draw` makes a model in which every scale and size bites.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from endside.native.model import CHUNK, Layer, Limits, Model, Request, Shape, Sparse, Weights
from endside.native.packed import Packed, interleave, pack

SHAPE = Shape(
    layers=3, width=96, heads=6, kv_heads=2, head_dim=16, ff=72, vocab=77, norm_eps=1e-5,
    embed_scale=3.0, residual_scale=0.6, logit_scale=0.25,
)  # fmt: skip


@dataclass(frozen=True)
class Plain:
    """Weights as the reference multiplies with them, float64."""

    embed: np.ndarray
    layers: list[dict[str, np.ndarray]]
    final_norm: np.ndarray
    head: np.ndarray
    frequencies: np.ndarray
    amplitude: float


@dataclass
class Decoder:
    """One sequence; `step` takes a token and gives its logits (V)."""

    shape: Shape
    plain: Plain
    keys: list[list[np.ndarray]] = field(default_factory=list)
    values: list[list[np.ndarray]] = field(default_factory=list)
    stream: list[np.ndarray] = field(default_factory=list)  # of the last step: (C), L + 1 of them

    def __post_init__(self) -> None:
        self.keys = [[] for _ in range(self.shape.layers)]
        self.values = [[] for _ in range(self.shape.layers)]

    def step(self, token: int) -> np.ndarray:
        shape, plain = self.shape, self.plain
        position = len(self.keys[0])
        x = plain.embed[token] * shape.embed_scale
        self.stream = [x]
        for index, layer in enumerate(plain.layers):
            mixed = self._attention(index, layer, self._norm(x, layer["attention_norm"]), position)
            x = x + shape.residual_scale * (layer["output"] @ mixed)
            inner = self._norm(x, layer["mlp_norm"])
            gate, up = layer["gate"] @ inner, layer["up"] @ inner
            x = x + shape.residual_scale * (layer["down"] @ (gate / (1 + np.exp(-gate)) * up))
            self.stream.append(x)
        return plain.head @ self._norm(x, plain.final_norm) * shape.logit_scale

    def _norm(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt(np.mean(x * x) + self.shape.norm_eps) * weight

    def _rope(self, x: np.ndarray, position: int) -> np.ndarray:
        angle = position * self.plain.frequencies
        cos, sin = np.cos(angle) * self.plain.amplitude, np.sin(angle) * self.plain.amplitude
        first, second = np.split(x, 2, axis=-1)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    def _attention(
        self, index: int, layer: dict[str, np.ndarray], x: np.ndarray, position: int
    ) -> np.ndarray:
        shape = self.shape
        heads, groups, dim = shape.heads, shape.kv_heads, shape.head_dim
        q, k, v = np.split(layer["qkv"] @ x, [heads * dim, (heads + groups) * dim])
        q = self._rope(q.reshape(heads, dim), position)
        k = self._rope(k.reshape(groups, dim), position)
        self.keys[index].append(k.astype(np.float16).astype(np.float64))
        self.values[index].append(v.reshape(groups, dim).astype(np.float16).astype(np.float64))
        keys, values = np.stack(self.keys[index]), np.stack(self.values[index])
        out = np.empty((heads, dim))
        for head in range(heads):
            group = head // (heads // groups)
            scores = keys[:, group] @ q[head] / np.sqrt(dim)
            weights = np.exp(scores - scores.max())
            out[head] = weights / weights.sum() @ values[:, group]
        return out.ravel()


def frequencies(shape: Shape) -> np.ndarray:
    half = shape.head_dim // 2
    return (200.0 ** (-np.arange(half) / half)).astype(np.float32)


def draw(shape: Shape, kinds: Callable[[str], dict], seed: int = 0) -> tuple[Weights, Plain]:
    """Random weights in the core's form and, what these hold exactly, in the reference's."""
    random = np.random.default_rng(seed)

    def matrix(n: int, k: int) -> np.ndarray:
        return (random.standard_normal((n, k)) / np.sqrt(k)).astype(np.float32)

    def norm() -> np.ndarray:
        return (1.3 + 0.4 * random.standard_normal(shape.width)).astype(np.float32)

    width, queries = shape.width, shape.heads * shape.head_dim
    layers: list[Layer] = []
    plain: list[dict[str, np.ndarray]] = []
    for _ in range(shape.layers):
        qkv = matrix(queries + 2 * shape.kv_heads * shape.head_dim, width)
        gate_up = interleave(matrix(shape.ff, width), matrix(shape.ff, width))
        layer = Layer(
            norm(), pack(qkv, **kinds("qkv")), pack(matrix(width, queries), **kinds("output")),
            norm(), pack(gate_up, **kinds("gate_up")),
            pack(matrix(width, shape.ff), **kinds("down")),
        )  # fmt: skip
        layers.append(layer)
        plain.append(unpacked(layer))
    embed = matrix(shape.vocab, width)
    weights = Weights(
        embed, layers, norm(), pack(matrix(shape.vocab, width), **kinds("head")),
        frequencies(shape), rope_amplitude=1.25,
    )  # fmt: skip
    truth = Plain(
        embed.astype(np.float64), plain, wide(weights.final_norm), wide(weights.head),
        frequencies(shape).astype(np.float64), weights.rope_amplitude,
    )  # fmt: skip
    return weights, truth


def wide(part: np.ndarray | Packed | None) -> np.ndarray:
    """float64."""
    assert part is not None, "a weight is missing"
    return (part.unpack() if isinstance(part, Packed) else part).astype(np.float64)


def unpacked(layer: Layer) -> dict[str, np.ndarray]:
    """A layer for `Decoder`."""
    both = wide(layer.gate_up)
    blocks = both.reshape(-1, 2, 8, both.shape[1])
    return {
        "attention_norm": wide(layer.attention_norm),
        "qkv": wide(layer.qkv),
        "output": wide(layer.output),
        "mlp_norm": wide(layer.mlp_norm),
        "gate": blocks[:, 0].reshape(-1, both.shape[1]),
        "up": blocks[:, 1].reshape(-1, both.shape[1]),
        "down": wide(layer.down),
    }


def float_kinds(_: str) -> dict:
    """No rounding at all."""
    return {"kind": "f32"}


def mixed_kinds(name: str) -> dict:
    """Every quantized kind in one model."""
    return {
        "qkv": {"kind": "int8", "group": 32},
        "output": {"kind": "int4", "group": 32, "asymmetric": True},
        "gate_up": {"kind": "int4", "group": 32},
        "down": {"kind": "ternary2", "group": 64, "scale_type": "bf16"},
        "head": {"kind": "int8", "group": 64},
    }[name]


def model(
    weights: Weights,
    *,
    sparse: Sparse | None = None,
    threads: int = 1,
    isa: str = "auto",
    context: int = 2 * CHUNK,
    chunks: int = 12,
    rows: int = 80,
    shape: Shape = SHAPE,
    cache: str = "f16",
) -> Model:
    """A model with room for several sequences."""
    limits = Limits(rows=rows, trees=40, context=context, chunks=chunks, threads=threads)
    return Model(shape, weights, sparse=sparse, cache=cache, limits=limits, isa=isa)


def request(
    tokens: Sequence[int],
    start: int,
    *,
    chunks: Sequence[int] = (0, 1),
    parents: Sequence[int] | None = None,
    want: str = "all",
) -> Request:
    """A request from plain numbers."""
    above = None if parents is None else np.array(parents, np.int32)
    return Request(np.array(tokens, np.int32), np.array(chunks, np.int32), start, above, want)


def one_by_one(engine: Model, tokens: Sequence[int], chunks: Sequence[int] = (0, 1)) -> np.ndarray:
    """Logits (T, V) of the plainest way: every token its own call."""
    rows = [engine.forward([request([t], i, chunks=chunks)]) for i, t in enumerate(tokens)]
    return np.concatenate(rows)
