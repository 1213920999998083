"""kill -9 at ten moments spread over a run: the resumed run ends as the uninterrupted one."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from endside.config import dump
from endside.train.pretrain import PretrainConfig
from endside.train.schedule import ScheduleConfig
from tests.train.conftest import last_step, records

STEPS, KILLS = 80, 10
ROOT = Path(__file__).resolve().parents[2]
# Imports once, then one fork per start: a start costs nothing, and each is a process of its own.
NURSERY = """
import os, sys
from pathlib import Path
import torch
from endside.train import pretrain
torch.optim.AdamW([torch.zeros(1)])  # imports what the first optimizer of a process imports
for line in sys.stdin:
    config, run = line.split()
    child = os.fork()
    if child == 0:
        try:
            pretrain.from_file(Path(config), [f"run={run}"])
            os._exit(0)
        finally:
            os._exit(1)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@contextmanager
def nursery(log: Path) -> Iterator[subprocess.Popen]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (
        open(log, "w") as errors,
        subprocess.Popen(
            [sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=errors, text=True, env=environment,
        ) as process,
    ):  # fmt: skip
        yield process
        process.stdin.close()


def start(process: subprocess.Popen, config: Path, run: Path) -> int:
    process.stdin.write(f"{config} {run}\n")
    process.stdin.flush()
    return int(process.stdout.readline())


def status(process: subprocess.Popen) -> int:
    """How the last child ended, as os.waitpid says it."""
    return int(process.stdout.readline())


def wait_for(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the run did not get to the moment of its death"


def half_written(run: Path) -> bool:
    folder = run / "checkpoints"
    return folder.is_dir() and any(name.startswith(".part-") for name in os.listdir(folder))


def weights(run: Path) -> dict[str, str]:
    folder = run / "checkpoints" / f"step_{STEPS}"
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}


@pytest.mark.parametrize("seed", [20])
def test_ten_kills_leave_no_trace(tmp_path: Path, cfg: PretrainConfig, seed: int) -> None:
    changed = replace(
        cfg, steps=STEPS, eval_every=9, checkpoint_every=4, schedule=ScheduleConfig(10, 20)
    )
    config = tmp_path / "run.toml"
    config.write_text(dump(changed))
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    choose = random.Random(seed)
    in_writing = 0
    with nursery(tmp_path / "stderr") as process:
        start(process, config, whole)
        assert status(process) == 0, (tmp_path / "stderr").read_text()
        for kill in range(KILLS):
            # The first death comes before any checkpoint; every second one during a write.
            moment = choose.randint(kill * STEPS // KILLS, (kill + 1) * STEPS // KILLS - 5)
            child = start(process, config, torn)
            wait_for(lambda: last_step(torn) >= moment)  # noqa: B023
            if kill % 2:
                wait_for(lambda: half_written(torn))
            else:
                time.sleep(choose.uniform(0.0, 0.03))
            os.kill(child, signal.SIGKILL)
            assert status(process) == signal.SIGKILL, f"kill {kill} came after the end"
            in_writing += half_written(torn)
        start(process, config, torn)
        assert status(process) == 0, (tmp_path / "stderr").read_text()
    assert in_writing >= KILLS // 4, "too few deaths fell into the writing of a checkpoint"
    assert len(records(whole)) == STEPS + STEPS // 9 + 1
    assert records(torn) == records(whole)
    assert weights(torn) == weights(whole)
