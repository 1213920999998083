"""Checkpoints: a folder of safetensors and json, verified when read and atomic when written.

Pickle files (.bin, .pt) are refused, because opening one can run code. Every safetensors header is
checked against its file (`endside.shards`), so that a damaged folder is one sentence with the file,
the tensor and the fix, before anything is loaded. Tensors are mapped, one mapping each: an 8B model
costs no memory until its weights are touched, and a converted tensor frees the pages it came from.

A folder is written to a hidden sibling, synced, and renamed into place: a reader sees the old one
or the new one, never half. Beside the weights we write `endside.manifest.json` with the size and
sha256 of every file and a crc32 per tensor, so that damage is found and named. Weights must match
it; text files may be edited (adding `sparse_config` is normal use), which is only logged.

What we chose not to do: no optimizer state here (training keeps its own files), and no check of
foreign weights beyond their structure, because they carry no checksum.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from endside import atomic
from endside.errors import UserError
from endside.shards import (
    AGAIN,
    NUMPY,
    TensorInfo,
    TensorSource,
    checksum,
    digest,
    read_header,
    sync,
    write_shard,
)

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

MANIFEST = "endside.manifest.json"
PACKS = ".endside"  # folder beside the weights in which executors keep what they derive from them
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt")
TORCH = {"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
MAX_SHARD = 5_000_000_000  # bytes, as the hub's libraries cut
NAMED = 6  # tensors of one kind a message lists before it counts the rest


@dataclass(frozen=True)
class Checkpoint:
    """An opened folder: what config.json says and where every tensor lies. Holds no weights."""

    folder: Path
    config: dict
    generation: dict  # generation_config.json, {} without one
    tensors: dict[str, TensorInfo]

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = True) -> Checkpoint:
        """Read and check the folder; UserError names what is wrong. verify: checksums too."""
        folder = check_folder(Path(folder))
        config = read_json(folder / "config.json")
        optional = folder / "generation_config.json"
        generation = read_json(optional) if optional.is_file() else {}
        tensors = _read_tensors(folder)
        checkpoint = cls(folder=folder, config=config, generation=generation, tensors=tensors)
        if verify:
            checkpoint.verify()
        return checkpoint

    def verify(self, *, weights: bool = True) -> None:
        """Compare the files with the manifest, where there is one; UserError names what differs.

        weights: False looks at the small files only, for who has weights verified before.
        """
        if (self.folder / MANIFEST).is_file():
            _verify_manifest(self.folder, self.tensors, weights)

    def names(self) -> list[str]:
        """Tensor names in the order of the files."""
        return list(self.tensors)

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of a tensor."""
        if name not in self.tensors:
            near = get_close_matches(name, self.tensors, n=1)
            hint = f"; nearest is {near[0]}" if near else ""
            raise UserError(f"{self.folder} holds no tensor {name}{hint}: {AGAIN}")
        return self.tensors[name]

    def numpy(self, name: str) -> np.ndarray:
        """The tensor as a copy-on-write mapping; BF16 and 8-bit floats as their unsigned bits."""
        info = self.info(name)
        dtype = np.dtype(NUMPY[info.dtype])
        if not info.nbytes:
            return np.empty(info.shape, dtype)
        raw = np.memmap(
            self.folder / info.file, np.uint8, mode="c", offset=info.start, shape=(info.nbytes,)
        )
        # a start that is no multiple of the item size cannot be viewed in place
        base = raw if info.start % dtype.itemsize == 0 else raw.copy()
        return base.view(dtype).reshape(info.shape).view(np.ndarray)

    def torch(self, name: str) -> torch.Tensor:
        """The tensor on the CPU in its stored dtype, mapped (no copy)."""
        import torch

        tensor = torch.from_numpy(self.numpy(name))
        kind = self.info(name).dtype
        return tensor.view(getattr(torch, TORCH[kind])) if kind in TORCH else tensor

    def require(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Demand exactly these tensors; one UserError lists all that miss, differ or are too many.

        Stored rotary tables (`rotary_emb`) are recomputed, hence ignored; the log says so.
        """
        ignored = [name for name in self.tensors if "rotary_emb." in name and name not in expected]
        if ignored:
            log.info("ignored in %s: %s", self.folder, _some(ignored))
        missing = [name for name in expected if name not in self.tensors]
        extra = [name for name in self.tensors if name not in expected and name not in ignored]
        wrong = [
            f"{name} in {self.tensors[name].file} is {list(self.tensors[name].shape)} "
            f"but the configuration asks for {list(shape)}"
            for name, shape in expected.items()
            if name in self.tensors and self.tensors[name].shape != tuple(shape)
        ]
        parts = [f"tensor {_some(missing)} missing"] if missing else []
        parts += [f"tensor {_some(wrong)}"] if wrong else []
        where = [f"{name} in {self.tensors[name].file}" for name in extra]
        parts += [f"tensor {_some(where)} not expected"] if extra else []
        if parts:
            raise UserError(
                f"weights and config.json of {self.folder} disagree: {'; '.join(parts)}: "
                f"correct config.json, or {AGAIN}"
            )


def resolve(model: str | Path) -> Path:
    """The local folder of MODEL: a folder as it is, a hub name `org/name` downloaded and cached."""
    path = Path(model).expanduser()
    if path.exists():
        return check_folder(path)
    if path.suffix in (*PICKLES, ".gguf", ".safetensors"):
        raise UserError(f"{path} does not exist: check the spelling of MODEL")
    if isinstance(model, str) and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", model):
        return check_folder(_download(model))
    raise UserError(
        f"{model} is neither a folder on this machine nor a hub name such as "
        "openbmb/MiniCPM4-0.5B: check the spelling of MODEL"
    )


def cache_root() -> Path:
    """The user's folder for what can be made again."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "endside"


def user_cache(place: Path) -> Path:
    """Where what is derived from `place` may be kept when it cannot be kept beside it."""
    return cache_root() / hashlib.sha256(os.fsencode(place.resolve())).hexdigest()[:16]


def check_folder(path: Path) -> Path:
    """The path when it is a folder that can be a model; UserError says what it is otherwise."""
    if path.suffix in PICKLES and not path.is_dir():
        raise UserError(
            f"{path} is a pickle file, which can run code when it is opened: endside reads "
            "safetensors only; re-save the model with save_pretrained(safe_serialization=True)"
        )
    if path.suffix == ".gguf" and not path.is_dir():
        raise UserError(
            f"{path} is a GGUF file, and a folder is needed here: make one with "
            f"`endside convert {path.name} DIR --to endside`"
        )
    if not path.is_dir():
        what = "is a single file" if path.exists() else "does not exist"
        raise UserError(f"{path} {what}: give the folder that holds config.json and the weights")
    if not (path / "config.json").is_file():
        raise UserError(
            f"{path} is no model folder, config.json is missing: give a folder with config.json "
            "and *.safetensors, or a hub name such as openbmb/MiniCPM4-0.5B"
        )
    if any(path.glob("*.safetensors")) or (path / INDEX).is_file():
        return path
    found = sorted({file.suffix for file in path.iterdir()} & {*PICKLES, ".gguf"})
    if found and found != [".gguf"]:
        raise UserError(
            f"{path} holds its weights as pickle ({', '.join(found)}), which can run code when "
            "opened: re-save the model with save_pretrained(safe_serialization=True)"
        )
    if found:
        raise UserError(f"{path} holds GGUF weights only: give the .gguf file itself as MODEL")
    raise UserError(f"{path} holds no *.safetensors weights: {AGAIN}")


def _download(name: str) -> Path:
    """Fetch a hub snapshot with the hub's own library; its cache serves when offline."""
    here = f"no folder {name} here, and the hub model {name}"
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise UserError(f"{here} needs huggingface_hub: pip install huggingface_hub") from error
    try:
        folder = snapshot_download(name, allow_patterns=list(HUB_FILES), ignore_patterns=["*/*"])
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"{here} cannot be reached nor is it cached: check the network, or download it "
            "elsewhere and give its folder"
        ) from error
    except HfHubHTTPError as error:
        raise UserError(
            f"{here} was refused by the hub ({_first_line(error)}): check the spelling, or log in "
            "with `hf auth login` where the model is gated"
        ) from error
    except OSError as error:
        raise UserError(
            f"{here} could not be downloaded ({_first_line(error)}): check the network and the "
            "space of the hub cache ($HF_HOME)"
        ) from error
    return Path(folder)


def read_json(path: Path) -> dict:
    """A JSON object from a file; UserError when it is missing, damaged or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: {AGAIN}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({_first_line(error)}): {AGAIN}") from error
    except (ValueError, RecursionError) as error:
        # not only JSONDecodeError: thousands of digits or of brackets end the parser too
        raise UserError(f"{path} is not valid JSON ({error}): correct it, or {AGAIN}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object: {AGAIN}")
    return value


def _read_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Headers of all weight files, in the order of the hub's libraries: single, index, any."""
    if not (folder / SINGLE).is_file() and (folder / INDEX).is_file():
        return _read_indexed(folder)
    names = [SINGLE] if (folder / SINGLE).is_file() else None
    tensors: dict[str, TensorInfo] = {}
    for name in names or sorted(file.name for file in folder.glob("*.safetensors")):
        for tensor, info in read_header(folder / name).items():
            if tensor in tensors:
                raise UserError(
                    f"tensor {tensor} is in {folder / tensors[tensor].file} and again in {name}: "
                    f"remove the file that does not belong to this model, or {AGAIN}"
                )
            tensors[tensor] = info
    return tensors


def _read_indexed(folder: Path) -> dict[str, TensorInfo]:
    place = read_json(folder / INDEX).get("weight_map")
    if not isinstance(place, dict) or not all(isinstance(file, str) for file in place.values()):
        raise UserError(f"{folder / INDEX} has no weight_map of tensor to file: {AGAIN}")
    files = sorted(set(place.values()))
    for file in files:
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise UserError(f"{folder / INDEX} names {file!r}, which is no shard here: {AGAIN}")
    gone = [file for file in files if not (folder / file).is_file()]
    if gone:
        lost = [tensor for tensor, file in place.items() if file in gone]
        raise UserError(
            f"shard {_some(gone)} is missing in {folder} (it holds tensor {_some(lost)}): {AGAIN}"
        )
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for tensor, info in read_header(folder / file).items():
            if place.get(tensor, file if "rotary_emb." in tensor else None) != file:
                says = place.get(tensor, "no file")
                raise UserError(
                    f"{INDEX} places tensor {tensor} in {says} but it is in "
                    f"{folder / file}: {AGAIN}"
                )
            tensors[tensor] = info
    for tensor, file in place.items():
        if tensor not in tensors:
            raise UserError(
                f"{INDEX} places tensor {tensor} in {folder / file}, which does not hold "
                f"it: {AGAIN}"
            )
    return tensors


def _verify_manifest(folder: Path, tensors: dict[str, TensorInfo], all_weights: bool) -> None:
    """Compare every file with the manifest: weights must match, edited text is logged."""
    files = read_json(folder / MANIFEST).get("files")
    if not isinstance(files, dict):
        raise UserError(f"{folder / MANIFEST} lists no files: {AGAIN}")
    for name, entry in files.items():
        path = folder / name
        weights = name.endswith(".safetensors") or name == INDEX
        if weights and not all_weights and path.is_file():
            continue
        if not path.is_file():
            text = f"{path} is missing, though {MANIFEST} lists it"
        elif digest(path) != entry.get("sha256"):
            text = f"{path} is not what was written{_damaged(path, entry, tensors)}"
        else:
            continue
        if weights:
            raise UserError(f"{text}: {AGAIN}")
        log.warning("%s", text)


def _damaged(path: Path, entry: dict, tensors: dict[str, TensorInfo]) -> str:
    """Which tensors of a file fail their checksum, for the message."""
    sums = entry.get("tensors", {})
    bad = []
    with path.open("rb") as file:
        for name, info in tensors.items():
            if info.file == path.name and checksum(file, info) != sums.get(name):
                bad.append(name)
    return f" (damaged: tensor {_some(bad)})" if bad else ""


def write_folder(
    dst: str | Path,
    tensors: Mapping[str, TensorSource],
    files: Mapping[str, bytes | Path],
    *,
    max_shard: int = MAX_SHARD,
    overwrite: bool = False,
) -> Path:
    """Write weights, `files` (contents, or a path to copy) and the manifest; all or nothing.

    tensors are read one at a time, in this order. An existing folder is replaced only with
    overwrite=True and only where the manifest shows that all of it is ours.
    """
    dst = Path(os.path.abspath(Path(dst).expanduser()))
    _check_target(dst, overwrite)
    partial = dst.with_name(f".{dst.name}.partial-{os.getpid()}")
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        _sweep(dst)
        partial.mkdir()
        entries = _write_weights(partial, tensors, max_shard)
        for name, content in files.items():
            entries[name] = _write_file(partial / name, content)
        manifest = {"version": 1, "files": dict(sorted(entries.items()))}
        _write_file(partial / MANIFEST, _json(manifest))
        atomic.sync(partial)
        _replace(partial, dst)
        atomic.sync(dst.parent)
    except OSError as error:
        raise UserError(
            f"{dst} cannot be written ({error.strerror or error}): choose a folder that is "
            "writable and has room"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return dst


def _check_target(dst: Path, overwrite: bool) -> None:
    if not dst.exists() or (dst.is_dir() and not any(dst.iterdir())):
        return
    if not dst.is_dir():
        raise UserError(f"{dst} is a file: give the name of a new folder")
    if not (dst / MANIFEST).is_file():
        raise UserError(f"{dst} holds files and is no checkpoint of ours: give a new folder")
    if not overwrite:
        raise UserError(f"{dst} already holds a checkpoint: give a new folder, or ask to overwrite")
    ours = {MANIFEST, *read_json(dst / MANIFEST).get("files", {})}
    ours.add(PACKS)
    foreign = sorted(file.name for file in dst.iterdir() if file.name not in ours)
    if foreign:
        raise UserError(f"{dst} also holds {_some(foreign)}, not written by us: move it away first")


def _write_weights(folder: Path, tensors: Mapping[str, TensorSource], max_shard: int) -> dict:
    """Shards and, when there is more than one, their index; manifest entries by file name."""
    shards: list[dict[str, TensorSource]] = [{}]
    filled = 0
    for name, source in tensors.items():
        if shards[-1] and filled + source.nbytes > max_shard:
            shards.append({})
            filled = 0
        shards[-1][name] = source
        filled += source.nbytes
    if len(shards) == 1:
        return {SINGLE: write_shard(folder / SINGLE, shards[0])}
    entries, place = {}, {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        entries[file] = write_shard(folder / file, shard)
        place |= dict.fromkeys(shard, file)
    total = sum(source.nbytes for source in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(place.items()))}
    entries[INDEX] = _write_file(folder / INDEX, _json(index))
    return entries


def _write_file(path: Path, content: bytes | Path) -> dict:
    data = content.read_bytes() if isinstance(content, Path) else content
    with path.open("wb") as file:
        file.write(data)
        sync(file)
    return {"bytes": len(data), "sha256": digest(path)}


def _json(value: dict) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _replace(new: Path, dst: Path) -> None:
    """Put the folder `new` at dst. An old one is exchanged in one step where the system can."""
    if not dst.exists() or not any(dst.iterdir()):
        os.rename(new, dst)
        return
    exchange = getattr(ctypes.CDLL(None), "renameat2", None)
    here, both = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
    if exchange and exchange(here, os.fsencode(new), here, os.fsencode(dst), both) == 0:
        return
    old = new.with_name(new.name.replace(".partial-", ".old-"))
    os.rename(dst, old)
    os.rename(new, dst)
    shutil.rmtree(old)


def _sweep(dst: Path) -> None:
    """Remove what killed writers of dst left behind; a living writer's folder stays."""
    for left in dst.parent.glob(f".{dst.name}.partial-*"):
        pid = left.name.rpartition("-")[2]
        if not (pid.isdigit() and atomic.alive(int(pid))) or pid == str(os.getpid()):
            shutil.rmtree(left)


def _some(names: Collection[str]) -> str:
    """The first few names, and how many more."""
    shown = list(names)[:NAMED]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" (and {more} more)" if more else "")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
