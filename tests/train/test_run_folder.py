"""The run folder: what it refuses, what it verifies, what it keeps."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from endside.errors import UserError
from endside.log import read_metrics
from endside.train.run_folder import RunFolder, read_checkpoint


@dataclass(frozen=True)
class Part:
    rate: float = 0.5


@dataclass(frozen=True)
class Config:
    steps: int = 3
    seed: int = 11
    run: str = ""
    part: Part = field(default_factory=Part)


def save(run: RunFolder, step: int) -> Path:
    parts = {name: {"x": torch.full((40,), float(step))} for name in ("model", "optimizer", "rng")}
    return run.save(step, parts, {"tokens": 10 * step, "phase": "stable"})


def test_a_checkpoint_comes_back(open_run) -> None:
    run = open_run()
    folder = save(run, 7)
    assert sorted(file.name for file in folder.iterdir()) == [
        "manifest.json", "model.safetensors", "optimizer.safetensors", "rng.safetensors",
        "trainer.json",
    ]  # fmt: skip
    saved = run.latest()
    assert (saved.step, saved.state["tokens"], saved.foreign) == (7, 70, False)
    assert saved.tensors("model")["x"].tolist() == [7.0] * 40


def test_the_last_ones_are_kept_by_number_not_by_name(open_run) -> None:
    run = open_run(keep=3)
    for step in (8, 9, 10, 11, 100):
        save(run, step)
    left = sorted(folder.name for folder in (run.path / "checkpoints").iterdir())
    assert left == ["step_10", "step_100", "step_11"]
    assert run.latest().step == 100


@pytest.mark.parametrize("name", ["model.safetensors", "trainer.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_damaged_newest_checkpoint_falls_back(open_run, quiet, name: str, harm: str) -> None:
    run = open_run()
    save(run, 5)
    victim = save(run, 6) / name
    content = bytearray(victim.read_bytes())
    if harm == "remove":
        victim.unlink()
    else:
        content[len(content) // 2] ^= 0xFF
        victim.write_bytes(content if harm == "flip" else content[:-9])
    assert run.latest().step == 5
    assert "set aside a damaged checkpoint" in quiet.text()
    assert name in quiet.text()
    save(run, 6)
    assert run.latest().step == 6


def test_a_run_without_a_whole_checkpoint_does_not_start_over(open_run) -> None:
    run = open_run()
    (save(run, 5) / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole"):
        run.latest()


def test_leftovers_of_a_killed_write_are_swept(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run") as run:
        save(run, 5)
        half = run.path / "checkpoints" / ".part-step_6-1"
        half.mkdir()
        (half / "model.safetensors").write_bytes(b"half")
    with RunFolder(tmp_path / "run") as run:
        assert not half.exists()
        assert run.latest().step == 5


def test_a_full_disk_keeps_the_old_checkpoint(open_run, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run()
    save(run, 5)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("endside.train.run_folder.save_file", full)
    with pytest.raises(UserError, match=r"cannot write .*step_6: No space left on device"):
        save(run, 6)
    assert [folder.name for folder in (run.path / "checkpoints").iterdir()] == ["step_5"]
    assert run.latest().step == 5


def test_a_full_disk_at_the_start_is_the_users_error(
    open_run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    run = open_run()
    run.begin(0)
    run.metrics.append(1, {"loss": 1.0})
    monkeypatch.setattr("endside.atomic.os.fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*run.json: No space left on device"):
        run.fix(Config())
    with pytest.raises(UserError, match=r"cannot write .*metrics.jsonl: No space left on device"):
        run.begin(0)
    assert read_metrics(run.path / "metrics.jsonl") == [{"step": 1, "loss": 1.0}]
    assert run.stored(Config) is None


def test_the_configuration_is_fixed_at_the_start(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run") as run:
        assert run.stored(Config) is None
        run.fix(Config())
    with RunFolder(tmp_path / "run") as run:
        assert run.stored(Config) == Config()
        run.fix(Config())
        with pytest.raises(UserError, match=r"part\.rate is 0\.25 but .* started with 0\.5"):
            run.fix(Config(part=Part(0.25)))
        with pytest.raises(UserError, match="run is b but"):
            run.fix(Config(run="b"))
        run.fix(Config(run="b"), free=("run",))
        assert run.stored(Config) == Config()


def test_what_the_run_was_made_with_is_recorded(open_run, quiet) -> None:
    import json

    run = open_run()
    run.fix(Config())
    record = json.loads((run.path / "run.json").read_text())
    assert record["seed"] == 11
    assert record["versions"]["torch"] == torch.__version__
    assert {"commit", "machine", "threads", "started"} <= set(record)
    assert quiet.text() == ""
    record["versions"]["torch"] = "1.0"
    (run.path / "run.json").write_text(json.dumps(record))
    run.fix(Config())
    assert "torch 1.0 started this run" in quiet.text()


def test_one_process_at_a_time(open_run) -> None:
    first = open_run()
    with pytest.raises(UserError, match="another process trains in"):
        open_run()
    first.close()
    open_run()


def test_an_unwritable_run_folder_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the run folder"):
        RunFolder(tmp_path / "file" / "run")
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if os.access(locked, os.W_OK):
        pytest.skip("this user may write anywhere")
    with pytest.raises(UserError, match="cannot write the run folder"):
        RunFolder(locked)


def test_a_branch_starts_from_another_run_and_leaves_it_alone(open_run) -> None:
    stable, branch = open_run("stable"), open_run("branch")
    origin = read_checkpoint(save(stable, 5))
    branch.branch(origin)
    assert replace(origin, foreign=True) == branch.latest()
    save(branch, 6)
    assert branch.latest().step == 6
    assert not branch.latest().foreign
    assert stable.latest().step == 5
