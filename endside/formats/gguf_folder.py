"""A .gguf file as a checkpoint: its weights stay where they are, its text becomes a folder.

Whoever loads a model wants a configuration, a tokenizer and tensors. A GGUF holds all three; the
first two are written once, as the files they came from, into a folder of their own beside it:

    .endside/NAME.gguf/    config.json, tokenizer.json, tokenizer_config.json, origin.json

and the tensors of the `Checkpoint` point back into the file. What executors derive from the weights
goes below that folder too, as with any other. The folder is made anew when size or time of the file
differ from origin.json; it appears whole or not at all, and lies in the user's cache folder where
the file's own cannot be written.

What we chose not to do: convert the weights. A model would lie on the disk three times (file,
folder, packed for the kernels), and K-quants have no exact form in a folder.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from endside.atomic import atomic_folder
from endside.checkpoint import PACKS, Checkpoint, read_json, user_cache
from endside.errors import UserError
from endside.formats.gguf import open_gguf
from endside.formats.gguf_file import read_gguf
from endside.formats.hf_config import config_to_hf, json_bytes
from endside.shards import TensorInfo

log = logging.getLogger(__name__)

ORIGIN, LOCK = "origin.json", "lock"
VERSION = 1  # of the files written here


class TokenizerFiles(Protocol):
    """Makes tokenizer files of GGUF keys (`endside.gguf_tokenizer`)."""

    def from_keys(
        self, keys: Mapping[str, Any], place: Path
    ) -> tuple[dict[str, bytes | Path], list[str]]:
        """Keys -> tokenizer files, and notes."""
        ...


def open_checkpoint(path: Path, texts: TokenizerFiles) -> Checkpoint:
    """The model in a .gguf file; UserError when it is damaged or of another kind."""
    # not resolved: a hub's cache links NAME.gguf to a file without that name
    path = Path(os.path.abspath(path.expanduser()))
    if not path.is_file():
        raise UserError(f"{path} does not exist: check the spelling of MODEL")
    folder = _text(path, texts)
    beside = folder.parent.parent == path.parent
    where = os.path.relpath(path, folder) if beside else str(path)
    tensors = {
        name: TensorInfo(tensor.kind, tensor.shape, where, tensor.start, tensor.nbytes)
        for name, tensor in read_gguf(path).tensors.items()
    }
    return Checkpoint(folder, read_json(folder / "config.json"), {}, tensors)


def _text(path: Path, texts: TokenizerFiles) -> Path:
    """The folder of the file's text, written where it is not there yet."""
    stat = path.stat()
    origin = {"version": VERSION, "bytes": stat.st_size, "time": stat.st_mtime_ns}
    homes = [path.parent / PACKS / path.name, user_cache(path) / path.name]
    for folder in homes:
        if _origin(folder) == origin:
            return folder
    for number, folder in enumerate(homes):
        try:
            with _locked(folder.parent):
                # another process may have written it while we waited
                if _origin(folder) != origin:
                    _write(folder, _files(path, origin, texts))
            return folder
        except OSError as error:
            if number + 1 == len(homes):
                raise UserError(
                    f"neither {homes[0].parent} nor {folder.parent} can be written "
                    f"({error.strerror}): the tokenizer of {path.name} must be kept somewhere"
                ) from error
    raise AssertionError("the last home returns or raises")


def _files(path: Path, origin: dict[str, Any], texts: TokenizerFiles) -> dict[str, bytes | Path]:
    source = open_gguf(path)
    files, notes = texts.from_keys(source.text, path)
    for note in (*source.notes, *notes):
        log.warning("%s: %s", path.name, note)
    config = json_bytes(config_to_hf(source.config, dtype="float32"))
    return {**files, "config.json": config, ORIGIN: json_bytes(origin)}


@contextmanager
def _locked(home: Path) -> Iterator[None]:
    """One writer at a time; the system lets go when a process dies."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _origin(folder: Path) -> Any:
    try:
        return json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _write(folder: Path, files: Mapping[str, bytes | Path]) -> None:
    with atomic_folder(folder) as part:
        for name, content in files.items():
            assert isinstance(content, bytes), "what is made from keys has no file of its own"
            (part / name).write_bytes(content)
