"""kill -9 at several moments of a pass: what is resumed ends with the same bytes."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from endside.formats import hf
from endside.model.transformer import Transformer

ROOT = Path(__file__).resolve().parents[2]
# Imports once, then one fork per start, so that a start costs nothing.
NURSERY = """
import os, sys
import torch
from endside.formats import hf
from endside.formats.hf_config import config_to_hf
from endside.log import Progress
from endside.quant.pack import Scheme
from endside.quant.quantize import Recipe, Target, Texts, quantize
from tests.quant.text import rows
from pathlib import Path
for line in sys.stdin:
    source, out = map(Path, line.split())
    child = os.fork()
    if child == 0:
        try:
            recipe = Recipe(Scheme("int4", 32, False), "pgptq", smooth=True, rotate=True)
            texts = Texts(rows(96, 256, 1), rows(8, 129, 2))
            target = Target(out, config_to_hf, {}, "same")
            quantize(hf.load(source), recipe, texts, target, Progress())
            os._exit(0)
        finally:
            os._exit(1)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""
# Each death: (a layer must be finished, some states of the next ones must be in the writing).
DEATHS = ((False, False), (True, False), (True, True))


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "the pass did not get to the moment of its death"
        time.sleep(0.0005)


def files(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}


@pytest.fixture
def source(make_model: Callable[..., Transformer], tmp_path: Path) -> Path:
    return hf.save(make_model(tied=True), tmp_path / "source")


def test_deaths_leave_no_trace(source: Path, tmp_path: Path) -> None:
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    place = tmp_path / ".torn.quantizing"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (
        open(tmp_path / "stderr", "w") as errors,
        subprocess.Popen(
            [sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=errors, text=True, env=environment,
        ) as process,
    ):  # fmt: skip

        def start(out: Path) -> int:
            process.stdin.write(f"{source} {out}\n")
            process.stdin.flush()
            return int(process.stdout.readline())

        def status() -> int:
            return int(process.stdout.readline())

        start(whole)
        assert status() == 0, (tmp_path / "stderr").read_text()
        for number, (finished, writing) in enumerate(DEATHS):
            child = start(torn)
            if finished:
                wait_for((place / f"layer_{number - 1:05d}.json").exists)
            else:
                wait_for((place / "states_00000_calibration.bin").exists)
            if writing:
                wait_for((place / f"states_{number + 1:05d}_calibration.bin").exists)
            os.kill(child, signal.SIGKILL)
            assert status() == signal.SIGKILL, f"death {number} came after the end"
        assert not torn.exists()
        assert not (place / "layer_00002.json").exists()
        start(torn)
        assert status() == 0, (tmp_path / "stderr").read_text()
        process.stdin.close()
    assert files(torn) == files(whole)
    assert not place.exists()
    assert "going on with layer" in (tmp_path / "stderr").read_text()
