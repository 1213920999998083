"""One safetensors file: its header checked field by field, its bytes written as a stream.

A file is an 8-byte little-endian length n, n bytes of JSON that give each tensor a dtype, a shape
and a byte range, and then the bytes. Nothing in it can run code. We parse and write it ourselves:
reading, so that every way a file can be wrong is one sentence with file, tensor and fix,

    file size = 8 + n + (last end);  ranges tile the data without hole or overlap;
    range length = itemsize x product(shape)

writing, so that a model passes through one tensor at a time and equal tensors give equal bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from endside.errors import UserError

# BF16 and the 8-bit floats have no numpy type: their bits are handed out as unsigned integers
NUMPY = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip
AGAIN = "download it again, or export the model again"


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: safetensors dtype name, shape, file name and byte range in the file."""

    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int  # bytes from the start of the file
    nbytes: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Parse and check the header of one safetensors file, against its size too."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= size - 8:
            raise UserError(
                f"{path} is truncated or no safetensors file (header of {length} bytes in a file "
                f"of {size}), so none of its tensors can be read: {AGAIN}"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
        entries = _entries(header)
    except (ValueError, RecursionError, _Malformed) as error:
        raise UserError(f"the header of {path} is damaged ({error}): {AGAIN}") from error
    return _tiled(path, entries, data=8 + length, size=size)


class _Malformed(Exception):
    """A header that is JSON but describes no tensors."""


def _unique(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise _Malformed(f"tensor {next(n for n in names if names.count(n) > 1)} is there twice")
    return found


def _entries(header: object) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    if not isinstance(header, dict):
        raise _Malformed("it is no table of tensors")
    return {name: _entry(name, entry) for name, entry in header.items() if name != "__metadata__"}


def _entry(name: str, entry: object) -> tuple[str, tuple[int, ...], int, int]:
    """(dtype, shape, begin, end) of a header entry, types and size checked."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _Malformed(f"tensor {name} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    lists = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
    if not lists or any(type(n) is not int or n < 0 for n in [*shape, *offsets]):
        raise _Malformed(f"tensor {name} has shape {shape} and data_offsets {offsets}")
    if not isinstance(dtype, str) or dtype not in NUMPY:
        raise _Malformed(f"tensor {name} has unknown dtype {dtype!r}, known are {', '.join(NUMPY)}")
    wanted = math.prod(shape) * np.dtype(NUMPY[dtype]).itemsize
    if offsets[1] - offsets[0] != wanted:
        raise _Malformed(
            f"tensor {name} of {dtype} {shape} needs {wanted} bytes, its range has "
            f"{offsets[1] - offsets[0]}"
        )
    return dtype, tuple(shape), offsets[0], offsets[1]


def _tiled(path: Path, entries: dict, *, data: int, size: int) -> dict[str, TensorInfo]:
    """Infos in file order; the ranges must cover the data exactly."""
    infos, at = {}, 0
    for name in sorted(entries, key=lambda name: entries[name][2:]):
        dtype, shape, begin, end = entries[name]
        if begin != at:
            raise UserError(
                f"tensor {name} in {path} starts at byte {begin} of the data, expected "
                f"{at}: {AGAIN}"
            )
        if data + end > size:
            raise UserError(
                f"{path} is truncated: tensor {name} ends at byte {data + end}, the file at "
                f"{size}: {AGAIN}"
            )
        infos[name] = TensorInfo(dtype, shape, path.name, data + begin, end - begin)
        at = end
    if data + at != size:
        last = next(reversed(infos), "the header")
        raise UserError(
            f"{path} has {size - data - at} bytes after its last tensor {last}: {AGAIN}"
        )
    return infos


def checksum(file: BinaryIO, info: TensorInfo) -> int:
    """crc32 of a tensor's bytes in an open file, read in pieces."""
    file.seek(info.start)
    total, left = 0, info.nbytes
    while left:
        piece = file.read(min(left, 1 << 24))
        assert piece, "the header was checked against the size, so the bytes are there"
        total, left = zlib.crc32(piece, total), left - len(piece)
    return total


def digest(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class TensorSource:
    """A tensor to be written: its bits are asked for once, when their turn comes."""

    dtype: str  # safetensors name; BF16 and 8-bit floats are read as unsigned bits
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return math.prod(self.shape) * np.dtype(NUMPY[self.dtype]).itemsize


def write_shard(path: Path, tensors: Mapping[str, TensorSource]) -> dict:
    """Write one file, synced to disk; its manifest entry: bytes, sha256 and a crc32 per tensor.

    Widest items first, so that every tensor starts at a multiple of its item size.
    """
    order = sorted(tensors, key=lambda name: -np.dtype(NUMPY[tensors[name].dtype]).itemsize)
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in order:
        source = tensors[name]
        offsets = [at, at + source.nbytes]
        header[name] = {"dtype": source.dtype, "shape": [*source.shape], "data_offsets": offsets}
        at = offsets[1]
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    sums: dict[str, int] = {}
    sha = hashlib.sha256()
    with path.open("wb") as file:
        for piece in (struct.pack("<Q", len(raw)), raw):
            sha.update(piece)
            file.write(piece)
        for name in order:
            data = _bits(name, tensors[name])
            sums[name] = zlib.crc32(data)
            sha.update(data)
            file.write(data)
            del data
        sync(file)
    return {"bytes": path.stat().st_size, "sha256": sha.hexdigest(), "tensors": sums}


def _bits(name: str, source: TensorSource) -> memoryview:
    array = source.read()
    same = array.shape == source.shape and array.dtype == np.dtype(NUMPY[source.dtype])
    assert same, f"{name}: its source gave {array.dtype} {array.shape}, not what it announced"
    return memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def sync(file: BinaryIO) -> None:
    """Return once what was written to the file is on the disk."""
    file.flush()
    os.fsync(file.fileno())
