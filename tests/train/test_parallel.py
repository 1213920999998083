"""Several processes train as one: same losses, any split, any change of their number, any death."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from endside.config import dump
from endside.dist import World
from endside.errors import UserError
from endside.formats import hf
from endside.log import read_metrics
from endside.model.presets import preset
from endside.train.parallel import ParallelConfig, Team, check_split
from tests.train.conftest import last_step, small
from tests.train.processes import Nursery

FSDP, SPLIT = "parallel.shard=fsdp", "parallel.tensor=2"
NUMBERS = ("loss", "gradient_norm", "heldout_loss", "tokens")


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    made = Nursery(tmp_path_factory.mktemp("nursery"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def config(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose batch can be split by four, with an evaluation that cannot."""
    cfg = replace(small(shards), batch=4, eval_every=7, eval_rows=6)
    path = tmp_path_factory.mktemp("parallel") / "run.toml"
    path.write_text(dump(cfg))
    return path


@pytest.fixture(scope="module")
def run(nursery: Nursery, config: Path):
    """run(size, overrides) -> the folder of a whole run; each kind is run once."""
    done: dict[tuple, Path] = {}

    def once(size: int, *overrides: str) -> Path:
        key = (size, *overrides)
        if key not in done:
            folder = config.parent / f"run{len(done)}"
            codes = nursery.run(size, ["pretrain", str(config), f"run={folder}", *overrides])
            assert codes == [0] * size, nursery.log(codes.index(max(codes)))
            done[key] = folder
        return done[key]

    return once


def records(run: Path) -> list[dict]:
    return [
        {key: record[key] for key in NUMBERS if key in record}
        for record in read_metrics(run / "metrics.jsonl")
    ]


def assert_close(run: Path, other: Path) -> None:
    ours, theirs = records(run), records(other)
    assert len(ours) == len(theirs) == 20 + 3, "a step or an evaluation is missing"
    assert ours[0]["loss"] > ours[-2]["loss"] + 0.5, "nothing was learnt, so nothing is compared"
    for one, two in zip(ours, theirs, strict=True):
        assert one == pytest.approx(two, rel=0, abs=1e-5)


KINDS = [
    pytest.param(2, (), id="replicate-2"),
    pytest.param(2, (FSDP,), id="fsdp-2"),
    pytest.param(2, (SPLIT,), id="tensor-2"),
    pytest.param(4, (FSDP,), id="fsdp-4", marks=pytest.mark.slow),
    pytest.param(4, (SPLIT,), id="replicate-2-tensor-2", marks=pytest.mark.slow),
    pytest.param(4, (SPLIT, FSDP), id="fsdp-2-tensor-2", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("size", "kind"), KINDS)
def test_losses_are_those_of_one_process(run, size: int, kind: tuple[str, ...]) -> None:
    together, alone = run(size, *kind), run(1)
    assert_close(together, alone)
    exported = [hf.load(folder / "model").state_dict() for folder in (together, alone)]
    torch.testing.assert_close(*exported, rtol=0, atol=1e-3)


def test_everything_a_step_can_do_is_shared(run) -> None:
    """MTP, z-loss, recomputed activations, averaged weights: on the same batches of two rows."""
    extras = (
        "model.mtp_layers=1", "loss.z_weight=1e-3", "loss.chunk=32", "checkpoint_activations=true",
        "ema=0.9", "export=ema",
    )  # fmt: skip
    together = run(2, FSDP, *extras)
    alone = run(1, "batch=2", "accumulate=4", *extras)
    ours, theirs = (read_metrics(folder / "metrics.jsonl") for folder in (together, alone))
    for one, two in zip(ours, theirs, strict=True):
        assert one.keys() == two.keys()
        for key in one.keys() & {*NUMBERS, "mtp_loss", "z_loss", "ema_heldout_loss"}:
            assert one[key] == pytest.approx(two[key], rel=0, abs=1e-5), key
    assert {"mtp_loss", "z_loss"} <= ours[0].keys() and "ema_heldout_loss" in ours[-1]
    exported = [hf.load(folder / "model").state_dict() for folder in (together, alone)]
    torch.testing.assert_close(*exported, rtol=0, atol=1e-3)


def digests(run: Path) -> dict[str, str]:
    folder = run / "checkpoints" / "step_20"
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}


@pytest.mark.parametrize("victim", [0, 1])
def test_a_kill_ends_all_and_leaves_no_trace(
    run, nursery: Nursery, config: Path, tmp_path: Path, victim: int
) -> None:
    argv = ["pretrain", str(config), f"run={tmp_path / 'torn'}", FSDP]
    children = nursery.start(2, argv)
    end = time.monotonic() + 60
    while last_step(tmp_path / "torn") < 7:
        assert time.monotonic() < end, "the run did not get to the moment of its death"
    os.kill(children[victim], signal.SIGKILL)
    codes = nursery.wait()
    assert codes[victim] == -signal.SIGKILL, "the kill came after the end"
    assert codes[1 - victim] == 2
    assert "lost the others" in nursery.log(1 - victim)
    assert "Traceback" not in nursery.log(1 - victim)
    assert nursery.run(2, argv) == [0, 0]
    assert "resuming from" in nursery.log(0)
    assert records(tmp_path / "torn") == records(run(2, FSDP))
    assert digests(tmp_path / "torn") == digests(run(2, FSDP))


CHANGES = [
    pytest.param((1, 2), id="1-2"),
    pytest.param((2, 1), id="2-1"),
    pytest.param((2, 4), id="2-4", marks=pytest.mark.slow),
    pytest.param((4, 2), id="4-2", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("sizes", CHANGES)
def test_a_run_resumes_on_another_number_of_processes(
    run, nursery: Nursery, config: Path, tmp_path: Path, sizes: tuple[int, int]
) -> None:
    folder = tmp_path / "moved"
    argv = ["pretrain", str(config), f"run={folder}"]
    children = nursery.start(sizes[0], [*argv, FSDP])
    end = time.monotonic() + 60
    while last_step(folder) < 12:
        assert time.monotonic() < end, "the run did not get to the moment of its death"
    os.kill(children[0], signal.SIGKILL)
    assert nursery.wait()[0] == -signal.SIGKILL
    assert nursery.run(sizes[1], [*argv, FSDP]) == [0] * sizes[1]
    assert "resuming from" in nursery.log(0)
    assert_close(folder, run(1))


def test_every_process_can_write_its_own_parts(
    run, nursery: Nursery, config: Path, tmp_path: Path
) -> None:
    """checkpoint = sharded: no pickle, verified, read whole by one process."""
    argv = ["pretrain", str(config), f"run={tmp_path}", FSDP, "parallel.checkpoint=sharded"]
    children = nursery.start(2, argv)
    end = time.monotonic() + 60
    while last_step(tmp_path) < 12:
        assert time.monotonic() < end, "the run did not get to the moment of its death"
    os.kill(children[1], signal.SIGKILL)
    assert nursery.wait()[1] == -signal.SIGKILL
    folders = (tmp_path / "checkpoints").glob("step_*")
    newest = max(folders, key=lambda folder: int(folder.name.removeprefix("step_")))
    files = {f.relative_to(newest).as_posix() for f in newest.rglob("*") if f.is_file()}
    assert {f.rpartition(".")[2] for f in files} == {"safetensors", "json"}
    assert len([f for f in files if f.startswith("model/")]) == 2
    listed = json.loads((newest / "manifest.json").read_text())["files"]
    assert files == listed.keys() | {"manifest.json"}
    assert nursery.run(1, argv) == [0]
    assert f"resuming from {newest}" in nursery.log(0)
    assert_close(tmp_path, run(1))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch=3", "batch 3 cannot be split evenly over 2 processes"),
        ("model.vocab_size=100", "raise model.vocab_size or pack"),
    ],
)
def test_what_ends_a_run_is_said_once(
    nursery: Nursery, config: Path, tmp_path: Path, override: str, message: str
) -> None:
    codes = nursery.run(2, ["pretrain", str(config), f"run={tmp_path}", override])
    assert codes == [2, 2]
    said = nursery.log(0) + nursery.log(1)
    assert said.count("endside:") == 1
    assert message in said


def test_processes_that_cannot_share_are_refused() -> None:
    with pytest.raises(UserError, match=r"parallel.tensor 3 does not divide the 4 processes"):
        Team(ParallelConfig(tensor=3), World(0, 4))
    with pytest.raises(UserError, match=r"tensor 4 does not divide model.num_key_value_heads 2"):
        check_split(preset("tiny"), 4)
    with pytest.raises(UserError, match=r"parallel.tensor 0"):
        ParallelConfig(tensor=0)
