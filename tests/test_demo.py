"""The tour on a small corpus: it arrives, and a killed one ends with the same losses."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

STEPS = 40


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our own tests as text: real, small, always there."""
    folder = tmp_path_factory.mktemp("corpus")
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        (folder / f"{file.parent.name}_{file.name}").write_text(file.read_text(encoding="utf-8"))
    return folder


def _command(corpus: Path, out: Path) -> list[str]:
    flags = ["--steps", str(STEPS), "--threads", "1", "--checkpoint-seconds", "2"]
    return [
        sys.executable,
        "-m",
        "endside",
        "demo",
        "--corpus",
        str(corpus),
        "--out",
        str(out),
        *flags,
    ]


def _losses(out: Path) -> list[float]:
    lines = (out / "train" / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


def _walk(corpus: Path, out: Path) -> str:
    return subprocess.run(
        _command(corpus, out), check=True, capture_output=True, text=True, timeout=400
    ).stdout


def _kill_and_resume(corpus: Path, out: Path, kills: int) -> None:
    """Kill -9 at random moments of the training, then let it arrive."""
    dice = random.Random(kills)
    for _ in range(kills):
        process = subprocess.Popen(
            _command(corpus, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        begun = time.monotonic()
        before = _progress(out)
        while _progress(out) == before and process.poll() is None:
            assert time.monotonic() - begun < 120, "the tour does not train"
            time.sleep(0.05)
        time.sleep(dice.uniform(0, 4))
        process.send_signal(signal.SIGKILL)
        process.wait()
    _walk(corpus, out)


def _progress(out: Path) -> tuple[int, float]:
    metrics = out / "train" / "metrics.jsonl"
    return (metrics.stat().st_size, metrics.stat().st_mtime) if metrics.exists() else (0, 0.0)


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_a_killed_tour_ends_with_the_same_losses(corpus: Path, tmp_path: Path, kills: int) -> None:
    """Bit for bit; and the whole tour says what it must, with a picture and a loadable model."""
    said = _walk(corpus, tmp_path / "whole")
    for step in (
        "tokenizer",
        "tokens",
        "training",
        "held out",
        "generate",
        "drafts",
        "json",
        "long",
        "done",
    ):
        assert f"\n{step}" in f"\n{said}", f"the tour does not print {step!r}"
    assert "NOT the same" not in said and "does NOT fit" not in said
    assert (tmp_path / "whole" / "loss.png").read_bytes()[:4] == b"\x89PNG"
    _kill_and_resume(corpus, tmp_path / "killed", kills)
    whole, killed = _losses(tmp_path / "whole"), _losses(tmp_path / "killed")
    assert len(whole) == STEPS and whole[-1] < whole[0] - 1, "the loss did not fall"
    assert killed == whole
