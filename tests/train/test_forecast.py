"""The forecast of memory and time against what tensors, processes and steps really take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from endside.data.loader import TokenBatch
from endside.errors import UserError
from endside.model.block import Block
from endside.model.config import ModelConfig
from endside.model.presets import preset
from endside.model.transformer import Transformer
from endside.train import forecast
from endside.train.forecast import Device, Work
from endside.train.losses import LossConfig, next_token
from endside.train.optim import OptimConfig, make_optimizer, state_tensors
from endside.train.parallel import ParallelConfig
from endside.verbs import plan

ROOT = Path(__file__).resolve().parents[2]
SHAPE = replace(preset("demo"), hidden_size=320, num_attention_heads=6, vocab_size=512)
H100 = Device(1, **plan.ASSUMED)


def kept_bytes(config: ModelConfig, *, bf16: bool, recompute: bool) -> float:
    """Bytes that autograd holds after a forward pass, weights not counted."""
    model = Transformer(config)
    model.init_weights(torch.Generator().manual_seed(0))
    for module in model.modules():
        if isinstance(module, Block):
            module.recompute = recompute
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens = torch.randint(0, config.vocab_size, (2, 129))
    batch = TokenBatch(tokens, torch.zeros_like(tokens))
    products = torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), products:
        next_token(LossConfig())(model, batch)
    return sum(t.untyped_storage().nbytes() for pointer, t in held.items() if pointer not in own)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_activations_are_those_autograd_keeps(bf16: bool, recompute: bool) -> None:
    work = Work(SHAPE, batch=2, seq_len=128, bf16=bf16, recompute=recompute)
    taken = forecast.memory(work, 1)
    # The logits are gone and the head's gradient is there; a recomputed block is not open yet, and
    # the copies of its weights are made again and again.
    expected = taken.activations + 4 * SHAPE.vocab_size * SHAPE.hidden_size
    if recompute:
        expected -= 256 * forecast._block_bytes(work, 1)
    else:
        expected += taken.copies
    measured = kept_bytes(SHAPE, bf16=bf16, recompute=recompute)
    assert expected == pytest.approx(measured, rel=0.12 if recompute else 0.05)


def test_weights_and_moments_are_those_of_the_optimizer() -> None:
    model = Transformer(SHAPE)
    model.init_weights(torch.Generator().manual_seed(0))
    optimizer = make_optimizer(model, OptimConfig())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    taken = forecast.memory(Work(SHAPE, 2, 128), 1)
    weights = sum(p.numel() * 4 for p in model.parameters())
    moments = sum(t.numel() * 4 for n, t in state_tensors(optimizer).items() if "exp_avg" in n)
    assert (taken.weights, taken.gradients, taken.moments) == (weights, weights, moments)


def test_devices_share_what_they_split() -> None:
    model = preset("minicpm4-8b")
    one = forecast.memory(Work(model, 8, 4096, bf16=True), 1)
    split = Work(model, 8, 4096, bf16=True, parallel=ParallelConfig("fsdp"))
    eight = forecast.memory(split, 8)
    assert eight.weights * 8 == pytest.approx(one.weights)
    assert eight.activations * 8 == pytest.approx(one.activations)
    halved = forecast.memory(replace(split, parallel=ParallelConfig("replicate", tensor=2)), 2)
    blocks = one.weights - 8 * 73448 * 4096  # embedding and head stay whole
    assert halved.weights == pytest.approx(one.weights - blocks / 2, rel=1e-3)
    assert one.activations / 2 < halved.activations < one.activations
    link = replace(H100, count=8)
    assert forecast.time(split, link).exposed == 0 < forecast.time(split, link).hidden
    tensor = replace(split, parallel=ParallelConfig("fsdp", tensor=2))
    assert forecast.time(tensor, link).exposed > 0


@pytest.mark.parametrize("name", ["minicpm4-0.5b", "minicpm4-8b"])
def test_a_remedy_is_just_enough(name: str) -> None:
    work = Work(preset(name), 32, 4096, bf16=True)
    assert not forecast.fits(work, H100)
    changes, changed, device = forecast.remedy(work, H100)
    assert forecast.fits(changed, device)
    assert changed.batch * changed.accumulate * changed.seq_len == 32 * 4096
    before = list(forecast._steps(work, H100))[: len(changes) - 1]
    assert not any(forecast.fits(smaller, with_) for _, smaller, with_ in before)


def test_recomputing_trades_time_for_memory() -> None:
    work = Work(preset("minicpm4-8b"), 8, 4096, bf16=True)
    again = replace(work, recompute=True)
    assert forecast.memory(again, 1).activations < forecast.memory(work, 1).activations / 5
    assert forecast.time(again, H100).products == pytest.approx(
        forecast.time(work, H100).products * 4 / 3
    )


def test_forecast_against_a_measured_run() -> None:
    """The small case of bench/plan_check.py, whose factors are asserted here."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "bench/plan_check.py", "--case", "small", "--steps", "4", "--json", "-"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    case = json.loads(result.stdout[result.stdout.index("{") :])["cases"]["small"]
    predicted, measured = case["predicted"], case["measured"]
    assert 1 / 1.5 < predicted["bytes"] / measured["bytes"] < 1.5
    assert 1 / 2.5 < predicted["tokens_per_s"] / measured["tokens_per_s"] < 2.5


def test_the_verb_reports(capsys: pytest.CaptureFixture) -> None:
    plan.main(["minicpm4-8b", "--devices", "8", "parallel.shard=fsdp", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["fits"] and report["remedy"] is None
    assert report["bytes"]["peak"] < 80e9
    plan.main(["minicpm4-8b", "--device-memory", "24", "--tflops", "100"])
    text = capsys.readouterr().out
    assert "It does not fit. These changes together make it fit" in text
    assert "assumed of an H100: memory_rate, link_rate" in text


def test_the_verb_reads_a_run(capsys: pytest.CaptureFixture) -> None:
    plan.main([str(ROOT / "runs" / "tiny.toml")])
    text = capsys.readouterr().out
    assert "measured here" in text and "It fits." in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["minicpm4-8b", "--devices", "0"], "at least one device"),
        (["minicpm4-8b", "--devices", "3", "batch=9", "parallel.tensor=2"], "2 does not divide"),
        (["minicpm4-8b", "--devices", "4", "parallel.tensor=4"], "num_key_value_heads 2"),
        (["minicpm4-8b", "--devices", "3"], "batch 8 cannot be split evenly"),
        (["minicpm4-8b", "--tflops", "0"], "must be above 0"),
        (["minicpm4-8b", "bach=3"], "did you mean batch"),
        (["no-such.toml"], "no configuration file"),
    ],
)
def test_the_verb_refuses(argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan.main(argv)
