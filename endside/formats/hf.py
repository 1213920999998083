"""Hugging Face folders to models and back: config.json, tensor names, fused projections.

Names are the published ones (formats §1.2): `model.` + ours, except `lm_head.weight`; q|k|v rows
may come fused as `qkv_proj` and gate|up rows as `gate_up_proj`. The model is built without memory
and its parameters are then assigned: mapped files where dtype and device already fit, else
converted one tensor at a time, so that the peak is the weights plus one tensor.

Every key of a foreign config.json is used, refused (it changes the forward pass in a way we do not
have) or logged as ignored. Three own keys travel with a checkpoint: `selection` and `lse` inside
`sparse_config`, and `mtp_layers`.

What we chose not to do: guess. A MiniCPM config that lacks a scale is refused, with one exception:
`dim_model_base` was left out of the first release, so 256 is assumed and the log says so.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from endside.checkpoint import Checkpoint, resolve, write_folder
from endside.errors import UserError
from endside.formats.hf_config import (
    EMBEDDING,
    HEAD,
    STORED,
    Attention,
    config_from_hf,
    config_to_hf,
    hf_name,
    json_bytes,
    point_to_code,
    read_config,
    with_attention,
)
from endside.formats.source import folder_source, needs_reader, state_dict
from endside.formats.weights import SAFE, companions, fused_groups
from endside.model.config import ModelConfig
from endside.model.transformer import Transformer
from endside.shards import TensorSource

__all__ = ["config_from_hf", "load", "load_checkpoint", "read_config", "save", "with_attention"]

log = logging.getLogger(__name__)

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


@dataclasses.dataclass(frozen=True)
class Rows:
    """Where a parameter lies: all of a stored tensor, or some rows of a fused one."""

    stored: str
    start: int = 0
    stop: int | None = None

    def of(self, checkpoint: Checkpoint) -> torch.Tensor:
        """The mapped tensor."""
        return checkpoint.torch(self.stored)[self.start : self.stop]


def load(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    context: int | None = None,
    attention: Attention = "auto",
) -> Transformer:
    """The model of a folder or hub name. Raises UserError, with nothing loaded, when it is wrong.

    dtype "auto" is what config.json names (else what is stored); context: tokens it is built for.
    """
    checkpoint = Checkpoint.open(resolve(path))
    return load_checkpoint(
        checkpoint, dtype=dtype, device=device, context=context, attention=attention
    )


def load_checkpoint(
    checkpoint: Checkpoint,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    context: int | None = None,
    attention: Attention = "auto",
) -> Transformer:
    """The model of an opened folder (`load`)."""
    if needs_reader(checkpoint):
        return _unpacked(checkpoint, dtype, device, context, attention)
    config = with_attention(read_config(checkpoint), attention)
    with torch.device("meta"):
        model = Transformer(config, context=context)
    places = _places(checkpoint, config, model)
    kind = _target_dtype(checkpoint, dtype)
    # a mapping that is converted is released with its pages before the next one is opened
    state = {name: rows.of(checkpoint).to(device, kind) for name, rows in places.items()}
    model.load_state_dict(state, strict=True, assign=True)
    return model


def _unpacked(
    checkpoint: Checkpoint,
    dtype: str | torch.dtype,
    device: str | torch.device,
    context: int | None,
    attention: Attention,
) -> Transformer:
    """The model of a checkpoint in low bits, its weights unpacked: as large as a plain one.

    dtype "auto" is what config.json names, else float32, in which every code is exact.
    """
    source = folder_source(checkpoint)
    config = dataclasses.replace(with_attention(source.config, attention), mtp_layers=0)
    with torch.device("meta"):
        model = Transformer(config, context=context)
    if dtype == "auto":
        named = source.raw.get("dtype") or source.raw.get("torch_dtype")
        dtype = named if named in DTYPES else "float32"
    kind = dtype if isinstance(dtype, torch.dtype) else DTYPES.get(dtype)
    if kind is None:
        raise UserError(f"dtype is {dtype!r}: use auto, {', '.join(DTYPES)}")
    model.load_state_dict(state_dict(source, kind, device), strict=True, assign=True)
    return model


def _places(checkpoint: Checkpoint, config: ModelConfig, model: Transformer) -> dict[str, Rows]:
    """Where each parameter lies; UserError when the folder does not hold exactly this model."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    places = {name: Rows(hf_name(name)) for name in shapes}
    expected = {hf_name(name): shape for name, shape in shapes.items()}
    for linear, parts in fused_groups(shapes):
        fused = f"{linear}.weight"
        if hf_name(fused) not in checkpoint.tensors:
            continue
        at = 0
        for part in parts:
            rows = expected.pop(hf_name(part))[0]
            places[part] = Rows(hf_name(fused), at, at + rows)
            at += rows
        expected[hf_name(fused)] = (at, shapes[parts[0]][1])
    if config.tie_word_embeddings and HEAD in checkpoint.tensors:
        expected[HEAD] = shapes["embed_tokens.weight"]
    checkpoint.require(expected)
    _check_floats(checkpoint, expected)
    if config.tie_word_embeddings and HEAD in checkpoint.tensors:
        _check_tied(checkpoint)
    return places


def _check_floats(checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]]) -> None:
    for name in expected:
        info = checkpoint.info(name)
        if info.dtype not in STORED:
            raise UserError(
                f"tensor {name} in {checkpoint.folder / info.file} is stored as {info.dtype}: only "
                f"{', '.join(STORED)} weights are read; use an unquantized export of the model"
            )


def _check_tied(checkpoint: Checkpoint) -> None:
    """A stored head beside tie_word_embeddings must be the embedding."""
    head, embedding = checkpoint.torch(HEAD), checkpoint.torch(EMBEDDING)
    if head.dtype != embedding.dtype or not torch.equal(head, embedding):
        raise UserError(
            f"tensor {HEAD} in {checkpoint.folder / checkpoint.info(HEAD).file} differs from the "
            "embedding although config.json ties them: set tie_word_embeddings to false"
        )
    log.info("ignored in %s: %s, equal to the embedding", checkpoint.folder, HEAD)


def _target_dtype(checkpoint: Checkpoint, dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        named = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
        stored = STORED[checkpoint.info(EMBEDDING).dtype]
        dtype = named if named in DTYPES else stored
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}: use auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def save(
    model: Transformer,
    dst: str | Path,
    *,
    tokenizer_files: Path | None = None,
    base_config: dict | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the model as a folder that the original's code, transformers and we can load.

    base_config: the config.json it came from, whose foreign keys are kept; tokenizer_files: a
    folder whose tokenizer, template and sampling files are copied; dtype None: as the parameters.
    """
    kind = dtype or dtype_name(model)
    if kind not in DTYPES:
        raise UserError(f"dtype is {kind!r}: use {', '.join(DTYPES)}")
    sources = {hf_name(name): source(p, kind) for name, p in model.named_parameters()}
    files = companions(tokenizer_files)
    config = point_to_code(config_to_hf(model.config, base_config, dtype=kind), set(files))
    return write_folder(
        dst, sources, {"config.json": json_bytes(config), **files}, overwrite=overwrite
    )


def source(tensor: torch.Tensor, dtype: str, scale: float = 1.0) -> TensorSource:
    """A tensor to write in `dtype`, multiplied by `scale` in float64 when its turn comes."""

    def read() -> Any:
        value = tensor.detach().cpu()
        if scale != 1.0:
            value = value.double() * scale
        value = value.to(DTYPES[dtype]).contiguous()
        return (value.view(torch.uint16) if dtype == "bfloat16" else value).numpy()

    return TensorSource(SAFE[dtype], tuple(tensor.shape), read)


def dtype_name(model: Transformer) -> str:
    """The dtype of the parameters, as config.json spells it."""
    return str(model.embed_tokens.weight.dtype).removeprefix("torch.")
