"""The folder of a training run: enough to resume it after any death, and to run it again.

    config.toml              the resolved configuration, fixed when the run starts
    run.json                 seed, commit, versions, machine
    metrics.jsonl            one line per step
    checkpoints/step_N/      model, optimizer and rng .safetensors, trainer.json, manifest.json;
                             model/ and optimizer/ where several processes wrote their own parts
    lock                     held by the process that trains

A checkpoint appears by a rename, after its files are on the disk; its manifest holds the size and
sha256 of each, and both are compared before anything is loaded. A damaged newest checkpoint is set
aside and the one before it resumes. Metrics are on the disk before the checkpoint that counts on
them, and records past the checkpoint are cut off at resume, so the file ends as if nothing had
happened. No file is a pickle.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from endside import config as configuration
from endside import dist
from endside.atomic import atomic_file, atomic_folder, discard, sweep
from endside.checkpoint import read_json
from endside.errors import UserError
from endside.log import Metrics, Progress, keep_until
from endside.shards import digest
from endside.train.sharded import Parts

T = TypeVar("T")
FORMAT = 1
MANIFEST = "manifest.json"
STATE = "trainer.json"
Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Saved:
    """A verified checkpoint of step `step`."""

    folder: Path
    step: int
    state: dict[str, Any]
    foreign: bool = False  # of another run, from which this one branches

    def tensors(self, part: str) -> Tensors:
        """The tensors of "model", "optimizer", "ema" or "rng", mapped from the disk.

        What several processes wrote is put together tensor by tensor, as each is asked for.
        """
        split = self.folder / part
        return Parts(split) if split.is_dir() else load_file(self.folder / f"{part}.safetensors")

    def has(self, part: str) -> bool:
        """Whether the run kept such tensors."""
        return (self.folder / f"{part}.safetensors").is_file() or (self.folder / part).is_dir()


def read_checkpoint(folder: Path) -> Saved:
    """Open a checkpoint folder; raises UserError naming the file that is missing or damaged."""
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{folder} has format {manifest.get('format')}, this version reads {FORMAT}: "
            "resume with the version that wrote it"
        )
    for name, entry in manifest["files"].items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else -1
        if size != entry["bytes"] or digest(path) != entry["sha256"]:
            what = "is missing" if size < 0 else "is damaged"
            raise UserError(f"{path} {what}: use another checkpoint")
    state = read_json(folder / STATE)
    return Saved(folder, state["step"], state)


class RunFolder:
    """Opened by one run at a time; `close` it, or use it in a `with`.

    Of the processes of a run the main one writes; in the others, what would write does nothing.
    """

    def __init__(
        self, path: str | Path, *, keep: int = 2, progress: Progress | None = None
    ) -> None:
        self.path = Path(path)
        self.keep = keep  # checkpoints; older ones are removed
        self.main = dist.world().main
        self.progress = progress or Progress(None if self.main else io.StringIO())
        self.metrics: Metrics | None = None
        self._branch: Saved | None = None
        self._checkpoints = self.path / "checkpoints"
        self._lock: Any = None
        if not self.main:
            return
        _check_writable(self.path)
        self._lock = _lock(self.path / "lock")
        self._checkpoints.mkdir(exist_ok=True)
        sweep(self._checkpoints)
        sweep(self.path)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock and the metrics file."""
        if self.metrics is not None:
            self.metrics.close()
        self.metrics = None
        if self._lock is not None:
            self._lock.close()

    def stored(self, kind: type[T]) -> T | None:
        """The configuration this run was started with; None before its start."""
        path = self.path / "config.toml"
        return configuration.load(path, kind) if path.exists() else None

    def fix(self, config: Any, *, free: tuple[str, ...] = ()) -> None:
        """Store `config` at the start; later, raise UserError naming the key that differs.

        free: keys, or tables of them, that may change between a start and a resume, such as where
        the run lies.
        """
        if not self.main:
            return
        path = self.path / "config.toml"
        before = self.stored(type(config))
        if before is None:
            with atomic_file(self.path / "run.json") as file:
                file.write((json.dumps(_circumstances(config), indent=1) + "\n").encode())
            with atomic_file(path) as file:
                file.write(configuration.dump(config).encode())
            return
        old, new = configuration.flatten(before), configuration.flatten(config)
        for key in [*new, *(key for key in old if key not in new)]:
            if not {key, key.partition(".")[0]} & set(free) and old.get(key) != new.get(key):
                raise UserError(
                    f"{key} is {new.get(key)} but the run in {self.path} was started with "
                    f"{old.get(key)}: use that value to resume, or another run folder"
                )
        self._note_versions()

    def _note_versions(self) -> None:
        old, new = read_json(self.path / "run.json").get("versions", {}), _versions()
        for name in new:
            if old.get(name) != new[name]:
                self.progress.note(
                    f"{name} {old.get(name)} started this run and {new[name]} resumes it: "
                    "losses may differ in the last bits"
                )

    def branch(self, checkpoint: Saved) -> None:
        """Start from another run's checkpoint, which stays untouched, where this run has none."""
        self._branch = Saved(checkpoint.folder, checkpoint.step, checkpoint.state, foreign=True)

    def latest(self) -> Saved | None:
        """The newest checkpoint that verifies; damaged ones are set aside and named."""
        folders = self._folders()
        for folder in reversed(folders):
            try:
                return read_checkpoint(folder)
            except UserError as error:
                aside = folder.with_name(f"damaged_{folder.name}")
                discard(aside)
                folder.rename(aside)
                self.progress.note(f"set aside a damaged checkpoint: {error}")
        if folders:
            raise UserError(
                f"no checkpoint in {self._checkpoints} is whole: remove {self.path} to train from "
                "the start"
            )
        return self._branch

    def _folders(self) -> list[Path]:
        """Checkpoint folders, oldest first."""
        return sorted(
            self._checkpoints.glob("step_*"),
            key=lambda folder: int(folder.name.removeprefix("step_")),
        )

    def begin(self, step: int) -> None:
        """Open the metrics after step `step`: later records are dropped."""
        if not self.main:
            self.metrics = Metrics(Path(os.devnull))
            return
        path = self.path / "metrics.jsonl"
        if self.metrics is not None:
            self.metrics.close()
        keep_until(path, step)
        self.metrics = Metrics(path)

    def save(
        self,
        step: int,
        parts: Mapping[str, Tensors],
        state: Mapping[str, Any],
        *,
        fill: Callable[[Path], None] | None = None,
    ) -> Path:
        """Write the checkpoint of `step`, then remove the oldest ones past `keep`.

        fill(folder) writes what several processes write together, into folders of its own.
        """
        if self.metrics is not None:
            self.metrics.sync()
        target = self._checkpoints / f"step_{step}"
        with atomic_folder(target) as part:
            for name, tensors in parts.items():
                whole = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
                _write_tensors(whole, part / f"{name}.safetensors")
            if fill is not None:
                fill(part)
            (part / STATE).write_text(
                json.dumps({**state, "step": step}, indent=1), encoding="utf-8"
            )
            files = {
                file.relative_to(part).as_posix(): {
                    "bytes": file.stat().st_size, "sha256": digest(file),
                }
                for file in sorted(part.rglob("*"))
                if file.is_file()
            }  # fmt: skip
            (part / MANIFEST).write_text(
                json.dumps({"format": FORMAT, "files": files}, indent=1), encoding="utf-8"
            )
        for old in self._folders()[: -self.keep]:
            discard(old)
        return target


def _write_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors import SafetensorError

    try:
        save_file(tensors, path)
    except SafetensorError as error:
        # The library wraps the system's error; a full disk is one for the caller to name.
        raise OSError(f"{error}") from error


def _check_writable(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write the run folder {path}: {error.strerror}; choose another or correct "
            "its rights"
        ) from error


def _lock(path: Path) -> Any:
    file = open(path, "w")  # noqa: SIM115 (held until the run is closed, or its process dies)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(
            f"another process trains in {path.parent}: wait for it, or choose another run folder"
        ) from None
    return file


def _circumstances(config: Any) -> dict[str, Any]:
    return {
        "seed": configuration.flatten(config).get("seed"),
        "commit": _commit(),
        "versions": _versions(),
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": sys.argv,
    }


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def _commit() -> str | None:
    """The commit this package runs from; None where it is installed without its history."""
    here = Path(__file__).resolve().parent
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None
