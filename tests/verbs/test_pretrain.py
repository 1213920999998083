"""`endside pretrain` as it is typed: flags, exit codes, and what stays whole when it fails."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors import SafetensorError

from endside.cli import main
from endside.log import read_metrics
from endside.train import run_folder
from endside.train.run_folder import read_checkpoint

TINY = Path(__file__).resolve().parents[2] / "runs" / "tiny.toml"


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    """Arguments of a run of eight stable steps on a few hundred words."""
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_text("one two three four " * 400)
    return [
        "pretrain", str(TINY), f"data.shards={tmp_path}/shards", f"data.corpus={text}", "steps=8",
        "schedule.warmup=2", "schedule.decay=0", "seq_len=32", "batch=2", "eval_rows=2",
        "checkpoint_every=4", f"run={tmp_path}/stable",
    ]  # fmt: skip


def endside(*argv: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(list(argv))
    return left.value.code


def test_decay_from_is_a_flag_that_anneals_a_stable_checkpoint(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert endside(*small) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "stable" / "model")
    origin = tmp_path / "stable" / "checkpoints" / "step_4"
    before = {f: f.read_bytes() for f in (tmp_path / "stable").rglob("*") if f.is_file()}
    branch = [*small, "schedule.decay=3", f"run={tmp_path}/branch", "--decay-from", str(origin)]
    assert endside(*branch) == 0
    records = [r for r in read_metrics(tmp_path / "branch" / "metrics.jsonl") if "loss" in r]
    assert [r["step"] for r in records] == [5, 6, 7]
    rates = [r["learning_rate"] for r in records]
    assert rates == pytest.approx([0.01 * 0.1 ** (i / 3) for i in (1, 2, 3)])
    after = {f: f.read_bytes() for f in (tmp_path / "stable").rglob("*") if f.is_file()}
    assert after == before


def test_a_misspelt_key_names_the_nearest(
    small: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for wrong, right in (
        ("optim.learnin_rate=0.1", "optim.learning_rate"), ("spikes.sigmas=3", "spikes.sigma"),
        ("checkpoint_activation=true", "checkpoint_activations"), ("init_form=x", "init_from"),
    ):  # fmt: skip
        assert endside(*small, wrong) == 2
        assert f"did you mean {right}?" in capsys.readouterr().err
    assert not (tmp_path / "stable").exists()


def test_a_disk_that_fills_up_leaves_the_last_checkpoint_whole(
    small: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written, save = [], run_folder.save_file

    def full(tensors: dict, path: Path) -> None:
        written.append(path)
        if len(written) > 4:  # model, optimizer and rng of step 4, then the model of step 8
            Path(path).write_bytes(b"half of it")
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        save(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "save_file", full)
        assert endside(*small) == 2
    message = capsys.readouterr().err
    assert "cannot write" in message
    assert "step_8" in message
    assert "No space left on device" in message
    folder = tmp_path / "stable" / "checkpoints"
    assert [f.name for f in folder.iterdir()] == ["step_4"]
    assert read_checkpoint(folder / "step_4").step == 4
    # With room again, the same command goes on from there.
    assert endside(*small) == 0
    assert read_checkpoint(folder / "step_8").step == 8


def test_the_folder_of_another_model_is_refused(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert endside(*small) == 0
    other = [*small, "model.intermediate_size=72"]
    capsys.readouterr()
    assert endside(*other) == 2
    message = capsys.readouterr().err
    assert "model.intermediate_size is 72 but the run in" in message
    assert "was started with 96" in message
    # Checkpoints carried into a run of another model are found out too.
    assert endside(*other, f"run={tmp_path}/other", "steps=4") == 0
    shutil.rmtree(tmp_path / "stable" / "checkpoints")
    shutil.copytree(tmp_path / "other" / "checkpoints", tmp_path / "stable" / "checkpoints")
    capsys.readouterr()
    assert endside(*small) == 2
    assert "is of another model: layers.0.mlp.down_proj.weight is (48, 72) there" in (
        capsys.readouterr().err
    )
