"""A small packed corpus that can be learned, and a small run on it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from endside.data.document import Document
from endside.data.loader import TokenBatch
from endside.data.pack import PackConfig, byte_encoder, pack
from endside.data.source import DataConfig
from endside.log import Progress, read_metrics
from endside.model.presets import preset
from endside.train.losses import Loss, LossConfig, LossFn, next_token
from endside.train.optim import OptimConfig
from endside.train.pretrain import PretrainConfig
from endside.train.run_folder import RunFolder
from endside.train.schedule import ScheduleConfig

WORDS = ("the", "model", "reads", "a", "short", "text", "and", "learns", "which", "word", "follows")


def sentences(count: int) -> list[Document]:
    """Seeded documents of 5 to 40 words, some shorter than a window and some longer."""
    choose = random.Random(5)
    return [
        Document(f"d{i}", " ".join(choose.choices(WORDS, k=choose.randint(5, 40))), "test")
        for i in range(count)
    ]


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "shards"
    pack(sentences(300), folder, byte_encoder(), PackConfig(heldout_share=0.1, shard_tokens=9000))
    return folder


def small(shards: Path) -> PretrainConfig:
    """Twenty steps of a model of 50k parameters."""
    return PretrainConfig(
        model=replace(preset("tiny"), tie_word_embeddings=True),
        data=DataConfig(str(shards)),
        steps=20,
        batch=2,
        accumulate=2,
        seq_len=48,
        seed=3,
        threads=1,
        eval_rows=4,
        checkpoint_every=5,
        schedule=ScheduleConfig(warmup=4, decay=6),
        optim=OptimConfig(learning_rate=0.01),
    )


def records(run: Path) -> list[dict[str, Any]]:
    """What a run folder's metrics say, but for how fast each step was."""
    found = read_metrics(run / "metrics.jsonl")
    return [{k: v for k, v in r.items() if k not in ("tokens_per_s", "mfu")} for r in found]


def last_step(run: Path) -> int:
    """Of a run that may be writing; 0 before its first record."""
    path = run / "metrics.jsonl"
    return next((record["step"] for record in read_metrics(path)[::-1]), 0) if path.exists() else 0


def dies_at(call: int) -> Callable[[LossConfig], LossFn]:
    """A stand-in for `next_token` that is interrupted in the loss's n-th call."""
    calls: list[int] = []

    def loss_fn(model: nn.Module, batch: TokenBatch) -> Loss:
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return next_token(LossConfig())(model, batch)

    return lambda _: loss_fn


@pytest.fixture
def cfg(shards: Path) -> PretrainConfig:
    return small(shards)


@pytest.fixture
def quiet() -> Progress:
    """Progress that collects its lines in `.text()`."""
    import io

    class Lines(io.StringIO):
        pass

    stream = Lines()
    progress = Progress(stream, quiet_seconds=0.0)
    progress.text = stream.getvalue
    return progress


@pytest.fixture
def open_run(tmp_path: Path, quiet: Progress):
    """open_run("name") -> a RunFolder under tmp_path that is closed at the end of the test."""
    opened = []

    def make(name: str = "run", **options: int) -> RunFolder:
        run = RunFolder(tmp_path / name, progress=quiet, **options)
        opened.append(run)
        return run

    yield make
    for run in opened:
        run.close()
