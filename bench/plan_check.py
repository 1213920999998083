"""Is `endside plan` right? Predicted bytes and tokens per second beside measured ones, on this CPU.

    python bench/plan_check.py [--case NAME] [--steps 6] [--json PATH]

Each case trains in a process of its own, through the product's own loop. Memory is what the process
grew by at its worst moment (VmHWM, before the checkpoint), so the allocator's waste counts as error
of the forecast. Time is that of the median step, predicted from a product rate and a memory rate
measured just before; all three are processor time, so that other work on the machine does not
count. The exit code is 1 where a case is off by more than FACTOR.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch

from endside.data.document import Document
from endside.data.loader import Loader, LoaderConfig, TokenBatch
from endside.data.pack import PackConfig, byte_encoder, open_packed, pack
from endside.data.source import DataConfig
from endside.model.presets import preset
from endside.train import forecast, pretrain
from endside.train.loop import loop
from endside.train.losses import Loss, LossConfig, next_token
from endside.train.pretrain import PretrainConfig
from endside.train.run_folder import RunFolder
from endside.train.schedule import ScheduleConfig
from endside.verbs.plan import work_of

FACTOR = {"bytes": 1.5, "tokens_per_s": 2.5}
DEMO = preset("demo")
TINY = replace(DEMO, hidden_size=64, num_attention_heads=1, num_key_value_heads=1)
WIDE = replace(DEMO, hidden_size=512, num_attention_heads=8, intermediate_size=1408)
CASES = {
    "small": {"model": DEMO, "batch": 4, "seq_len": 256},
    "demo": {"model": DEMO, "batch": 8, "seq_len": 256},
    "bfloat16": {"model": DEMO, "batch": 8, "seq_len": 256, "precision": "bfloat16"},
    "chunked": {"model": DEMO, "batch": 8, "seq_len": 256, "loss": LossConfig(chunk=256)},
    "wide": {"model": WIDE, "batch": 4, "seq_len": 512},
    "recomputed": {"model": WIDE, "batch": 4, "seq_len": 512, "checkpoint_activations": True},
    "many weights": {"model": replace(WIDE, vocab_size=32768), "batch": 1, "seq_len": 256},
}


def shards(folder: Path) -> Path:
    """A small corpus of bytes."""
    documents = [Document(f"d{i}", f"{i} is one more than {i - 1}. " * 20, "n") for i in range(400)]
    pack(documents, folder / "shards", byte_encoder(), PackConfig(heldout_share=0.1))
    return folder / "shards"


def config(case: dict, data: Path, steps: int) -> PretrainConfig:
    """The run of a case."""
    return PretrainConfig(
        data=DataConfig(str(data)), steps=steps, threads=torch.get_num_threads(),
        checkpoint_seconds=0, schedule=ScheduleConfig(warmup=1), **case,
    )  # fmt: skip


def measure(cfg: PretrainConfig) -> dict[str, float]:
    """Bytes grown by and tokens per second, of a process forked for it."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with open(writer, "w") as file:
                json.dump(_train(cfg), file)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writer)
    with open(reader) as file:
        text = file.read()
    if os.waitpid(child, 0)[1]:
        raise SystemExit("plan_check: the measured process died")
    return json.loads(text)


def _train(cfg: PretrainConfig) -> dict[str, float]:
    # A tiny run first: what a first step imports and sets up is not of the model.
    _steps(replace(cfg, model=TINY, steps=1, batch=1, seq_len=64))
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
    return _steps(cfg)


def _steps(cfg: PretrainConfig) -> dict[str, float]:
    before = _status("VmRSS")
    packed = open_packed(Path(cfg.data.shards))
    with tempfile.TemporaryDirectory() as folder, RunFolder(folder) as run:
        peak: list[float] = []
        begun: list[float] = []
        loss_fn = next_token(cfg.loss)

        def timed(model: torch.nn.Module, batch: TokenBatch) -> Loss:
            begun.append(time.process_time())
            return loss_fn(model, batch)

        def evaluate(_model: torch.nn.Module) -> dict[str, float]:
            peak.append(_status("VmHWM") - before)
            return {}

        with pretrain.deterministic(cfg):
            model = pretrain.make_model(cfg)
            batches = Loader(packed, LoaderConfig(cfg.batch, cfg.seq_len, cfg.seed))
            loop(model, batches, timed, cfg, run, evaluate=evaluate)
    steps = [later - earlier for earlier, later in pairwise(begun)]
    # The tiny run has one step and is not timed.
    seconds = median(steps or [math.inf]) / cfg.threads
    return {"bytes": peak[0], "tokens_per_s": cfg.batch * cfg.seq_len / seconds}


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def predict(cfg: PretrainConfig) -> dict[str, float]:
    """The forecast of the same run here."""
    work = work_of(cfg)
    device = forecast.Device(1, math.inf, *rates(cfg), link_rate=math.inf)
    tokens = work.batch * work.accumulate * work.seq_len
    return {
        "bytes": forecast.memory(work, 1).peak,
        "tokens_per_s": tokens / forecast.time(work, device).step,
    }


def rates(cfg: PretrainConfig) -> tuple[float, float]:
    """Operations and bytes per second: of products as wide as the model, and of copies."""
    dtype = torch.float32 if cfg.precision == "float32" else torch.bfloat16
    width = cfg.model.hidden_size
    left, right = torch.full((2, width, width), 0.5, dtype=dtype)
    source, target = torch.zeros(2, 16 << 20)
    product = usual(lambda: left @ right) / cfg.threads
    copy = usual(lambda: target.copy_(source)) / cfg.threads
    return 2 * width**3 / product, 2 * source.nbytes / copy


def usual(act: Callable[[], object]) -> float:
    """Processor seconds of the median call, over half a second of them."""
    times: list[float] = []
    while sum(times) < 0.5:
        begun = time.process_time()
        act()
        times.append(time.process_time() - begun)
    return median(times)


def main() -> None:
    """Print every case, predicted against measured."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--case", choices=[*CASES, "all"], default="all")
    flags.add_argument("--steps", type=int, default=6)
    flags.add_argument("--json", type=Path, help="where to write the figures; - prints them")
    chosen = flags.parse_args()
    rows, wrong = {}, []
    with tempfile.TemporaryDirectory() as folder:
        data = shards(Path(folder))
        for name in CASES if chosen.case == "all" else [chosen.case]:
            cfg = config(CASES[name], data, chosen.steps)
            predicted, measured = predict(cfg), measure(cfg)
            rows[name] = {"predicted": predicted, "measured": measured}
            for key, factor in FACTOR.items():
                ratio = predicted[key] / measured[key]
                print(f"{name:14}{key:14} predicted {predicted[key]:14,.0f}  measured "
                      f"{measured[key]:14,.0f}  ratio {ratio:.2f}", flush=True)  # fmt: skip
                if not 1 / factor <= ratio <= factor:
                    wrong.append(f"{name}: {key} is off by more than {factor}")
    if chosen.json:
        report = {"torch": torch.__version__, "threads": torch.get_num_threads(),
                  "factor": FACTOR, "cases": rows}  # fmt: skip
        text = json.dumps(report, indent=1)
        print(text) if str(chosen.json) == "-" else chosen.json.write_text(text + "\n")
    sys.exit("\n".join(wrong) or 0)


if __name__ == "__main__":
    main()
