"""What a layer-by-layer pass leaves on the disk while it runs, so that any death costs one layer.

    folder/plan.json              what is being done to which model; another plan starts afresh
    folder/lock                   held by the process that works
    folder/states_00007_NAME.bin  hidden states (rows, T, C) float32 that enter layer 7, per stream
    folder/layer_00006.safetensors and layer_00006.json      layer 6, finished

The JSON of a layer appears last and by a rename: where it is, its tensors and the states behind it
are whole. Hidden states live in files and pass through memory a few rows at a time, so calibration
text costs disk, not memory.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from endside.atomic import sweep, write_atomic
from endside.checkpoint import read_json
from endside.errors import UserError
from endside.shards import NUMPY, TensorSource, read_header, sync, write_shard


class Workplace:
    """The folder of one pass; use it in a `with`. `finished` layers are there already."""

    def __init__(self, folder: Path, plan: Mapping[str, Any]) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(folder / "lock")
        except OSError as error:
            raise UserError(
                f"cannot write {folder}: {error.strerror}; choose another DST or correct its rights"
            ) from error
        sweep(folder)
        text = json.dumps(plan, sort_keys=True, indent=1)
        noted = folder / "plan.json"
        if not noted.is_file() or noted.read_text() != text:
            for file in folder.iterdir():
                if file.name != "lock":
                    file.unlink()
            write_atomic(noted, text)
        self.finished = 0
        while self._note(self.finished).is_file():
            self.finished += 1

    def __enter__(self) -> Workplace:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def discard(self) -> None:
        """Remove the folder; the pass is over. The plan goes first, so that a half is no pass."""
        (self.folder / "plan.json").unlink()
        shutil.rmtree(self.folder)

    def finish(
        self, layer: int, tensors: Mapping[str, TensorSource], note: Mapping[str, Any]
    ) -> None:
        """Commit a layer whose successor's states are written, and drop its own."""
        write_shard(self._shard(layer), tensors)
        write_atomic(self._note(layer), json.dumps(note))
        self.finished = layer + 1
        for old in self.folder.glob(f"states_{layer:05d}_*"):
            old.unlink()

    def note(self, layer: int) -> dict[str, Any]:
        """What was noted about a finished layer."""
        return read_json(self._note(layer))

    def tensors(self, layer: int) -> dict[str, TensorSource]:
        """The tensors of a finished layer, read when they are written again."""
        path = self._shard(layer)
        return {
            name: TensorSource(info.dtype, info.shape, lambda info=info: _read(path, info))
            for name, info in read_header(path).items()
        }

    def states(self, layer: int, stream: str, shape: tuple[int, int, int]) -> States:
        """The states (rows, T, C) of a stream that enter `layer`."""
        return States(self.folder / f"states_{layer:05d}_{stream}.bin", shape)

    def _shard(self, layer: int) -> Path:
        return self.folder / f"layer_{layer:05d}.safetensors"

    def _note(self, layer: int) -> Path:
        return self.folder / f"layer_{layer:05d}.json"


class States:
    """A file of float32 rows, each (T, C): written once from the front, read in batches."""

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        self.path, self.shape = path, shape

    def write(self, batches: Iterator[torch.Tensor]) -> None:
        """Write batches (B, T, C), in order, until all rows are there."""
        rows = 0
        with self.path.open("wb") as file:
            for batch in batches:
                file.write(memoryview(batch.float().contiguous().numpy()).cast("B"))
                rows += len(batch)
            sync(file)
        assert rows == self.shape[0], f"{rows} rows written, {self.shape[0]} announced"

    def read(self, batch: int) -> Iterator[torch.Tensor]:
        """Batches (B, T, C) of at most `batch` rows, in order."""
        rows, length, width = self.shape
        with self.path.open("rb") as file:
            for start in range(0, rows, batch):
                count = min(batch, rows - start)
                flat = np.fromfile(file, np.float32, count * length * width)
                yield torch.from_numpy(flat).view(count, length, width)


def array_source(array: np.ndarray) -> TensorSource:
    """An array to be written as it is: unsigned bytes or float16."""
    return TensorSource(
        {"uint8": "U8", "float16": "F16"}[array.dtype.name], array.shape, lambda: array
    )


def tensor_source(tensor: torch.Tensor) -> TensorSource:
    """A float tensor to be written in its own dtype."""
    names = {
        torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    }  # fmt: skip

    def read() -> np.ndarray:
        whole = tensor.detach().contiguous()
        return (whole.view(torch.uint16) if whole.dtype == torch.bfloat16 else whole).numpy()

    return TensorSource(names[tensor.dtype], tuple(tensor.shape), read)


def _read(path: Path, info: Any) -> np.ndarray:
    dtype = np.dtype(NUMPY[info.dtype])
    count = info.nbytes // dtype.itemsize
    return np.fromfile(path, dtype, count, offset=info.start).reshape(info.shape)


def _lock(path: Path) -> BinaryIO:
    file = path.open("wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(
            f"another process quantizes into {path.parent}: wait for it, or choose another DST"
        ) from None
    return file
