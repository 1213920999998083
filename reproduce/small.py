"""Small pre-training runs that the other scripts of this folder compare.

The text is the running Python's own documentation and library, as bytes; the shape is a decoder in
which every scale of MiniCPM bites. Each run is an ordinary `pretrain` run with a folder of its own,
so that a script which was stopped goes on where it was: what has ended is read, not trained again.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from endside.data.source import DataConfig
from endside.log import Progress, read_metrics
from endside.model.config import ModelConfig
from endside.train import pretrain
from endside.train.optim import OptimConfig
from endside.train.pretrain import PretrainConfig
from endside.train.run_folder import RunFolder
from endside.train.schedule import ScheduleConfig

RESULTS = Path(__file__).resolve().parent / "results"
HEAD = 32  # head width, the same at every model width
BASE = 64  # width where every muP factor is one
Records = list[dict[str, Any]]


def shape(width: int = BASE, *, layers: int = 2, base: int | None = BASE) -> ModelConfig:
    """A decoder of bytes; base None switches muP off: nothing is scaled with the width."""
    heads = width // HEAD
    return ModelConfig(
        vocab_size=257, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2), head_dim=HEAD, intermediate_size=5 * width // 2,
        max_position_embeddings=256, tie_word_embeddings=True, scale_emb=12.0, scale_depth=1.4,
        dim_model_base=base,
    )  # fmt: skip


def config(
    work: Path, model: ModelConfig, steps: int, rate: float, *, decay: int = 0, seed: int = 0
) -> PretrainConfig:
    """512 bytes of text a step, one thread, a tenth of the steps to warm up."""
    return PretrainConfig(
        model=model, data=DataConfig(shards=str(work / "bytes"), corpus="python"),
        steps=steps, batch=4, seq_len=128, seed=seed, threads=1, eval_rows=256,
        checkpoint_seconds=0.0, optim=OptimConfig(learning_rate=rate),
        schedule=ScheduleConfig(warmup=max(1, steps // 10), decay=decay),
    )  # fmt: skip


def train(cfg: PretrainConfig, folder: Path, *, keep: int = 2) -> Records:
    """Run, resume or recall one training; its metrics, with the held-out loss in the last."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        (folder.parent / f"{folder.name}.log").open("a") as log,
        RunFolder(folder, keep=keep, progress=Progress(log)) as run,
    ):
        pretrain.main(cfg, run)
    return read_metrics(folder / "metrics.jsonl")


def heldout(records: Records) -> float:
    """The last held-out loss of a run, nats a byte."""
    return [record["heldout_loss"] for record in records if "heldout_loss" in record][-1]


def run(cfg: PretrainConfig, folder: Path, name: str, progress: Progress) -> tuple[Records, float]:
    """A training and its last held-out loss, which `progress` tells."""
    records = train(cfg, folder)
    progress.note(f"{name}: loss {heldout(records):.4f}")
    return records, heldout(records)


def branch(cfg: PretrainConfig, checkpoint: Path, decay: int) -> PretrainConfig:
    """The run that anneals `checkpoint` of `cfg` over `decay` steps."""
    schedule = replace(cfg.schedule, decay=decay)
    return replace(cfg, decay_from=str(checkpoint), schedule=schedule, checkpoint_every=0)


def arguments(description: str, name: str) -> argparse.ArgumentParser:
    """The flags every script has: where runs live and where the result goes."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs") / f"reproduce-{name}")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.json")
    return parser


def picture(panels: int = 1, **labels: str) -> tuple[Any, list[Any]]:
    """A figure with its axes in a row, without touching a global backend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 if panels == 1 else 5 * panels, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for one in axes:
        one.set(**labels)
        one.grid(alpha=0.3)
    return figure, list(axes)


def report(
    given: argparse.Namespace, model: ModelConfig, runs: Sequence[Any], said: tuple[str, str],
    draw: Callable[[str], Any], *, more: str = "",
) -> None:  # fmt: skip
    """Print and write a comparison of runs of `given.steps`; said: its table and its verdict."""
    cfg = config(given.work, model, given.steps, 1.0)
    tokens = given.steps * cfg.batch * cfg.seq_len
    note = f"width {model.hidden_size}, two layers, {tokens:,} bytes of text a run{more}"
    print(note, *said, sep="\n")
    result = {"tokens": tokens, "width": model.hidden_size, "verdict": said[1],
              "runs": [asdict(one) for one in runs]}  # fmt: skip
    finish(given.out, result, draw(note))


def finish(out: Path, result: dict[str, Any], figure: Any) -> None:
    """Write JSON and PNG; the processor's minutes are those of this call, recalled runs aside."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    minutes = (used.ru_utime + used.ru_stime) / 60
    result = {**result, "processor_minutes": round(minutes, 1), "machine": platform.machine()}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    figure.savefig(out.with_suffix(".png"), dpi=120, metadata={"Software": None})
    print(f"{minutes:.1f} minutes of processor time; {out} and .png written")
