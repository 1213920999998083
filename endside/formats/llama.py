"""Fold a MiniCPM model into a plain Llama one: the same function without muP scales (formats §1.1).

    E'      = E * scale_emb                      embeddings enter the residual stream scaled
    W_o'    = W_o * scale_depth / sqrt(L)        both blocks of a layer end in a linear map,
    W_down' = W_down * scale_depth / sqrt(L)     which absorbs the factor of its increment
    W_head' = W_head / (C / dim_model_base)

A tied head is untied first, since E and W_head get different factors. Products are taken in float64
and rounded once to the stored dtype; in bfloat16 that rounding is a real (small) change of the
weights, so write float32 where equality matters.

What a Llama folder cannot hold is dropped and reported: sparse attention and the MTP layer.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from endside.checkpoint import write_folder
from endside.formats.hf import HEAD, companions, dtype_name, hf_name, source
from endside.formats.hf_config import config_to_hf, json_bytes, rope_amplitude
from endside.model.config import ModelConfig
from endside.model.transformer import Transformer
from endside.shards import TensorSource


def fold_config(config: ModelConfig) -> ModelConfig:
    """The Llama shape that computes the same: neutral scales, an explicit rope amplitude."""
    scaled = config.scale_emb != 1.0 or config.logit_divisor != 1.0
    rope = config.rope
    if rope.kind == "longrope":
        stretch = rope.factor or max(1.0, config.max_position_embeddings / rope.original)
        rope = dataclasses.replace(rope, factor=stretch, amplitude=rope_amplitude(config))
    return dataclasses.replace(
        config, rope=rope, scale_emb=1.0, scale_depth=None, dim_model_base=None, sparse=None,
        mtp_layers=0, tie_word_embeddings=config.tie_word_embeddings and not scaled,
    )  # fmt: skip


def fold_tensors(model: Transformer, dtype: str) -> dict[str, TensorSource]:
    """The folded weights by published name, each computed when it is written."""
    config, folded = model.config, fold_config(model.config)
    parameters = dict(model.named_parameters())
    sources: dict[str, TensorSource] = {}
    for name, parameter in parameters.items():
        if not name.startswith("mtp."):
            sources[hf_name(name)] = source(parameter, dtype, factor(name, config))
    if config.tie_word_embeddings and not folded.tie_word_embeddings:
        sources[HEAD] = source(parameters["embed_tokens.weight"], dtype, 1 / config.logit_divisor)
    return sources


def factor(name: str, config: ModelConfig) -> float:
    """What the parameter of that name is multiplied by."""
    if name == "embed_tokens.weight":
        return config.scale_emb
    if name == HEAD:
        return 1 / config.logit_divisor
    if name.endswith(("self_attn.o_proj.weight", "mlp.down_proj.weight")):
        return config.residual_scale
    return 1.0


def save_llama(
    model: Transformer,
    dst: str | Path,
    *,
    tokenizer_files: Path | None = None,
    base_config: dict | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the folded model; any Llama implementation loads it. dtype None: as the parameters."""
    kind = dtype or dtype_name(model)
    config = llama_config(model.config, base_config, kind)
    files = {
        name: file for name, file in companions(tokenizer_files).items() if not name.endswith(".py")
    }
    return write_folder(
        dst,
        fold_tensors(model, kind),
        {"config.json": json_bytes(config), **files},
        overwrite=overwrite,
    )


def llama_config(config: ModelConfig, base: dict | None, dtype: str) -> dict[str, Any]:
    """The config.json of the folded model."""
    found: dict[str, Any] = config_to_hf(fold_config(config), base, dtype=dtype)
    if found["rope_scaling"] and config.rope.original:
        # transformers 4 looks for it beside the table
        found["original_max_position_embeddings"] = config.rope.original
    return found
