"""What a run shows of itself: utilisation from a known peak, TensorBoard's files, no package."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from endside.errors import UserError
from endside.log import read_metrics
from endside.model.flops import training_flops
from endside.train import peak, pretrain, watch
from endside.train.pretrain import PretrainConfig


def test_utilisation_is_operations_over_the_peak(
    cfg: PretrainConfig, open_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "peak_flops", lambda device, precision: 1e12)
    ticks = iter(range(100))
    monkeypatch.setattr(watch.time, "monotonic", lambda: float(next(ticks)))
    run = open_run()
    pretrain.main(replace(cfg, steps=3, schedule=replace(cfg.schedule, warmup=1, decay=1)), run)
    records = [r for r in read_metrics(run.path / "metrics.jsonl") if "loss" in r]
    rows = cfg.batch * cfg.accumulate
    work = training_flops(cfg.model, cfg.seq_len) * rows * cfg.seq_len
    # Where a clock shows whole seconds, a step takes one or two of them.
    assert records[0]["mfu"] in [round(work / seconds / 1e12, 4) for seconds in (1, 2)]
    assert records[0]["tokens_per_s"] in [records[0]["tokens"] / seconds for seconds in (1, 2)]


def test_what_is_not_a_model_or_is_frozen_has_other_operations(cfg: PretrainConfig) -> None:
    assert watch._operations(nn.Linear(2, 2)) is None
    model = pretrain.make_model(cfg)
    assert watch._operations(model) == (model.config, 1.0)
    model.norm.weight.requires_grad_(False)
    assert watch._operations(model) == (model.config, 2 / 3)


def test_the_peak_is_measured_once_and_again_after_a_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    answers = iter([5.0, 3.0, 7.0])
    monkeypatch.setattr(peak, "measure", lambda dtype: next(answers))
    place, cpu = tmp_path / "endside" / "peaks.json", torch.device("cpu")
    assert [peak.peak_flops(cpu, "float32") for _ in range(2)] == [5.0, 5.0]
    for expected in (5.0, 7.0):
        known = json.loads(place.read_text())
        old = {key: (value, when - 2 * peak.DAY) for key, (value, when) in known.items()}
        place.write_text(json.dumps(old))
        assert peak.peak_flops(cpu, "float32") == expected
    place.write_text("torn {")
    monkeypatch.setattr(peak, "measure", lambda dtype: 1.0)
    assert peak.peak_flops(cpu, "float32") == 1.0


def test_a_product_is_timed_by_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    begun = time.process_time()
    rate = peak.measure(torch.float32, 256)
    spent = time.process_time() - begun
    assert rate >= peak.REPEATS * 2 * 256**3 * threads / spent
    ticks = iter([0.0, 3.0, 3.0, 5.0, *[float(tick) for tick in range(10, 1000, 9)]])
    monkeypatch.setattr(peak.time, "process_time", lambda: next(ticks))
    assert peak.measure(torch.float32, 8) == 2 * 8**3 * threads / 2.0


@pytest.mark.parametrize(
    ("name", "tera"),
    [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA L40S", 362),
     ("Tesla T4", 65), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A10G", 70)],
)  # fmt: skip
def test_known_gpus(name: str, tera: float) -> None:
    assert peak.gpu(name) == tera * 1e12
    assert peak.gpu("Something new") is None


def test_records_go_to_tensorboard(cfg: PretrainConfig, open_run: Any) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = open_run()
    pretrain.main(replace(cfg, tensorboard=True, eval_every=10), run)
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    records = read_metrics(run.path / "metrics.jsonl")
    for name in ("loss", "heldout_loss", "learning_rate", "gradient_norm", "mfu"):
        written = [(event.step, event.value) for event in events.Scalars(name)]
        known = [(r["step"], pytest.approx(r[name], rel=1e-6)) for r in records if name in r]
        assert written == known


def test_without_the_package_the_extra_is_named(
    cfg: PretrainConfig, open_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"install endside\[track\]"):
        pretrain.main(replace(cfg, tensorboard=True), open_run())
