"""How many tokens does a ternary model need in low bits? Loss against the high-precision share.

    python reproduce/qat_schedule.py                 about 20 minutes on two cores
    python reproduce/qat_schedule.py --minutes 5     fewer tokens
    python reproduce/qat_schedule.py --steps 400     a fixed budget instead of a time
    python reproduce/qat_schedule.py --jobs 1        one core

The claim (BitCPM, in MiniCPM4, arXiv 2506.07900): train in high precision first, then ternary with
a re-warmed learning rate, both under one WSD budget; if at least 40 % of all tokens are ternary the
final loss approaches that of ternary training from scratch. The report's model has 5 M parameters
and 400 tokens for each; this one has about 0.1 M and reads bytes.

One stable high-precision run (rate `FIRST`) is branched at 20, 40, 60 and 80 % of the budget. Each
branch goes on in ternary with the rest of the tokens: rate re-warmed to `SECOND`, decayed over the
last fifth of the whole budget. The baseline is ternary from scratch with the whole budget, the
better of both rates. A high-precision run with the same budget and decay shows what ternary costs.
Final loss: held-out bytes, nats each. Runs take one thread each, `--jobs` at a time; the processor
time of all of them stands beside the time that passed, which neighbours on the machine stretch.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import platform
import resource
import time
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from endside.config import dump
from endside.data.source import DataConfig, open_data
from endside.log import Progress, read_metrics
from endside.model.config import ModelConfig
from endside.train import pretrain, qat
from endside.train.optim import OptimConfig
from endside.train.pretrain import PretrainConfig
from endside.train.qat import QatConfig
from endside.train.run_folder import RunFolder
from endside.train.schedule import ScheduleConfig

RESULTS = Path(__file__).resolve().parent / "results"
FIRST, SECOND = 1e-2, 5e-3  # learning rates of the two stages, as in the report
SHARES = (0.2, 0.4, 0.6, 0.8)  # of the tokens in high precision; 0 is the baseline
DECAY = 0.2  # of the whole budget, at the end
GROUP = 64
RUNS = 5.2  # budgets that the whole sweep takes: 0.8 + 2 + (0.8 + 0.6 + 0.4 + 0.2) + 0.2
CLOSE = 0.01  # of the baseline's loss

SHAPE = ModelConfig(
    vocab_size=257, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=32, intermediate_size=192, max_position_embeddings=256,
    tie_word_embeddings=True, scale_emb=12.0, scale_depth=1.4, dim_model_base=64,
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One line of the result."""

    name: str
    share: float  # of the tokens in high precision
    learning_rate: float  # peak of the last stage
    loss: float  # held out, at the end


def config(work: Path, steps: int) -> PretrainConfig:
    """The stable high-precision run; its last checkpoint stands at the largest share."""
    return PretrainConfig(
        model=SHAPE,
        data=DataConfig(shards=str(work / "bytes"), corpus="python"),
        steps=round(steps * SHARES[-1]), batch=16, seq_len=128, threads=1, eval_rows=256,
        checkpoint_every=steps // 5, checkpoint_seconds=0.0,
        schedule=ScheduleConfig(warmup=max(1, steps // 20)),
        optim=OptimConfig(learning_rate=FIRST),
    )  # fmt: skip


def low_bits(base: PretrainConfig, steps: int, start: str, rate: float, seed: int) -> QatConfig:
    """A ternary run of `steps` out of the whole budget; from scratch where start is empty."""
    budget = round(base.steps / SHARES[-1])
    values = {name: getattr(base, name) for name in base.__dataclass_fields__}
    values |= {
        "steps": steps, "seed": seed, "checkpoint_every": 0, "checkpoint_seconds": 60.0,
        "schedule": ScheduleConfig(
            warmup=max(1, budget // 20), decay=min(round(DECAY * budget), steps - budget // 20),
            floor=0.05,
        ),
        "optim": OptimConfig(learning_rate=rate), "init_from": start,
    }  # fmt: skip
    return QatConfig(**values, kind="ternary", group=GROUP)


def train(cfg: PretrainConfig, folder: Path) -> float:
    """Run or resume one training in this process; its final held-out loss."""
    stage = qat if isinstance(cfg, QatConfig) else pretrain
    with (
        (folder.parent / f"{folder.name}.log").open("w") as log,
        RunFolder(folder, keep=len(SHARES), progress=Progress(log)) as run,
    ):
        stage.main(cfg, run)
    records = read_metrics(folder / "metrics.jsonl")
    return [record["heldout_loss"] for record in records if "heldout_loss" in record][-1]


def sweep(work: Path, steps: int, jobs: int, progress: Progress) -> list[Run]:
    """All runs, `jobs` at a time."""
    base, where = config(work, steps), work / f"steps-{steps}"
    where.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        stable = pool.submit(train, base, where / "stable")
        pending: dict[Future, tuple[str, float, float]] = {}
        for rate in (FIRST, SECOND):
            cfg = low_bits(base, steps, "", rate, seed=0)
            pending[pool.submit(train, cfg, where / f"scratch-{rate:g}")] = ("scratch", 0.0, rate)
        progress.note(f"stable run and scratch runs under way, {steps} steps each")
        stable.result()
        for number, share in enumerate(SHARES, start=1):
            start = where / "stable" / "checkpoints" / f"step_{number * (steps // 5)}"
            left = steps - number * (steps // 5)
            cfg = low_bits(base, left, str(start), SECOND, seed=number)
            job = pool.submit(train, cfg, where / f"share-{share:g}")
            pending[job] = ("ternary", share, SECOND)
        annealed = replace(
            base, decay_from=str(start), checkpoint_every=0,
            schedule=ScheduleConfig(base.schedule.warmup, round(DECAY * steps), floor=0.05),
        )  # fmt: skip
        job = pool.submit(train, annealed, where / "high-precision")
        pending[job] = ("high precision", 1.0, FIRST)
        runs = []
        for job, (name, share, rate) in pending.items():
            runs.append(Run(name, share, rate, job.result()))
            progress.note(f"{name}, share {share:g}, rate {rate:g}: loss {runs[-1].loss:.4f}")
    return runs


def baseline(runs: list[Run]) -> Run:
    """The better of the runs from scratch."""
    return min((run for run in runs if run.name == "scratch"), key=lambda run: run.loss)


def table(runs: list[Run]) -> str:
    """All runs, and how far each is from the baseline."""
    best = baseline(runs).loss
    lines = [f"{'run':<16} {'high precision':>14} {'rate':>7} {'loss':>8} {'against scratch':>16}"]
    for run in sorted(runs, key=lambda run: (run.share, run.learning_rate)):
        lines.append(
            f"{run.name:<16} {run.share:>14.0%} {run.learning_rate:>7g} {run.loss:>8.4f} "
            f"{run.loss / best - 1:>+16.2%}"
        )
    return "\n".join(lines)


def verdict(runs: list[Run]) -> str:
    """Whether the claim held."""
    best = baseline(runs).loss
    claimed = {run.share: run.loss / best - 1 for run in runs if run.name == "ternary"}
    enough = {share: gap for share, gap in claimed.items() if 1 - share >= 0.4}
    worst = max(enough.values())
    held = "held" if worst <= CLOSE else "did not hold"
    return (
        f"with 40 % of the tokens in ternary or more the loss is at most {worst:+.2%} from ternary "
        f"from scratch: the claim (within {CLOSE:.0%}) {held}; with 20 % it is {claimed[0.8]:+.2%}"
    )


def plot(runs: list[Run], path: Path, note: str) -> None:
    """Loss over the share."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    best = baseline(runs)
    curve = [best, *sorted((r for r in runs if r.name == "ternary"), key=lambda r: r.share)]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(
        xlabel="tokens in high precision, %", ylabel="final held-out loss, nats a byte"
    )
    axes.plot([100 * r.share for r in curve], [r.loss for r in curve], "o-", label="then ternary")
    axes.axhspan(best.loss, best.loss * (1 + CLOSE), color="C0", alpha=0.12, label="within 1 %")
    full = next(run for run in runs if run.name == "high precision")
    axes.axhline(full.loss, linestyle="--", color="gray", label="high precision to the end")
    axes.set_title(note, fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def steps_that_fit(work: Path, minutes: float, jobs: int) -> int:
    """The budget in steps with which the sweep takes about `minutes`, `jobs` runs at a time.

    A sweep that was begun in `work` goes on with its own.
    """
    for before in work.glob("steps-*"):
        return int(before.name.removeprefix("steps-"))
    cfg = low_bits(config(work, 1000), 1000, "", FIRST, seed=0)
    speed = pretrain.measure_speed(cfg, make=qat.make_model, seconds=8.0)
    return max(50, int(0.8 * minutes * 60 * jobs / RUNS * speed / (cfg.batch * cfg.seq_len)))


def processor_minutes() -> float:
    """Of this process and of the ended runs."""
    sides = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(u.ru_utime + u.ru_stime for u in map(resource.getrusage, sides)) / 60


def main() -> None:
    """Train, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=18.0, help="of the whole sweep")
    parser.add_argument("--steps", type=int, help="budget of a run, instead of minutes")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--work", type=Path, default=Path("runs/qat-schedule"))
    parser.add_argument("--out", type=Path, default=RESULTS / "qat_schedule.json")
    flags = parser.parse_args()
    begun, progress = time.monotonic(), Progress()
    first = config(flags.work, 1000)
    open_data(first.data, first.model.vocab_size, progress)
    steps = (flags.steps or steps_that_fit(flags.work, flags.minutes, flags.jobs)) // 5 * 5
    if steps < 40:
        raise SystemExit(f"{steps} steps are too few: give 40 or more")
    cfg = config(flags.work, steps)
    parameters = sum(p.numel() for p in pretrain.make_model(cfg).parameters())
    tokens = steps * cfg.batch * cfg.seq_len
    note = (
        f"{parameters:,} parameters, {tokens:,} bytes of text, "
        f"{tokens / parameters:.0f} for each parameter"
    )
    progress.note(note)
    runs = sweep(flags.work, steps, flags.jobs, progress)
    minutes, busy = (time.monotonic() - begun) / 60, processor_minutes()
    print(note, table(runs), verdict(runs), sep="\n")
    print(f"{minutes:.1f} minutes, {busy:.1f} of processor time")
    result = {
        "parameters": parameters, "tokens": tokens, "tokens_per_parameter": tokens / parameters,
        "runs": [asdict(run) for run in runs], "verdict": verdict(runs), "group": GROUP,
        "minutes": round(minutes, 1), "processor_minutes": round(busy, 1), "jobs": flags.jobs,
        # where the work lay says nothing of it
        "config": dump(replace(cfg, data=replace(cfg.data, shards="bytes"))),
        "perplexity_of_the_baseline": math.exp(baseline(runs).loss),
        "machine": platform.machine(),
    }  # fmt: skip
    plot(runs, flags.out.with_suffix(".png"), note)
    flags.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    progress.note(f"{flags.out} and .png written after {result['minutes']} minutes")


if __name__ == "__main__":
    main()
