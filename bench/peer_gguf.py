"""Random weights in the exact shape of a preset, as a GGUF file for llama.cpp.

    python bench/peer_gguf.py OUT.gguf --preset minicpm4-0.5b --kind F16
    python bench/peer_gguf.py OUT.gguf --preset minicpm4-8b --kind Q4_0

F16 is what llama.cpp's own quantizer takes; Q4_0 writes blocks at once, with the Q6_K head that the
quantizer would give, so that the 8B shape needs no 16 GB in between. Speed does not depend on the
values, only on shapes and types; the muP scales and rope factors are the preset's. The vocabulary
has the right size and no meaning.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from endside.formats.gguf import FILE_TYPES, config_keys
from endside.formats.gguf_file import GgufSource, f32, i32, u32, write_gguf
from endside.formats.gguf_types import TYPES
from endside.model.config import ModelConfig
from endside.model.presets import preset

DEVIATION = 0.02  # of the weights, about
HEADS = {"Q4_0": "Q6_K", "F16": "F16"}  # type of the output head, which a tied embedding is


def write(path: Path, config: ModelConfig, kind: str) -> None:
    """Write the file, tensor by tensor."""
    keys, tensors, _ = config_keys(config)
    keys |= {"general.file_type": u32(FILE_TYPES[kind]), **_vocabulary(config.vocab_size)}
    rng = np.random.default_rng(0)
    for name, shape, stored in _matrices(config, kind):
        tensors[name] = GgufSource(stored, shape, _reader(stored, math.prod(shape), rng))
    ones = np.ones(config.hidden_size, np.float32).view(np.uint8)
    for name in ("output_norm", *(f"blk.{layer}.{norm}_norm" for norm in ("attn", "ffn")
                                  for layer in range(config.num_hidden_layers))):  # fmt: skip
        tensors[f"{name}.weight"] = GgufSource("F32", (config.hidden_size,), lambda: ones)
    write_gguf(path, keys, tensors, overwrite=True)


def _matrices(config: ModelConfig, kind: str) -> Iterator[tuple[str, tuple[int, int], str]]:
    """Name, rows x columns and stored type of every matrix."""
    width, ff, head = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    tied = config.tie_word_embeddings
    yield "token_embd.weight", (config.vocab_size, width), HEADS[kind] if tied else kind
    if not tied:
        yield "output.weight", (config.vocab_size, width), HEADS[kind]
    shapes = {
        "attn_q": (queries, width), "attn_k": (keys, width), "attn_v": (keys, width),
        "attn_output": (width, queries), "ffn_gate": (ff, width), "ffn_up": (ff, width),
        "ffn_down": (width, ff),
    }  # fmt: skip
    for layer in range(config.num_hidden_layers):
        for name, shape in shapes.items():
            yield f"blk.{layer}.{name}.weight", shape, kind


def _vocabulary(size: int) -> dict[str, Any]:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [f"\u2581t{index}" for index in range(size - len(pieces))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": f32(-np.arange(size)),
        "tokenizer.ggml.token_type": i32([2, 3, 3] + [6] * 256 + [1] * (size - 259)),
        "tokenizer.ggml.bos_token_id": u32(1),
        "tokenizer.ggml.eos_token_id": u32(2),
    }


def _reader(kind: str, count: int, rng: np.random.Generator) -> Callable[[], np.ndarray]:
    return lambda: _weights(kind, count, rng)


def _weights(kind: str, count: int, rng: np.random.Generator) -> np.ndarray:
    """The bytes of random weights in their stored form."""
    if kind == "F16":
        noise = rng.standard_normal(count, np.float32) * np.float32(DEVIATION)
        return noise.astype(np.float16).view(np.uint8)
    stored = TYPES[kind]
    rows = count // stored.block
    blocks = np.frombuffer(rng.bytes(rows * stored.bytes), np.uint8).reshape(rows, -1).copy()
    if kind == "Q4_0":  # a nibble less 8 has a deviation of 4.6
        _scale(blocks, 0, rng.uniform(0.8, 1.2, rows) * DEVIATION / 4.6)
        return blocks
    assert kind == "Q6_K", f"no random blocks of {kind} are known"
    blocks[:, 192:208] = rng.integers(8, 16, (rows, 16))  # sixteen scales; six bits: 18.5
    _scale(blocks, 208, rng.uniform(0.8, 1.2, rows) * DEVIATION / (12 * 18.5))
    return blocks


def _scale(blocks: np.ndarray, at: int, scales: np.ndarray) -> None:
    blocks[:, at : at + 2] = scales.astype(np.float16).view(np.uint8).reshape(-1, 2)


def main() -> None:
    """Write the file named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--preset", default="minicpm4-0.5b")
    parser.add_argument("--kind", choices=tuple(HEADS), default="F16")
    flags = parser.parse_args()
    write(flags.out, preset(flags.preset), flags.kind)
    print(f"{flags.out}: {flags.out.stat().st_size / 1e6:,.1f} MB")


if __name__ == "__main__":
    main()
