"""Tensors in one safetensors file per process, each holding that process's parts.

PyTorch's distributed checkpoint writes them (its Hugging Face writer: no pickle), so no process
ever holds more than its own part. A header tells where in its tensor each part lies; reading puts
one tensor together at a time, on any number of processes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

PLACES, OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"  # keys of the header, named by PyTorch


def write(tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write this process's parts into `folder`; every process of the run must take part."""
    from torch.distributed import checkpoint

    writer = checkpoint.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        checkpoint.save(dict(tensors), storage_writer=writer)
    except checkpoint.CheckpointException as error:
        # Not an Exception for PyTorch; a full disk is one for the caller to name.
        raise OSError(f"{error}") from error


@dataclass(frozen=True)
class _Part:
    file: Path
    offsets: list[int]
    shape: list[int]


class Parts(Mapping[str, torch.Tensor]):
    """The whole tensors of a folder that `write` has filled, each put together when asked for."""

    def __init__(self, folder: Path) -> None:
        self._parts: dict[str, list[_Part]] = {}
        for file in sorted(folder.glob("*.safetensors")):
            from safetensors import safe_open

            with safe_open(file, "pt") as opened:
                places = json.loads(opened.metadata()[PLACES])
                for name in opened.keys():  # noqa: SIM118 (no mapping)
                    shape = opened.get_slice(name).get_shape()
                    part = _Part(file, places[name][OFFSETS], shape)
                    self._parts.setdefault(name, []).append(part)

    def __getitem__(self, name: str) -> torch.Tensor:
        """The whole tensor."""
        parts = self._parts[name]
        ends = [[o + n for o, n in zip(p.offsets, p.shape, strict=True)] for p in parts]
        whole: torch.Tensor | None = None
        for part in parts:
            from safetensors import safe_open

            with safe_open(part.file, "pt") as opened:
                piece = opened.get_tensor(name)
            if whole is None:
                whole = piece.new_empty([max(axis) for axis in zip(*ends, strict=True)])
            place = tuple(slice(o, o + n) for o, n in zip(part.offsets, part.shape, strict=True))
            whole[place] = piece
        assert whole is not None, "a tensor has at least one part"
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)
