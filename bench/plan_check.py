"""Is `endside plan` right? Predicted bytes and tokens per second beside measured ones, on this CPU.

    python bench/plan_check.py [--case NAME] [--steps 8] [--threads 2] [--json PATH]

Each case trains in a process of its own, through the product's own loop. Memory is the most that
the allocator had given out at one moment (asked every two milliseconds, in a run for that alone).
The process grows by more, since freed blocks leave holes and stay: that is printed too, and is what
the plan's reserve is for. Time is that of the median step, predicted from the rates that
`endside plan` asks this machine for (`train.rates`) just before; all are processor time over the
number of threads, so that other work on the machine does not count. Beside it stands the speed by
the clock, which on a machine without other work is what a user sees. The exit code is 1 where a
case is off by more than FACTOR, or where holes take more than the reserve. The last case, the 0.5B
shape itself, takes 9 GB of memory. Writes bench/results/plan_check.json.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.attend_cpu import machine
from endside import native
from endside.data.document import Document
from endside.data.loader import Loader, LoaderConfig, TokenBatch
from endside.data.pack import PackConfig, byte_encoder, open_packed, pack
from endside.data.source import DataConfig
from endside.log import Progress
from endside.model.presets import preset
from endside.train import forecast, pretrain, rates
from endside.train.loop import loop
from endside.train.losses import Loss, LossConfig, next_token
from endside.train.pretrain import PretrainConfig
from endside.train.run_folder import RunFolder
from endside.train.schedule import ScheduleConfig
from endside.verbs.plan import work_of

RESULT = Path(__file__).resolve().parent / "results" / "plan_check.json"
FACTOR = {"bytes": 1.25, "tokens_per_s": 1.5}
MEMORY_STEPS = 5  # until the holes are as they stay
FEW = {"0.5B": 4}  # steps at most
DEMO = preset("demo")
TINY = replace(DEMO, hidden_size=64, num_attention_heads=1, num_key_value_heads=1)
WIDE = replace(DEMO, hidden_size=512, num_attention_heads=8, intermediate_size=1408)
CASES: dict[str, dict] = {
    "small": {"model": DEMO, "batch": 4, "seq_len": 256},
    "demo": {"model": DEMO, "batch": 8, "seq_len": 256},
    "bfloat16": {"model": DEMO, "batch": 8, "seq_len": 256, "precision": "bfloat16"},
    "chunked": {"model": DEMO, "batch": 8, "seq_len": 256, "loss": LossConfig(chunk=256)},
    "wide": {"model": WIDE, "batch": 4, "seq_len": 512},
    "recomputed": {"model": WIDE, "batch": 4, "seq_len": 512, "checkpoint_activations": True},
    "long": {"model": WIDE, "batch": 1, "seq_len": 2048},
    "half long": {"model": WIDE, "batch": 1, "seq_len": 2048, "precision": "bfloat16"},
    "many weights": {"model": replace(WIDE, vocab_size=32768), "batch": 1, "seq_len": 256},
    "0.5B": {"model": preset("minicpm4-0.5b"), "batch": 1, "seq_len": 512, "precision": "bfloat16"},
}


def shards(folder: Path) -> Path:
    """A small corpus of bytes."""
    documents = [
        Document(f"d{i}", f"{i} is one more than {i - 1}. " * 150, "n") for i in range(200)
    ]
    pack(documents, folder / "shards", byte_encoder(), PackConfig(heldout_share=0.1))
    return folder / "shards"


def config(case: dict, data: Path, steps: int, threads: int) -> PretrainConfig:
    """The run of a case."""
    return PretrainConfig(
        data=DataConfig(str(data)), steps=steps, threads=threads,
        checkpoint_seconds=0, schedule=ScheduleConfig(warmup=1), **case,
    )  # fmt: skip


def forked(function: Callable[[PretrainConfig], dict[str, float]], cfg: PretrainConfig) -> dict:
    """What `function` says in a process of its own; this one starts no threads."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with open(writer, "w") as file:
                json.dump(function(cfg), file)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writer)
    with open(reader) as file:
        text = file.read()
    if os.waitpid(child, 0)[1]:
        raise SystemExit(f"plan_check: the process of {function.__name__} died")
    return json.loads(text)


class Allocated(ctypes.Structure):
    """GNU's mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks",
                     "uordblks", "fordblks", "keepcost")
    ]  # fmt: skip


def given_out() -> int:
    """Bytes that the allocator has given out and not got back."""
    library = ctypes.CDLL(None)
    library.mallinfo2.restype = Allocated
    found = library.mallinfo2()
    return found.uordblks + found.hblkhd


def measure_memory(cfg: PretrainConfig) -> dict[str, float]:
    """Most bytes given out, and what the process grew by."""
    _warm(cfg)
    most, before, ended = [0], given_out(), threading.Event()

    def watch() -> None:
        while not ended.wait(0.002):
            most[0] = max(most[0], given_out() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    grown = _steps(replace(cfg, steps=min(MEMORY_STEPS, cfg.steps)))["grown"]
    ended.set()
    watcher.join()
    return {"bytes": most[0], "grown": grown}


def measure_time(cfg: PretrainConfig) -> dict[str, float]:
    """Tokens per second, by the processor's time and by the clock."""
    _warm(cfg)
    found = _steps(cfg)
    del found["grown"]
    return found


def _warm(cfg: PretrainConfig) -> None:
    """A tiny run first: what a first step imports and sets up is not of the model."""
    _steps(replace(cfg, model=TINY, steps=1, batch=1, seq_len=64))
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here


def _steps(cfg: PretrainConfig) -> dict[str, float]:
    before = _status("VmRSS")
    packed = open_packed(Path(cfg.data.shards))
    with (
        tempfile.TemporaryDirectory() as folder,
        open(os.devnull, "w") as nowhere,
        RunFolder(folder, progress=Progress(nowhere)) as run,
    ):
        peak: list[float] = []
        begun: list[tuple[float, float]] = []
        loss_fn = next_token(cfg.loss)

        def timed(model: torch.nn.Module, batch: TokenBatch) -> Loss:
            begun.append((time.process_time() / cfg.threads, time.perf_counter()))
            return loss_fn(model, batch)

        def evaluate(_model: torch.nn.Module) -> dict[str, float]:
            peak.append(_status("VmHWM") - before)
            return {}

        with pretrain.deterministic(cfg):
            model = pretrain.make_model(cfg)
            batches = Loader(packed, LoaderConfig(cfg.batch, cfg.seq_len, cfg.seed))
            loop(model, batches, timed, cfg, run, evaluate=evaluate)
    # The tiny run has one step and is not timed.
    work, clock = (
        median([later - earlier for earlier, later in pairwise(times)] or [math.inf])
        for times in zip(*begun, strict=True)
    )
    tokens = cfg.batch * cfg.seq_len
    return {"grown": peak[0], "tokens_per_s": tokens / work, "by_the_clock": tokens / clock}


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def predict(cfg: PretrainConfig) -> dict[str, float]:
    """The forecast of the same run here, and what its time is made of."""
    torch.set_num_threads(cfg.threads)
    work = work_of(cfg)
    found = rates.measure(work, cfg.precision)
    device = forecast.Device(
        1, math.inf, found.products, found.attention, found.memory, link_rate=math.inf,
        core=native.load() is not None,
    )  # fmt: skip
    spent = forecast.time(work, device)
    tokens = work.batch * work.accumulate * work.seq_len
    return {
        "bytes": forecast.memory(work, 1).peak, "tokens_per_s": tokens / spent.step,
        "products_s": spent.products, "attention_s": spent.attention, "memory_s": spent.memory,
    }  # fmt: skip


def judged(name: str, predicted: dict[str, float], measured: dict[str, float]) -> list[str]:
    """Print a case; what is wrong with it."""
    wrong = []
    for key, factor in FACTOR.items():
        ratio = predicted[key] / measured[key]
        print(f"{name:13}{key:13} predicted {predicted[key]:13,.0f}  measured "
              f"{measured[key]:13,.0f}  ratio {ratio:.2f}", flush=True)  # fmt: skip
        if not 1 / factor <= ratio <= factor:
            wrong.append(f"{name}: {key} is off by more than {factor}")
    free = 1 - predicted["bytes"] / measured["grown"]
    print(f"{'':13}holes are {free:.0%} of the {measured['grown']:,.0f} that the process grew by; "
          f"{measured['by_the_clock']:,.0f} tokens/s by the clock", flush=True)  # fmt: skip
    if free > forecast.RESERVE_CPU:
        wrong.append(f"{name}: holes take more than the reserve of {forecast.RESERVE_CPU:.0%}")
    return wrong


def main() -> None:
    """Print every case, predicted against measured."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--case", choices=[*CASES, "all"], default="all")
    flags.add_argument("--steps", type=int, default=8)
    flags.add_argument("--threads", type=int, default=torch.get_num_threads())
    flags.add_argument("--json", type=Path, default=RESULT, help="where to write; - prints")
    chosen = flags.parse_args()
    rows, wrong = {}, []
    with tempfile.TemporaryDirectory() as folder:
        data = shards(Path(folder))
        for name in CASES if chosen.case == "all" else [chosen.case]:
            steps = min(chosen.steps, FEW.get(name, chosen.steps))
            cfg = config(CASES[name], data, steps, chosen.threads)
            predicted = forked(predict, cfg)
            measured = {**forked(measure_memory, cfg), **forked(measure_time, cfg)}
            rows[name] = {"predicted": predicted, "measured": measured}
            wrong += judged(name, predicted, measured)
    report = {"machine": {**machine(), "threads": chosen.threads}, "factor": FACTOR, "cases": rows}
    text = json.dumps(report, indent=1)
    print(text) if str(chosen.json) == "-" else chosen.json.write_text(text + "\n")
    sys.exit("\n".join(wrong) or 0)


if __name__ == "__main__":
    main()
