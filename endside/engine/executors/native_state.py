"""What of the native executor can be taken out of it: stored keys, and every stage's output.

    identity    a digest of what keys depend on, so that none is given back to another model
    export      the chunks of a sequence, byte for byte as the core reads them, in pieces where
                they lie apart
    trace       the residual stream that the core hands out; norm of the last one added here

A chunk is a number of whole bytes in the layout that the instruction set wants
(native/src/cache.h), the compressed keys in it, so writing and reading one is a copy, and what
comes back has the same bits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from endside.engine.executors.native_pack import BUFFERS, Pack, word_sum
from endside.errors import UserError
from endside.native.model import CHUNK, Model, Request
from endside.ops.rope.frequencies import inverse_frequencies

if TYPE_CHECKING:
    from endside.model.config import ModelConfig

LAYOUT = 3  # of a chunk's bytes
SAMPLE = 4096  # bytes at the start of every buffer, in order; the rest counts by its sum


def identity(config: ModelConfig, pack: Pack, embed: np.ndarray, context: int, cache: str) -> str:
    """A digest of weights, shape, positions and the cache's number format and order."""
    # which of two lists of frequencies is used depends on the context a model is built for
    frequencies, amplitude = inverse_frequencies(
        config.rope, config.head_dim, context, config.max_position_embeddings
    )
    known: dict[str, Any] = {
        "executor": ["native", LAYOUT, cache],
        "config": repr(config),
        "rope": [_digest(frequencies), amplitude],
        "embed": _digest(embed),
        "vectors": {name: _digest(vector) for name, vector in sorted(pack.vectors.items())},
        "matrices": {},
    }
    for name, matrix in sorted(pack.matrices.items()):
        buffers = [getattr(matrix, one) for one in BUFFERS]
        known["matrices"][name] = [matrix.kind, matrix.group] + [
            None if one is None else _digest(one) for one in buffers
        ]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def _digest(array: np.ndarray) -> list[Any]:
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return [len(data), word_sum(data), hashlib.sha256(data[:SAMPLE]).hexdigest()]


def export(model: Model, chunks: np.ndarray, tokens: int) -> dict[str, np.ndarray]:
    """The chunks that hold `tokens` tokens: "chunk 0", "coarse 0", … uint8, views of the cache."""
    used = chunks[: -(-tokens // CHUNK)]
    return {
        f"{kind} {number}": piece
        for number, one in enumerate(used)
        for kind, piece in model.chunk(int(one)).items()
    }


def fill(model: Model, chunks: np.ndarray, arrays: Mapping[str, np.ndarray], tokens: int) -> None:
    """Write what `export` gave into `chunks`; UserError where it is of another size."""
    room = export(model, chunks, tokens)
    found = {name: (array.dtype, array.shape) for name, array in arrays.items()}
    if found != {name: (array.dtype, array.shape) for name, array in room.items()}:
        size = sum(array.nbytes for array in room.values())
        raise UserError(
            f"{len(arrays)} pieces of a cache are given, not the {len(room)} of {size} bytes in "
            f"all that {tokens} tokens of this model take: save the session again"
        )
    for name, array in room.items():
        array[:] = arrays[name]


def trace(
    model: Model, chunks: np.ndarray, tokens: np.ndarray, norm: np.ndarray, rows: int
) -> dict[str, np.ndarray]:
    """Tokens (T,) from position 0, `rows` at a time -> stage -> (T, C) or (T, V) float32."""
    shape = model.shape
    residual = np.empty((shape.layers + 1, len(tokens), shape.width), np.float32)
    logits = np.empty((len(tokens), shape.vocab), np.float32)
    for start in range(0, len(tokens), rows):
        part = np.ascontiguousarray(tokens[start : start + rows], dtype=np.int32)
        end = start + len(part)
        taken = np.empty((shape.layers + 1, len(part), shape.width), np.float32)
        asked = Request(tokens=part, chunks=chunks, start=start, want="all")
        model.forward([asked], out=logits[start:end], trace=taken)
        residual[:, start:end] = taken
    stages = {"embed": residual[0]}
    stages |= {f"layer {index}": residual[index + 1] for index in range(shape.layers)}
    return {**stages, "norm": normed(residual[-1], norm, shape.norm_eps), "logits": logits}


def normed(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """RMSNorm of x (T, C) in float64, each row by itself."""
    wide = x.astype(np.float64)
    scale = np.sqrt((wide**2).mean(-1, keepdims=True) + eps)
    return (wide / scale * weight).astype(np.float32)


def features(
    residual: np.ndarray, layers: tuple[int, ...], weights: Pack, config: ModelConfig
) -> np.ndarray:
    """residual (L + 1, T, C) -> the streams entering `layers`, side by side (T, F).

    Number L is what the output head reads: the last stream after the final norm.
    """
    last, norm = config.num_hidden_layers, weights.vectors["final_norm"]
    parts = [
        normed(residual[last], norm, config.rms_norm_eps) if layer == last else residual[layer]
        for layer in layers
    ]
    return np.concatenate(parts, axis=1)
