"""Plain weights from any source: the original's layout, ours, or folded to Llama.

A folder of plain weights goes through the model class, which also keeps what inference does not
need (the multi-token prediction layer); everything else is unpacked one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from endside.checkpoint import Checkpoint, write_folder
from endside.errors import UserError
from endside.formats.hf import dtype_name, load_checkpoint, save
from endside.formats.hf_config import HEAD, config_to_hf, hf_name, json_bytes, point_to_code
from endside.formats.llama import factor, fold_config, llama_config, save_llama
from endside.formats.loss import EMBEDDING
from endside.formats.weights import SAFE, Source, Value, to_float
from endside.model.config import ModelConfig
from endside.quant.pack import float_to_bf16
from endside.shards import TensorSource


def cast(value: Value, dtype: str, scale: float = 1.0) -> np.ndarray:
    """A value times `scale` as a plain array, rounded once; bfloat16 as uint16 bits."""
    bits = isinstance(value, np.ndarray) and value.dtype == np.uint16
    if bits and dtype == "bfloat16" and scale == 1.0:
        return value
    numbers = to_float(value)
    if scale != 1.0:
        numbers = numbers.astype(np.float64) * scale
    if dtype == "bfloat16":
        return float_to_bf16(numbers)
    if dtype == "float16" and np.abs(numbers).max(initial=0) > np.finfo(np.float16).max:
        raise UserError("a weight is beyond float16: use --dtype bfloat16 or float32")
    return numbers.astype(dtype)


def save_plain(
    source: Source, dst: Path, *, to: str, dtype: str, overwrite: bool
) -> tuple[str, list[str]]:
    """Write the folder (to: hf, llama or endside); the number format used, and notes."""
    if source.layout == "hf":
        return _save_model(source, dst, to=to, dtype=dtype, overwrite=overwrite)
    fold = to == "llama"
    config = fold_config(source.config) if fold else source.config
    tensors = {
        hf_name(name): _source(source, name, dtype, factor(name, source.config) if fold else 1.0)
        for name in source.parameters
    }
    if source.config.tie_word_embeddings and not config.tie_word_embeddings:
        scale = factor(HEAD, source.config)
        tensors[HEAD] = _source(source, EMBEDDING, dtype, scale)
    files = {name: one for name, one in source.files.items() if not (fold and name.endswith(".py"))}
    if fold:
        raw = llama_config(source.config, source.raw or None, dtype)
    else:
        raw = config_to_hf(source.config, source.raw or None, dtype=dtype)
        raw = point_to_code(raw, set(files))
    write_folder(dst, tensors, {"config.json": json_bytes(raw), **files}, overwrite=overwrite)
    return dtype, folding_notes(source.config) if fold else []


def _source(source: Source, name: str, dtype: str, scale: float) -> TensorSource:
    parameter = source.parameters[name]
    read: Callable[[], np.ndarray] = lambda: cast(parameter.read(), dtype, scale)
    return TensorSource(SAFE[dtype], parameter.shape, read)


def _save_model(
    source: Source, dst: Path, *, to: str, dtype: str, overwrite: bool
) -> tuple[str, list[str]]:
    model = load_checkpoint(Checkpoint.open(source.place, verify=False))
    kind = dtype_name(model) if dtype == "auto" else dtype
    notes = []
    if kind != dtype_name(model):
        notes.append(f"weights rounded from {dtype_name(model)} to {kind}")
    write = save_llama if to == "llama" else save
    write(
        model,
        dst,
        tokenizer_files=source.place,
        base_config=None if to == "endside" else source.raw,
        dtype=kind,
        overwrite=overwrite,
    )
    return kind, notes + (folding_notes(model.config) if to == "llama" else [])


def folding_notes(config: ModelConfig) -> list[str]:
    """What a fold to Llama changed or left out."""
    notes = []
    if config.scale_emb != 1.0 or config.residual_scale != 1.0 or config.logit_divisor != 1.0:
        notes.append(
            f"folded: embeddings x {config.scale_emb:g}, residual increments x "
            f"{config.residual_scale:.7g}, logits / {config.logit_divisor:g}"
        )
    if config.tie_word_embeddings and not fold_config(config).tie_word_embeddings:
        notes.append("the tied head became a tensor of its own")
    if config.sparse is not None:
        notes.append("sparse attention left out: a Llama folder is always dense")
    if config.mtp_layers:
        notes.append("the multi-token prediction layer left out")
    if config.rope.long_factor != config.rope.short_factor:
        notes.append(
            "long and short rope factors differ: transformers changes list while a text grows, "
            "endside chooses once from the context"
        )
    return notes
