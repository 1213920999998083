"""The launcher itself: a killed process, and torchrun starts all again from the checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from endside.config import dump
from endside.log import read_metrics
from tests.train.conftest import last_step, small

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def launch(config: Path, run: Path, *options: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         *options, "-m", "endside", "pretrain", str(config), f"run={run}"],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def worker(agent: int, rank: int) -> int:
    """The process of a rank, among the children of torchrun."""
    for child in Path(f"/proc/{agent}/task/{agent}/children").read_text().split():
        if f"\0RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text():
            return int(child)
    raise AssertionError(f"torchrun has no process of rank {rank}")


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run / "metrics.jsonl") if "loss" in record]


def test_a_killed_process_is_started_again(shards: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    cfg = replace(small(shards), batch=4, steps=60, checkpoint_every=4)
    config.write_text(dump(replace(cfg, parallel=replace(cfg.parallel, shard="fsdp"))))
    whole = launch(config, tmp_path / "whole")
    said, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, said
    torn = launch(config, tmp_path / "torn", "--max-restarts", "1")
    end = time.monotonic() + 200
    while last_step(tmp_path / "torn") < 9:
        assert time.monotonic() < end, "the run did not get to the moment of its death"
        time.sleep(0.01)
    os.kill(worker(torn.pid, 1), signal.SIGKILL)
    said, _ = torn.communicate(timeout=300)
    assert torn.returncode == 0, said
    assert "resuming from" in said
    assert said.count(str(tmp_path / "torn" / "model")) == 1
    assert losses(tmp_path / "torn") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 60


def test_an_error_is_said_once(shards: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text(dump(replace(small(shards), batch=4)).replace("batch = 4", "bach = 4"))
    run = launch(config, tmp_path / "run")
    said, _ = run.communicate(timeout=200)
    assert run.returncode == 1
    assert said.count("endside: unknown key bach") == 1
