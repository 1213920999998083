"""Draft heads in int4 as CPM.cu stores them: the linears of `formats/marlin.py`, read as floats.

Projections of the layer are fused as the model's are. EAGLE-2's fc is two matrices, of embedding
and of hidden state, each tiled by itself and laid side by side along the outputs; EAGLE-3's is one
(formats §3.2). The weights were trained in these four bits, so reading them loses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from endside.errors import UserError
from endside.formats.marlin import Marlin
from endside.formats.weights import to_float
from endside.model.config import ModelConfig

ENDINGS = (".qweight", ".scales")


def linears(
    arrays: Mapping[str, np.ndarray], config: ModelConfig, *, wide: bool, folder: Path
) -> dict[str, np.ndarray]:
    """arrays NAME.qweight, NAME.scales -> NAME.weight (N, K) float32; wide: eagle3's sizes."""
    width, inner = config.hidden_size, config.intermediate_size
    taken = 2 * width if wide else width
    heads = config.num_attention_heads * config.head_dim
    groups = config.num_key_value_heads * config.head_dim
    sizes = {
        "self_attn.qkv_proj": (taken, {"q_proj": heads, "k_proj": groups, "v_proj": groups}),
        "self_attn.o_proj": (heads, {"o_proj": width}),
        "mlp.gate_up_proj": (width, {"gate_proj": inner, "up_proj": inner}),
        "mlp.down_proj": (inner, {"down_proj": width}),
    }
    found = {}
    for fused, (columns, parts) in sizes.items():
        room = fused.split(".")[0]
        whole = _linear(arrays, f"layers.0.{fused}", (sum(parts.values()), columns), folder)
        pieces = np.split(whole, np.cumsum(list(parts.values()))[:-1])
        for part, piece in zip(parts, pieces, strict=True):
            found[f"layers.0.{room}.{part}.weight"] = piece
    if wide:
        found["fc.weight"] = _linear(arrays, "fc", (width, 3 * width), folder)
    else:
        both = _linear(arrays, "fc", (2 * width, width), folder)
        found["fc.weight"] = np.concatenate(np.split(both, 2), axis=1)
    return found


def _linear(
    arrays: Mapping[str, np.ndarray], base: str, shape: tuple[int, int], folder: Path
) -> np.ndarray:
    scales = arrays.get(f"{base}.scales")
    if scales is None or not len(scales):
        raise UserError(f"{folder} has other linears in low bits but not {base}: it is incomplete")
    layout = Marlin(-1 if len(scales) == 1 else shape[1] // len(scales), {})
    for name, (_, size) in layout.parts(base, shape).items():
        there = arrays[name].shape if name in arrays else "absent"
        if there != size:
            raise UserError(f"draft head {folder}: {name} is {there} and must be {size}")
    return to_float(layout.read(arrays, base, shape))
