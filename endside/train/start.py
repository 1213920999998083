"""Weights that a run starts from: a checkpoint of another run, or a model folder.

Only the weights: the optimizer, the schedule and the reading order begin anew, because they belong
to another stage (`decay_from` is what continues one). The shape may differ in all that has no
weights: attention, rotary factors, the longest position.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from endside.errors import UserError
from endside.formats import hf
from endside.train.run_folder import STATE, read_checkpoint


def start_from(model: nn.Module, folder: str) -> None:
    """Copy the weights in `folder` into `model`; UserError names the first that differs."""
    tensors, own = _weights(Path(folder)), model.state_dict()
    for name in sorted(own.keys() | tensors.keys()):
        shapes = [tuple(side[name].shape) if name in side else "absent" for side in (tensors, own)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"init_from {folder} is of another model: {name} is {shapes[0]} there and "
                f"{shapes[1]} here; use the model configuration it was trained with"
            )
    model.load_state_dict(tensors)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    if (folder / STATE).is_file():
        return read_checkpoint(folder).tensors("model")
    return dict(hf.load(folder, dtype="float32").state_dict())
