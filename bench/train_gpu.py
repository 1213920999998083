"""How fast is a training step on a GPU: tokens/s and MFU of the 0.5B shape at 4K and 32K.

Model, next-token loss, gradient clipping and fused AdamW, bf16 autocast, 32,768 tokens a step, one
document a row; dense, and InfLLM v2 where it hides more than half of the tokens (asserted: at 4K
with a small budget, at 32K as released). Nothing but torch, triton and numpy is imported.

MFU: operations of the model (`flops.training_flops`: 6 a weight and token, and causal attention
over what is visible) a second, over what the maker states for 16-bit products, else over a large
product measured here. Operations done again (activation checkpointing) do not count; it is
switched on only where the device's memory asks for it, and the row says so. Dense and sparse run
in turn.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from endside.data.loader import TokenBatch
from endside.model.config import ModelConfig
from endside.model.flops import training_flops
from endside.model.presets import preset
from endside.model.transformer import Transformer
from endside.ops.infllm import attend_stats
from endside.ops.infllm.config import SparseConfig
from endside.train.losses import LossConfig, next_token
from endside.train.optim import OptimConfig, make_optimizer
from endside.train.peak import gpu

TOKENS = 32768  # of a step
AIM = 0.45  # MFU at 4K, dense
BUDGETS = {
    4096: SparseConfig(window_size=256, topk=8, dense_len=-1),
    32768: SparseConfig(dense_len=-1),
}


@dataclass
class Trainer:
    """A model that can be trained one step at a time."""

    name: str
    config: ModelConfig
    length: int
    tokens: int = TOKENS
    device: str = "cuda"
    recompute: bool = False
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = Transformer(self.config).to(self.device)
        draw = torch.Generator(self.device).manual_seed(0)
        self.model.init_weights(draw)
        self.optimizer = make_optimizer(self.model, OptimConfig(learning_rate=1e-3))
        size = (max(1, self.tokens // self.length), self.length + 1)
        tokens = torch.randint(self.config.vocab_size, size, generator=draw, device=self.device)
        self.batch = TokenBatch(tokens, torch.zeros_like(tokens))
        self.loss_fn = next_token(LossConfig())

    def step(self) -> float:
        """One optimiser step, timed to its end; its loss."""
        for layer in self.model.layers:
            layer.recompute = self.recompute
        begun = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device, torch.bfloat16):
            loss = self.loss_fn(self.model, self.batch)
        (loss.total / loss.targets).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        value = loss.loss.item()
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - begun)
        return value

    def warm(self) -> None:
        """Two untimed steps; with activations computed again where memory does not suffice."""
        try:
            self.step()
        except torch.OutOfMemoryError:
            self.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            self.recompute = True
            self.step()
        self.step()
        self.seconds.clear()

    def record(self, peak: float) -> dict[str, Any]:
        """What the timed steps come to; peak: operations a second."""
        rows = self.batch.tokens.shape[0]
        speed = [rows * self.length / one for one in self.seconds]
        operations = training_flops(self.config, self.length)
        middle = statistics.median(speed)
        return {
            "name": self.name, "length": self.length, "rows": rows, "recompute": self.recompute,
            "tokens_per_s": [min(speed), middle, max(speed)], "mfu": middle * operations / peak,
            "operations_per_token": operations,
        }  # fmt: skip


def contenders(
    shape: ModelConfig, length: int, sparse: SparseConfig, **where: Any
) -> list[Trainer]:
    """Dense and sparse at one length; AssertionError where sparsity would not act."""
    seen = attend_stats(length, length, sparse)
    assert seen.ratio < 0.5, f"sparsity does not act at {length}: {seen}"
    shape = replace(shape, max_position_embeddings=max(length, shape.max_position_embeddings))
    return [
        Trainer("dense", replace(shape, sparse=None), length, **where),
        Trainer("sparse", replace(shape, sparse=sparse), length, **where),
    ]


def compare(trainers: list[Trainer], rounds: int, peak: float) -> list[dict[str, Any]]:
    """All of one length, in turn."""
    for one in trainers:
        one.warm()
    for _ in range(rounds):
        for one in trainers:
            one.step()
    found = [one.record(peak) for one in trainers]
    for one, trainer in zip(found, trainers, strict=True):
        if trainer.config.sparse is not None:
            stats = attend_stats(trainer.length, trainer.length, trainer.config.sparse)
            one["visible_over_available"] = stats.ratio
    return found


def line(row: dict[str, Any]) -> str:
    """A printed row."""
    low, middle, high = row["tokens_per_s"]
    seen = row.get("visible_over_available")
    notes = ("" if seen is None else f"  visible {seen:.2f}") + "  recomputed" * row["recompute"]
    return (
        f"  0.5B {row['name']:<7}{row['length']:>6} x {row['rows']:<2} {middle:>9.0f} tokens/s "
        f"({low:.0f} .. {high:.0f})  MFU {row['mfu']:.1%}{notes}"
    )


def measure(deadline: float, rounds: int = 5) -> dict[str, Any]:
    """Every length, while time is left before `deadline` (time.monotonic)."""
    from bench.attend_gpu import matrix_peak

    name = torch.cuda.get_device_name(0)
    measured = matrix_peak() * 1e12
    peak = gpu(name) or measured
    print(
        f"\ntraining step, peak {peak / 1e12:.0f} TFLOP/s (a product here: {measured / 1e12:.0f})"
    )
    rows = []
    for length, sparse in BUDGETS.items():
        if time.monotonic() > deadline:
            print(f"  {length}: left out, the time is up")
            continue
        trainers = contenders(preset("minicpm4-0.5b"), length, sparse)
        rows += compare(trainers, rounds, peak)
        for row in rows[-len(trainers) :]:
            print(line(row), flush=True)
        del trainers
        torch.cuda.empty_cache()
    at_4k = [row["mfu"] for row in rows if (row["name"], row["length"]) == ("dense", 4096)]
    if at_4k:
        print(f"  aim at 4K: {AIM:.0%} MFU, {'reached' if at_4k[0] >= AIM else 'missed'}")
    return {"peak": peak, "measured_peak": measured, "aim": AIM, "rows": rows}
