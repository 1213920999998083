"""Session files: the stored keys of a conversation, for the next start of the process.

    16 bytes   "endside-session\\n"
     8 bytes   n, the length of the header, little-endian
    32 bytes   sha256 of the header
     n bytes   JSON: version, the executor's identity, token count, notes, and for each array its
               shape and crc32 (all are bytes or int32, laid one behind the other)
               the arrays: token ids first, then what `Executor.export` gave

Every bit of the file is covered by a checksum, so damage is a message and never a wrong text; the
layout is that of safetensors with that added, and like there nothing in a file can run code. It
appears whole or not at all (`endside.atomic`).

A file belongs to one model: `Executor.identity` digests the weights as they are multiplied by, the
shape, the positions and the number format of the cache. Compressed keys are part of what an
executor exports. The bytes are those of the cache, so tokens after loading are those that would
have come without.

What we chose not to do: turn keys of one number format or model into another's, or compress them:
they are noise to a compressor, and loading is to be faster than computing.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from endside.atomic import atomic_file
from endside.engine.executor import Executor, Full
from endside.engine.prefix import PrefixCache
from endside.errors import UserError

MAGIC = b"endside-session\n"
VERSION = 1
PREFIX = len(MAGIC) + 8 + 32  # bytes before the header
TYPES = {"int32": np.dtype("<i4"), "uint8": np.dtype("u1")}
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)


@dataclass(frozen=True)
class Session:
    """What was saved or loaded: token ids in order, and the caller's notes beside them."""

    tokens: tuple[int, ...]
    notes: dict[str, Any] = field(default_factory=dict)


def save(path: Path, prefixes: PrefixCache, notes: dict[str, Any]) -> Session:
    """Write the latest kept conversation, as far as it is stored in whole pieces (`prefix`).

    One too short for a single piece is written without keys.
    """
    seq, tokens = prefixes.latest()
    arrays = {"tokens": tokens.astype(np.int32)}
    if len(tokens):
        arrays |= prefixes.executor.export(seq, len(tokens))
    _write(path, prefixes.executor, arrays, notes)
    return Session(tuple(tokens.tolist()), notes)


def load(path: Path, prefixes: PrefixCache) -> Session:
    """Put a file's tokens into the prefix cache, where requests that begin with them find them.

    UserError when it is damaged or of another model, or when it is too long for the cache.
    """
    try:
        return _load(path, prefixes)
    except UserError:
        raise
    except MALFORMED as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error


def _load(path: Path, prefixes: PrefixCache) -> Session:
    executor = prefixes.executor
    header, data = _read(path)
    if header["executor"] != executor.name:
        raise UserError(
            f"{path} was saved by the {header['executor']} executor, this is {executor.name}: "
            f"use --executor {header['executor']}, or start a new session file"
        )
    if header["identity"] != executor.identity():
        raise UserError(
            f"{path} was saved with another model, other weights, or other options (quant, kv, "
            "attention, context): use those it was saved with, or start a new session file"
        )
    arrays = _arrays(path, header, data)
    tokens = arrays.pop("tokens").astype(np.int64)
    if len(tokens) > min(executor.context, executor.capacity):
        raise UserError(
            f"{path} holds {len(tokens):,} tokens, the cache {executor.context:,}: raise --context"
        )
    if len(tokens):
        prefixes.add(_restored(prefixes, arrays, len(tokens)), tokens)
    return Session(tuple(tokens.tolist()), header["notes"])


def _restored(prefixes: PrefixCache, arrays: Mapping[str, np.ndarray], tokens: int) -> int:
    try:
        # kept prefixes give way, as for a request
        prefixes.executor.close(prefixes.reserve(tokens))
        return prefixes.executor.restore(arrays, tokens)
    except Full:
        raise UserError(
            f"running requests leave no room for the {tokens:,} tokens of the session: "
            "load it before them, or raise --capacity"
        ) from None


def _write(
    path: Path, executor: Executor, arrays: Mapping[str, np.ndarray], notes: dict[str, Any]
) -> None:
    parts = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    header = {
        "version": VERSION,
        "executor": executor.name,
        "identity": executor.identity(),
        "notes": notes,
        "arrays": {
            name: [part.dtype.name, list(part.shape), zlib.crc32(part)]
            for name, part in parts.items()
        },
    }
    raw = json.dumps(header).encode()
    with atomic_file(path) as file:
        file.write(MAGIC + struct.pack("<Q", len(raw)) + hashlib.sha256(raw).digest() + raw)
        for part in parts.values():
            file.write(memoryview(part).cast("B"))


def _read(path: Path) -> tuple[dict[str, Any], np.ndarray]:
    """The header, and the bytes behind it, mapped."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(PREFIX)
            if start[: len(MAGIC)] != MAGIC or len(start) < PREFIX:
                raise UserError(f"{path} is no session file: give one that --session wrote")
            (length,) = struct.unpack_from("<Q", start, len(MAGIC))
            raw = file.read(length) if length <= size else b""
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; check the path") from error
    if hashlib.sha256(raw).digest() != start[-32:]:
        raise _damaged(path, "its header is not what was written")
    header = json.loads(raw)
    if header["version"] != VERSION:
        raise UserError(
            f"{path} is a session of version {header['version']}, this program reads {VERSION}: "
            "start a new session file"
        )
    if size == PREFIX + length:
        return header, np.empty(0, np.uint8)
    return header, np.memmap(path, np.uint8, mode="r", offset=PREFIX + length)


def _arrays(path: Path, header: dict[str, Any], data: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays, views of the mapped file, checked."""
    found, at = {}, 0
    for name, (kind, shape, checksum) in header["arrays"].items():
        size = math.prod(shape) * TYPES[kind].itemsize
        part = data[at : at + size]
        if len(part) != size:
            raise _damaged(path, f"{name} ends {size - len(part)} bytes after the file")
        if zlib.crc32(part) != checksum:
            raise _damaged(path, f"{name} is not what was written")
        found[name] = np.frombuffer(part, TYPES[kind]).reshape(shape)
        at += size
    if at != len(data):
        raise _damaged(path, f"{len(data) - at} bytes follow its last array")
    return found


def _damaged(path: Path, how: str) -> UserError:
    return UserError(f"{path} is damaged, {how}: delete it and start a new session file")
