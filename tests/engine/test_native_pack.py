"""Packed weights on the disk: used again, and rebuilt whatever happened to them."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from endside.checkpoint import PACKS, Checkpoint
from endside.engine.executors import Plan, create
from endside.engine.executors import native_pack as packs
from endside.engine.executors.native import NativeExecutor
from endside.native.packed import Packed
from tests.engine.tiny import HAS_CORE, awkward, checkpoint, tokens

pytestmark = pytest.mark.skipif(not HAS_CORE, reason="no native core here")
NAME = "pack-int4-g128-head-int4"


@pytest.fixture
def model(tmp_path: Path) -> Checkpoint:
    return checkpoint(tmp_path, awkward("tiny"))


def _load(model: Checkpoint, **plan: object) -> tuple[NativeExecutor, np.ndarray]:
    """The executor, and its logits for one prompt."""
    made = create(model, Plan(executor="native", **{"quant": "int4", "context": 64, **plan}))
    assert isinstance(made, NativeExecutor)
    logits = made.prefill(made.open(40), tokens(40))
    assert logits is not None
    return made, logits


def test_the_second_start_maps_what_the_first_packed(
    model: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, expected = _load(model)
    assert first.pack.place == model.folder / PACKS / NAME

    def never(*_: object) -> Packed:
        raise AssertionError("packed again")

    monkeypatch.setattr("endside.engine.executors.native.pack", never)
    second, logits = _load(model)
    assert second.pack.place == first.pack.place
    np.testing.assert_array_equal(logits, expected)
    codes = second.pack.matrices["head"].codes
    assert codes is not None and codes.ctypes.data % 64 == 0 and not codes.flags.writeable


def test_a_group_that_does_not_act_makes_no_other_pack(
    model: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Floats have no groups: whatever is asked for, the same pack serves."""
    _load(model, quant="none", group=32)
    monkeypatch.setattr("endside.engine.executors.native.pack", lambda *_: 1 / 0)
    _load(model, quant="none", group=64)


def _flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 16
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "first byte": lambda pack: _flip(pack / packs.DATA, 0),
    "last scale": lambda pack: _flip(pack / packs.DATA, _last_scale(pack)),
    "truncated": lambda pack: os.truncate(pack / packs.DATA, 4096),
    "longer": lambda pack: (pack / packs.DATA).open("ab").write(b"x"),
    "empty": lambda pack: (pack / packs.DATA).write_bytes(b""),
    "no data": lambda pack: (pack / packs.DATA).unlink(),
    "no manifest": lambda pack: (pack / packs.MANIFEST).unlink(),
    "half a manifest": lambda pack: os.truncate(pack / packs.MANIFEST, 100),
    "manifest": lambda pack: _flip(pack / packs.MANIFEST, 150),
    "no object": lambda pack: (pack / packs.MANIFEST).write_text("[1]"),
    "another version": lambda pack: _edit(pack, version=0),
    "another model": lambda pack: _edit(pack, key={"sources": []}),
}


def _last_scale(pack: Path) -> int:
    body = json.loads((pack / packs.MANIFEST).read_text())["body"]
    start, count, _ = body["matrices"]["head"]["scales"]
    return start + count - 1


def _edit(pack: Path, **values: object) -> None:
    """Another body, with the right checksum."""
    body = {**json.loads((pack / packs.MANIFEST).read_text())["body"], **values}
    whole = {"sha256": packs._digest(body), "body": body}
    (pack / packs.MANIFEST).write_text(json.dumps(whole))


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_pack_is_rebuilt_with_a_note(
    damage: str, model: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    _, expected = _load(model)
    assert not caplog.records
    DAMAGE[damage](model.folder / PACKS / NAME)
    with caplog.at_level(logging.WARNING):
        _, logits = _load(model)
    assert "packing the weights again" in caplog.text and NAME in caplog.text
    np.testing.assert_array_equal(logits, expected)
    caplog.clear()
    _load(model)
    assert not caplog.records, "the rebuilt pack is good"


def test_other_weights_make_another_pack(tmp_path: Path) -> None:
    """The pack follows the weight files; packs of other bits stay only while they fit them."""
    one, two = (checkpoint(tmp_path / str(seed), awkward("tiny"), seed=seed) for seed in (1, 2))
    _, first = _load(one)
    _load(one, quant="int8")
    for file in two.folder.iterdir():
        shutil.copy(file, one.folder / file.name)
    _, second = _load(Checkpoint.open(one.folder))
    assert np.abs(first - second).max() > 1e-3
    np.testing.assert_array_equal(second, _load(two)[1])
    assert [one.name for one in (one.folder / PACKS).glob("pack-*")] == [NAME]


def test_a_killed_writer_leaves_nothing_wrong(
    model: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The half it wrote is never taken for a pack, and the next writer removes it."""
    append, calls = packs.Writer._append, iter(range(99))

    def dies(self: packs.Writer, array: np.ndarray) -> list[int]:
        if next(calls) == 7:
            raise KeyboardInterrupt
        return append(self, array)

    with monkeypatch.context() as patch:
        patch.setattr(packs.Writer, "_append", dies)
        with pytest.raises(KeyboardInterrupt):
            _load(model)
    home = model.folder / PACKS
    assert [file.name for file in home.iterdir()] == [packs.LOCK]
    left = home / ".part-pack-int8-g128-head-int8-999999999"
    left.mkdir()
    (left / packs.DATA).write_bytes(b"half")
    _load(model)
    assert sorted(file.name for file in home.iterdir()) == [packs.LOCK, NAME]


def test_one_of_two_starts_packs(model: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    write, calls = packs._write, []

    def counted(*arguments: object) -> packs.Pack:
        calls.append(1)
        return write(*arguments)

    monkeypatch.setattr(packs, "_write", counted)
    with ThreadPoolExecutor(3) as team:
        logits = [made[1] for made in team.map(lambda _: _load(model), range(3))]
    assert len(calls) == 1
    np.testing.assert_array_equal(logits[0], logits[2])


def test_a_folder_that_cannot_be_written(
    model: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The user's cache serves; where it cannot be written either, memory."""
    (model.folder / PACKS).write_text("a file where the folder would be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made, expected = _load(model)
    assert made.pack.place is not None and made.pack.place.is_relative_to(tmp_path / "cache")
    assert "packed weights go to" in caplog.text
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    made, logits = _load(model)
    assert made.pack.place is None and "at each start" in caplog.text
    np.testing.assert_array_equal(logits, expected)


def test_damaged_weights_are_not_packed(model: Checkpoint) -> None:
    weights = model.folder / "model.safetensors"
    _flip(weights, weights.stat().st_size - 5)
    with pytest.raises(ValueError, match="is not what was written"):
        _load(Checkpoint.open(model.folder, verify=False))
    assert not list((model.folder / PACKS).glob("pack-*"))
