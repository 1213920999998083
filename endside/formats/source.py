"""Open a stored model, whatever its format, as a `Source`; and as a model to run.

A file that ends in .gguf is GGUF, and so is a checkpoint whose tensors lie in one
(formats/gguf_folder.py). A folder says what it is by `quantization_config.quant_method` (gptq, awq,
endside), or by the names of its tensors (CPM.cu's Marlin files carry no configuration of their
own); without either it is plain.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from endside.checkpoint import Checkpoint, resolve
from endside.errors import UserError
from endside.formats.awq import Awq
from endside.formats.gptq import Gptq
from endside.formats.hf_config import HEAD, config_from_hf, hf_name
from endside.formats.marlin import Marlin
from endside.formats.packed import Packed
from endside.formats.weights import (
    Layout,
    Parameter,
    Source,
    Value,
    companions,
    from_checkpoint,
    fused_groups,
    is_linear,
    shapes,
    to_float,
)
from endside.model.config import ModelConfig
from endside.quant.pack import METHOD, Scheme

if TYPE_CHECKING:
    import torch

QUANTIZED = "quantization_config"


def open_source(path: str | Path) -> Source:
    """A folder, a hub name or a .gguf file; UserError when it is damaged or not supported."""
    if Path(path).suffix == ".gguf" and not Path(path).expanduser().is_dir():
        from endside.formats.gguf import open_gguf

        return open_gguf(Path(path).expanduser())
    return folder_source(Checkpoint.open(resolve(path)))


def folder_source(checkpoint: Checkpoint) -> Source:
    """The model of an opened checkpoint."""
    if (file := gguf_file(checkpoint)) is not None:
        from endside.formats.gguf import open_gguf

        return open_gguf(file)
    block = checkpoint.config.get(QUANTIZED)
    raw = {key: value for key, value in checkpoint.config.items() if key != QUANTIZED}
    try:
        config, ignored = config_from_hf(raw)
        layout = _layout(checkpoint, block, config)
    except UserError as error:
        raise UserError(f"{checkpoint.folder}: {error}") from error
    return Source(
        place=checkpoint.folder,
        layout=layout.name if layout else "hf",
        config=config,
        raw=raw,
        parameters=from_checkpoint(checkpoint, config, layout),
        files=companions(checkpoint.folder),
        ignored=tuple(ignored),
    )


def needs_reader(checkpoint: Checkpoint) -> bool:
    """Whether weights are stored otherwise than as plain tensors under their published names."""
    stored = bool(checkpoint.config.get(QUANTIZED)) or _is_marlin(checkpoint)
    return stored or gguf_file(checkpoint) is not None


def gguf_file(checkpoint: Checkpoint) -> Path | None:
    """The GGUF file in which a checkpoint's tensors lie."""
    file = next((info.file for info in checkpoint.tensors.values()), "")
    return Path(os.path.normpath(checkpoint.folder / file)) if file.endswith(".gguf") else None


def low_bits(source: Source) -> tuple[str, str]:
    """How the blocks' linears and the head are stored.

    Each is "none" (plain), the kind of its low bits, or "mixed": several kinds, or one of others'.
    """
    head = source.parameters.get(HEAD, source.parameters["embed_tokens.weight"])
    return _kind([one for name, one in source.parameters.items() if is_linear(name)]), _kind([head])


def _kind(parameters: list[Parameter]) -> str:
    if all(one.plain for one in parameters):
        return "none"
    kinds = {"mixed" if one.scheme is None else one.scheme.kind for one in parameters}
    return kinds.pop() if len(kinds) == 1 else "mixed"


def _layout(checkpoint: Checkpoint, block: Any, config: ModelConfig) -> Layout | None:
    if block is not None and not isinstance(block, dict):
        raise UserError(f"config.json {QUANTIZED} is {block!r}: it must be an object")
    if _is_marlin(checkpoint):
        group = (block or {}).get("group_size", 128)
        if type(group) is not int or not (group == -1 or 1 <= group <= 1 << 20):
            raise UserError(f"config.json {QUANTIZED}.group_size is {group!r}: use -1 or 1 .. 2^20")
        return Marlin(group, _fused_rows(config, len(checkpoint.tensors)))
    if block is None:
        return None
    method = block.get("quant_method")
    readers = {
        "gptq": Gptq.from_config,
        "awq": Awq.from_config,
        METHOD: lambda one: Packed(Scheme.from_config(one)),
    }
    if method not in tuple(readers):  # a hostile file's method may not be hashable
        raise UserError(
            f"config.json {QUANTIZED}.quant_method is {method!r}: {', '.join(readers)} are read; "
            "use another export of the model"
        )
    return readers[method](block)


def _is_marlin(checkpoint: Checkpoint) -> bool:
    names = checkpoint.tensors
    return any(
        name.endswith("qkv_proj.qweight") and f"{name.removesuffix('qweight')}qzeros" not in names
        for name in names
    )


def _fused_rows(config: ModelConfig, stored: int) -> dict[str, tuple[str, int, int, int]]:
    """Where the rows of each projection lie in CPM.cu's fused ones."""
    sizes, found = shapes(config, stored=stored), {}
    for fused, parts in fused_groups(sizes):
        total, at = sum(sizes[part][0] for part in parts), 0
        for part in parts:
            rows = sizes[part][0]
            found[hf_name(part).removesuffix(".weight")] = (hf_name(fused), at, rows, total)
            at += rows
    return found


def state_dict(source: Source, dtype: torch.dtype, device: Any) -> dict[str, torch.Tensor]:
    """Every parameter as a plain tensor, converted one at a time."""
    return {
        name: _tensor(parameter.read()).to(device, dtype)
        for name, parameter in source.parameters.items()
    }


def _tensor(value: Value) -> torch.Tensor:
    import torch

    if isinstance(value, np.ndarray) and value.dtype == np.uint16:
        return torch.from_numpy(np.ascontiguousarray(value)).view(torch.bfloat16)
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(value))
    return torch.from_numpy(to_float(value))
