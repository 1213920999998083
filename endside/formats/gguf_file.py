"""The GGUF container: keys, a table of tensors, aligned data. Read from strangers, so checked.

    "GGUF", u32 version, u64 tensors, u64 keys
    key:     string name, u32 type, value          string: u64 length, bytes
    tensor:  string name, u32 dims, u64 sizes (innermost first), u32 type, u64 offset
    data:    from the next multiple of general.alignment (32), each tensor at such a multiple

Nothing is believed: every count and length is compared with the bytes that are left before
anything is built from it, so the memory a file can claim is bounded by its own size; offsets must
be aligned, inside the file, and must not overlap. What is wrong becomes one sentence with file and
place. Tensors are mapped, never copied here. Only little-endian files of versions 2 and 3 exist in
practice; others are refused, and so are files split in parts.

The type id 42 has two layouts (gguf_types.py): the one whose sizes agree with the offsets is taken.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from endside.errors import UserError
from endside.formats.gguf_types import BY_ID, KNOWN_IDS, TYPES
from endside.shards import AGAIN, sync

MAGIC = b"GGUF"
ALIGNMENT = 32
SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "<u1",
           10: "<u8", 11: "<i8", 12: "<f8"}  # fmt: skip
BOOL, STRING, ARRAY = 7, 8, 9
LONGEST_NAME = 1 << 16
MAX_DIMS = 4
MAX_DEPTH = 2  # of arrays in arrays
Q2_0 = 42


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies. shape: outermost first, as everywhere else."""

    kind: str  # a key of gguf_types.TYPES
    shape: tuple[int, ...]
    start: int  # bytes from the start of the file
    nbytes: int


@dataclass(frozen=True, eq=False)
class GgufFile:
    """An opened file. Holds no weights."""

    path: Path
    keys: dict[str, Any]  # numbers, strings, lists of strings, numpy arrays of numbers
    tensors: dict[str, GgufTensor]
    data: mmap.mmap

    def raw(self, name: str) -> np.ndarray:
        """The bytes of a tensor, mapped copy-on-write: (nbytes,) uint8."""
        tensor = self.tensors[name]
        return np.frombuffer(self.data, np.uint8, tensor.nbytes, tensor.start)


class _Wrong(Exception):
    """What is wrong with the bytes."""


class _Cursor:
    """Reads forward; never past the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.size = data, 0, len(data)

    def take(self, count: int, what: str) -> int:
        """Step over `count` bytes and return where they start."""
        if count > self.size - self.at:
            raise _Wrong(f"{what} needs {count} bytes at byte {self.at} of {self.size}")
        self.at += count
        return self.at - count

    def number(self, form: str, what: str) -> Any:
        """One number of a struct format."""
        at = self.take(struct.calcsize(form), what)
        return struct.unpack_from(form, self.data, at)[0]

    def count(self, least: int, what: str) -> int:
        """A count of things that take at least `least` bytes each."""
        number = self.number("<Q", what)
        if number > (self.size - self.at) // least:
            raise _Wrong(f"{what} is {number}, more than the {self.size - self.at} bytes left hold")
        return number

    def string(self, what: str) -> str:
        """A text."""
        length = self.count(1, f"the length of {what}")
        at = self.take(length, what)
        # token pieces may be cut inside a character; what is no UTF-8 stays recognisable
        return bytes(self.data[at : at + length]).decode("utf-8", "surrogateescape")

    def value(self, kind: int, what: str, depth: int = 0) -> Any:
        """A value of a key."""
        if kind == STRING:
            return self.string(what)
        if kind == ARRAY:
            return self.array(what, depth)
        if kind not in SCALARS:
            raise _Wrong(f"{what} has type {kind}, which does not exist")
        number = np.frombuffer(self.data, SCALARS[kind], 1, self.take(_width(kind), what))[0]
        return bool(number) if kind == BOOL else number.item()

    def array(self, what: str, depth: int) -> Any:
        """An array: numbers as numpy, the rest as a list."""
        kind = self.number("<I", f"the type of {what}")
        if kind in SCALARS:
            count = self.count(_width(kind), f"the length of {what}")
            start = self.take(count * _width(kind), what)
            return np.frombuffer(self.data, SCALARS[kind], count, start)
        if kind == ARRAY and depth >= MAX_DEPTH:
            raise _Wrong(f"{what} holds arrays in arrays in arrays")
        if kind not in (STRING, ARRAY):
            raise _Wrong(f"{what} holds type {kind}, which does not exist")
        count = self.count(8 if kind == STRING else 12, f"the length of {what}")
        return [self.value(kind, what, depth + 1) for _ in range(count)]


def _width(kind: int) -> int:
    return np.dtype(SCALARS[kind]).itemsize


def read_gguf(path: Path) -> GgufFile:
    """Open and check a file; UserError says what is wrong with it."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if size else None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if data is None or data[:4] != MAGIC:
        raise UserError(f"{path} is no GGUF file (it does not start with GGUF): {AGAIN}")
    try:
        return _parse(path, data)
    except _Wrong as error:
        raise UserError(f"{path} is damaged or no GGUF file: {error}: {AGAIN}") from error


def _parse(path: Path, data: mmap.mmap) -> GgufFile:
    cursor = _Cursor(data)
    cursor.take(4, "the magic")
    version = cursor.number("<I", "the version")
    if version not in (2, 3):
        raise UserError(
            f"{path} is GGUF version {version}: little-endian files of versions 2 and 3 are read; "
            "convert it with a current llama.cpp"
        )
    tensor_count = cursor.count(24, "the number of tensors")
    key_count = cursor.count(13, "the number of keys")
    keys: dict[str, Any] = {}
    for _ in range(key_count):
        name = cursor.string("a key's name")
        if name in keys or len(name) > LONGEST_NAME:
            raise _Wrong(f"key {name[:80]!r} is there twice or too long")
        kind = cursor.number("<I", f"the type of {name[:80]}")
        keys[name] = cursor.value(kind, f"key {name[:80]}")
    infos = _infos(cursor, tensor_count)
    parts = keys.get("split.count", 0)
    if not isinstance(parts, int) or parts > 1:
        raise UserError(
            f"{path} is one of {parts!r:.40} parts: join them with llama-gguf-split --merge"
        )
    return GgufFile(path, keys, _place(cursor, keys, infos), data)


Info = tuple[tuple[int, ...], int, int]  # shape, type id, offset


def _infos(cursor: _Cursor, count: int) -> dict[str, Info]:
    infos: dict[str, Info] = {}
    for _ in range(count):
        name = cursor.string("a tensor's name")
        if name in infos or len(name) > LONGEST_NAME:
            raise _Wrong(f"tensor {name[:80]!r} is there twice or too long")
        dims = cursor.number("<I", f"the dimensions of {name[:80]}")
        if not 1 <= dims <= MAX_DIMS:
            raise _Wrong(f"tensor {name[:80]} has {dims} dimensions")
        sizes = [cursor.number("<Q", f"the shape of {name[:80]}") for _ in range(dims)]
        kind = cursor.number("<I", f"the type of {name[:80]}")
        offset = cursor.number("<Q", f"the offset of {name[:80]}")
        if kind not in BY_ID:
            raise _Wrong(
                f"tensor {name[:80]} has type {KNOWN_IDS.get(kind, kind)}, which is not read "
                f"({', '.join(one.name for one in BY_ID.values())} are)"
            )
        infos[name] = (tuple(reversed(sizes)), kind, offset)
    return infos


def _place(cursor: _Cursor, keys: dict[str, Any], infos: dict[str, Info]) -> dict[str, GgufTensor]:
    """Places in the file, checked: aligned, inside, apart from each other."""
    step = keys.get("general.alignment", ALIGNMENT)
    if type(step) is not int or not 8 <= step <= 1 << 20 or step & (step - 1):
        raise _Wrong(f"general.alignment is {step!r}, no power of two")
    begin = -(-cursor.at // step) * step
    two_bit = _two_bit(infos, step, cursor.size - begin)
    tensors: dict[str, GgufTensor] = {}
    at = 0
    for name in sorted(infos, key=lambda name: infos[name][2]):
        shape, kind, offset = infos[name]
        block = TYPES[two_bit] if kind == Q2_0 else BY_ID[kind]
        if shape[-1] % block.block or not all(shape):
            raise _Wrong(f"tensor {name[:80]} of {shape} does not divide in blocks of {block.name}")
        nbytes = math.prod(shape) // block.block * block.bytes
        if offset % step or offset < at:
            raise _Wrong(
                f"tensor {name[:80]} at offset {offset} is not aligned, or overlaps another"
            )
        if begin + offset + nbytes > cursor.size:
            raise _Wrong(
                f"tensor {name[:80]} ends at byte {begin + offset + nbytes}, the file at "
                f"{cursor.size}"
            )
        at = offset + nbytes
        tensors[name] = GgufTensor(block.name, shape, begin + offset, nbytes)
    return tensors


def _two_bit(infos: dict[str, Info], step: int, length: int) -> str:
    """Which layout of type 42 fits: the one whose tensors end where the next ones begin."""
    order = sorted(infos.values(), key=lambda info: info[2])
    ends = [info[2] for info in order[1:]] + [length]
    votes = dict.fromkeys(("Q2_0", "Q2_0/128"), 0)
    for (shape, kind, offset), end in zip(order, ends):
        if kind != Q2_0:
            continue
        for name in votes:
            block = TYPES[name]
            nbytes = math.prod(shape) // block.block * block.bytes
            fits = shape[-1] % block.block == 0 and end in (
                offset + nbytes, offset + -(-nbytes // step) * step,
            )  # fmt: skip
            votes[name] += fits
    return "Q2_0/128" if votes["Q2_0/128"] > votes["Q2_0"] else "Q2_0"


@dataclass(frozen=True)
class GgufSource:
    """A tensor to be written: its bytes are asked for once, when their turn comes."""

    kind: str  # a key of gguf_types.TYPES
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]  # any shape of uint8

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return math.prod(self.shape) // TYPES[self.kind].block * TYPES[self.kind].bytes


@dataclass(frozen=True)
class Typed:
    """A value whose GGUF type Python does not tell: u32, i32, u64, f32; also for arrays of them."""

    kind: int
    value: Any


def u32(value: Any) -> Typed:
    """A count or an id."""
    return Typed(4, value)


def i32(value: Any) -> Typed:
    """A signed number."""
    return Typed(5, value)


def f32(value: Any) -> Typed:
    """A real number."""
    return Typed(6, value)


def write_gguf(
    path: Path, keys: Mapping[str, Any], tensors: Mapping[str, GgufSource], *, overwrite: bool
) -> None:
    """Write the file, tensor by tensor; it appears whole or not at all."""
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists: give a new name, or ask to overwrite")
    part = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(_head(keys, tensors))
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
            for name, source in tensors.items():
                data = np.ascontiguousarray(source.read()).reshape(-1)
                assert data.dtype == np.uint8 and data.size == source.nbytes, \
                    f"{name}: its source gave {data.size} bytes, not {source.nbytes}"  # fmt: skip
                file.write(data.data)
                file.write(b"\0" * (-file.tell() % ALIGNMENT))
            sync(file)
        os.replace(part, path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}): choose a place that is "
            "writable and has room"
        ) from error
    finally:
        part.unlink(missing_ok=True)


def _head(keys: Mapping[str, Any], tensors: Mapping[str, GgufSource]) -> bytes:
    parts = [MAGIC, struct.pack("<IQQ", 3, len(tensors), len(keys))]
    for name, value in keys.items():
        parts += [_string(name), *_value(value)]
    offset = 0
    for name, source in tensors.items():
        sizes = source.shape[::-1]
        parts += [_string(name), struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)]
        parts.append(struct.pack("<IQ", TYPES[source.kind].id, offset))
        offset += -(-source.nbytes // ALIGNMENT) * ALIGNMENT
    return b"".join(parts)


def _value(value: Any) -> list[bytes]:
    """Type and bytes of a key's value."""
    if isinstance(value, Typed) and isinstance(value.value, list | np.ndarray):
        array = np.asarray(value.value, SCALARS[value.kind])
        return [struct.pack("<IIQ", ARRAY, value.kind, len(array)), array.tobytes()]
    if isinstance(value, Typed):
        number = np.asarray(value.value, SCALARS[value.kind])
        return [struct.pack("<I", value.kind), number.tobytes()]
    if isinstance(value, bool):
        return [struct.pack("<IB", BOOL, value)]
    if isinstance(value, str):
        return [struct.pack("<I", STRING), _string(value)]
    assert isinstance(value, list), f"no GGUF type for {type(value).__name__}"
    return [struct.pack("<IIQ", ARRAY, STRING, len(value)), *map(_string, value)]


def _string(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw
