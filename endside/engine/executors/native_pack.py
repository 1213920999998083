"""Packed weights on the disk, so that the second start maps them instead of packing again.

Beside the checkpoint lies `.endside/pack-<bits>/` with two files:

    weights.bin     every buffer of every matrix, 64-byte aligned, as the core reads them
    manifest.json   where each lies, what it was made from, and checksums

A pack is used when its version is ours, its key (sizes and times of the weight files, shape and
bits of the model) is the checkpoint's, and every buffer has its checksum: the sum of its 64-bit
words, which runs at the speed of memory and so costs little beside the first token, for which the
same bytes are needed anyway. It finds every changed byte and every missing page. Anything else is
rebuilt, with a note; a pack of other bits stays unless it was made from other files.

A pack is written to a hidden folder and renamed (`endside.atomic`), under a lock that makes a
second process wait and then use the first one's. Where the checkpoint's folder cannot be written
the user's cache folder is used, and where that cannot either, memory.

Float weights are packed as well, though the file is then as large as the checkpoint: the kernels
read blocks of 8 rows, so rows cannot be mapped as they lie, and packing takes longer than reading.
Nothing in the folder is needed: whoever wants the space removes it and waits once more.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from endside.atomic import alive, atomic_folder, discard
from endside.checkpoint import PACKS, user_cache
from endside.errors import UserError
from endside.native.packed import Packed

if TYPE_CHECKING:
    from endside.checkpoint import Checkpoint

log = logging.getLogger(__name__)

VERSION = 1  # of these two files and of the layout inside the buffers (native/src/linear.h)
DATA, MANIFEST, LOCK = "weights.bin", "manifest.json", "lock"
ALIGNED = 64  # bytes
BUFFERS = ("codes", "scales", "zeros")
MALFORMED = (OSError, ValueError, KeyError, TypeError, AttributeError)


@dataclass
class Pack:
    """Matrices and vectors by name; views of a mapped file, or arrays in memory."""

    matrices: dict[str, Packed] = field(default_factory=dict)
    vectors: dict[str, np.ndarray] = field(default_factory=dict)
    place: Path | None = None  # None: in memory

    def add(self, name: str, matrix: Packed | np.ndarray) -> None:
        """Keep one; what the writer of a file does with the same call is write it."""
        if isinstance(matrix, Packed):
            self.matrices[name] = matrix
        else:
            self.vectors[name] = matrix


Build = Callable[["Pack | Writer"], None]  # calls its `add` for each matrix and vector


def cached(checkpoint: Checkpoint, name: str, key: dict[str, Any], build: Build) -> Pack:
    """The pack `name` of an opened folder with that key; built when there is none, or a bad one."""
    key = {**key, "sources": _sources(checkpoint)}
    homes = [checkpoint.folder / PACKS, user_cache(checkpoint.folder)]
    for home in homes:
        found, why = read(home / f"pack-{name}", key)
        if found is not None:
            return found
        if why:
            log.warning("%s; packing the weights again", why)
    for home in homes:
        if not _writable(home):
            continue
        if home is not homes[0]:
            log.warning("%s cannot be written: packed weights go to %s", homes[0].parent, home)
        with _locked(home):
            # another process may have built it while we waited
            found, _ = read(home / f"pack-{name}", key)
            return found or _write(home, name, key, build)
    log.warning("neither %s nor %s can be written: weights are packed at each start", *homes)
    pack = Pack()
    build(pack)
    return pack


def _sources(checkpoint: Checkpoint) -> list[list[Any]]:
    """[name, bytes, time] of every weight file."""
    files = sorted({info.file for info in checkpoint.tensors.values()})
    stats = [(file, (checkpoint.folder / file).stat()) for file in files]
    return [[file, stat.st_size, stat.st_mtime_ns] for file, stat in stats]


def _writable(home: Path) -> bool:
    try:
        home.mkdir(parents=True, exist_ok=True)
        (home / LOCK).touch()
    except OSError:
        return False
    return True


@contextmanager
def _locked(home: Path) -> Iterator[None]:
    """One writer at a time, over processes and threads; the system lets go when a process dies."""
    with (home / LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def read(folder: Path, key: dict[str, Any]) -> tuple[Pack | None, str]:
    """The pack in `folder`, mapped and verified; or None and why, "" when it is not there."""
    if not folder.is_dir():
        return None, ""
    try:
        body = _body(folder)
        if body["version"] != VERSION or body["key"] != json.loads(json.dumps(key)):
            return None, f"{folder} was made from other weights or by another version"
        return _mapped(folder, body)
    except MALFORMED as error:
        return None, f"{folder} is damaged ({type(error).__name__}: {error})"


def _body(folder: Path) -> dict[str, Any]:
    whole = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    body = whole["body"]
    if whole["sha256"] != _digest(body):
        raise ValueError("the manifest does not have its checksum")
    return body


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _mapped(folder: Path, body: dict[str, Any]) -> tuple[Pack | None, str]:
    with (folder / DATA).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size != body["bytes"]:
            return None, f"{folder / DATA} has {size} bytes of {body['bytes']}"
        flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
        whole = np.frombuffer(
            mmap.mmap(file.fileno(), size, flags=flags, prot=mmap.PROT_READ), np.uint8
        )
    pack = Pack(place=folder)
    for name, entry in body["matrices"].items():
        views = {one: _view(whole, entry[one]) for one in BUFFERS if one in entry}
        if any(view is None for view in views.values()):
            return None, f"{folder / DATA} is damaged in {name}"
        if "scales" in views:
            views["scales"] = views["scales"].view(np.uint16)
        pack.matrices[name] = Packed(**entry["shape"], **views)
    for name, place in body["vectors"].items():
        view = _view(whole, place)
        if view is None:
            return None, f"{folder / DATA} is damaged in {name}"
        pack.vectors[name] = view.view(np.float32)
    return pack, ""


def _view(whole: np.ndarray, place: list[int]) -> np.ndarray | None:
    start, count, checksum = place
    part = whole[start : start + count]
    return part if len(part) == count and word_sum(part) == checksum else None


def word_sum(data: np.ndarray) -> int:
    """Sum of the 64-bit words of bytes, the last one filled up with zeros, modulo 2^64."""
    whole = len(data) // 8 * 8
    words = int(data[:whole].view(np.uint64).sum(dtype=np.uint64))
    return (words + int.from_bytes(data[whole:].tobytes(), "little")) % 2**64


def _write(home: Path, name: str, key: dict[str, Any], build: Build) -> Pack:
    target = home / f"pack-{name}"
    _sweep(home, key)
    log.info("packing the weights into %s", target)
    with atomic_folder(target) as part:
        with (part / DATA).open("wb") as file:
            writer = Writer(file)
            build(writer)
            body = {"version": VERSION, "key": key, "bytes": writer.at, **writer.index}
        whole = {"sha256": _digest(body), "body": body}
        (part / MANIFEST).write_text(json.dumps(whole), encoding="utf-8")
    found, why = read(target, key)
    if found is None:
        raise UserError(f"{target} did not keep what was written ({why}): check the disk")
    return found


def _sweep(home: Path, key: dict[str, Any]) -> None:
    """Remove packs of other files or versions, and what killed writers left."""
    for folder in home.glob("pack-*"):
        try:
            body = _body(folder)
            current = body["version"] == VERSION and body["key"]["sources"] == key["sources"]
        except MALFORMED:
            current = False
        if not current:
            discard(folder)
    for part in home.glob(".part-*"):
        number = part.name.rpartition("-")[2]
        # the lock is ours, so a part of our own number is an old process's too
        if number.isdigit() and (int(number) == os.getpid() or not alive(int(number))):
            _remove(part)


def _remove(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


class Writer:
    """Appends buffers to a file, aligned; `index` says where they went."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.at = 0
        self.index: dict[str, dict[str, Any]] = {"matrices": {}, "vectors": {}}

    def add(self, name: str, matrix: Packed | np.ndarray) -> None:
        """Write one; it is not kept."""
        if isinstance(matrix, np.ndarray):
            self.index["vectors"][name] = self._append(matrix)
            return
        buffers = {one: getattr(matrix, one) for one in BUFFERS}
        entry: dict[str, Any] = {
            one: self._append(buffer) for one, buffer in buffers.items() if buffer is not None
        }
        empty = replace(matrix, codes=None, scales=None, zeros=None)
        fields = ("kind", "n", "k", "group", "asymmetric", "scale_type")
        entry["shape"] = {one: getattr(empty, one) for one in fields}
        self.index["matrices"][name] = entry

    def _append(self, array: np.ndarray) -> list[int]:
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        start = self.at
        self._file.write(memoryview(data))
        self._file.write(bytes(-len(data) % ALIGNED))
        self.at += len(data) + -len(data) % ALIGNED
        return [start, len(data), word_sum(data)]
