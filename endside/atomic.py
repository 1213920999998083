"""A folder that appears whole or not at all.

The files are written into a hidden sibling, each is synced to the disk, and the sibling is renamed
into place: whoever looks, at whatever moment a process dies, sees the old state or the new one.
What a killed process left behind is removed by the next writer of the same target, or by `sweep`.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from endside.errors import UserError

_MARK = ".part-"


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; on success it becomes `target`, on an error it is removed.

    A `target` that exists is replaced. A full disk or a missing right is a UserError.
    """
    part = target.with_name(f"{_MARK}{target.name}-{os.getpid()}")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        _remove_dead(target)
        part.mkdir()
        yield part
        for file in part.rglob("*"):
            sync(file)
        sync(part)
        discard(target)
        os.rename(part, target)
        sync(target.parent)
    except OSError as error:
        raise UserError(
            f"cannot write {target}: {error.strerror or error}; free space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def resumable_folder(target: Path) -> Iterator[Path]:
    """Yield a folder whose `whole` becomes `target` on success, with what was left in it before.

    For long work that saves how far it is, in files beside `whole`: once there is one, an error or
    a kill leaves the folder, a hidden sibling of `target`, to the next call. UserError while
    another process works on it.
    """
    work = target.with_name(f".unfinished-{target.name}")
    try:
        work.mkdir(parents=True, exist_ok=True)
        with (work / "lock").open("wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"another process is writing {target}: wait for it, or choose another folder"
                ) from None
            try:
                yield work
            except BaseException:
                if {path.name for path in work.iterdir()} <= {"lock", "whole"}:
                    shutil.rmtree(work)
                raise
            whole = work / "whole"
            for file in whole.rglob("*"):
                sync(file)
            sync(whole)
            os.rename(whole, target)
            sync(target.parent)
            shutil.rmtree(work)
    except OSError as error:
        raise UserError(
            f"cannot write {target}: {error.strerror or error}; free space or choose another folder"
        ) from error


@contextmanager
def atomic_file(target: Path) -> Iterator[BinaryIO]:
    """Yield a file to write; on success it becomes `target`, on an error it is removed."""
    part = target.with_name(f"{_MARK}{target.name}-{os.getpid()}")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
        sync(target.parent)
    except OSError as error:
        raise UserError(
            f"cannot write {target}: {error.strerror or error}; free space or choose another place"
        ) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def discard(folder: Path) -> None:
    """Remove a folder so that its name never stands for a half of it."""
    if folder.exists():
        dying = folder.with_name(f"{_MARK}old-{folder.name}-{os.getpid()}")
        os.rename(folder, dying)
        shutil.rmtree(dying)


def _remove_dead(target: Path) -> None:
    """Remove the parts of `target` whose writers live no more."""
    for part in target.parent.glob(f"{_MARK}{target.name}-*"):
        pid = part.name.rpartition("-")[2]
        if pid.isdigit() and (int(pid) == os.getpid() or not alive(int(pid))):
            shutil.rmtree(part)


def alive(pid: int) -> bool:
    """Whether a process of that number lives."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def sweep(parent: Path) -> None:
    """Remove what killed writers left in `parent`; call it only while no other writer is there."""
    for part in parent.glob(f"{_MARK}*"):
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink()


def write_atomic(path: Path, text: str) -> None:
    """Replace a text file by a rename, synced."""
    part = path.with_name(f"{_MARK}{path.name}-{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    sync(part)
    os.replace(part, path)


def sync(path: Path) -> None:
    """Return once the file's or folder's content is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
