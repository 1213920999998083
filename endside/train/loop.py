"""The only training loop: batches in, checkpoints and metrics out.

    for step in start + 1 .. steps:
        gradient of sum(losses) over `accumulate` batches, divided by the number of targets
        stop if loss or norm is not finite; clip; AdamW with the schedule's share
        write the record; evaluate; write a checkpoint

Pre-training, fine-tuning and quantization-aware training differ in the three arguments `batches`,
`loss_fn` and `evaluate`. Everything that influences a later step (parameters, moments, reader
position, random states) is in the checkpoint and nothing else is, so a run that was killed ends as
one that was not: bit for bit on a CPU with the same number of threads. Loss and norm are read back
every step, because the check for NaN must come before the step spoils the weights.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import nn

from endside.data.loader import TokenBatch
from endside.errors import UserError
from endside.train.losses import LossFn
from endside.train.optim import (
    OptimConfig,
    load_state_tensors,
    make_optimizer,
    set_share,
    state_tensors,
)
from endside.train.parallel import ALONE, Team, local, placed
from endside.train.run_folder import RunFolder, Saved
from endside.train.schedule import ScheduleConfig, phase, share
from endside.train.watch import Watch

Evaluate = Callable[[nn.Module], dict[str, float]]


class Batches(Protocol):
    """An endless source of batches whose position can be saved."""

    def __next__(self) -> TokenBatch: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: dict[str, Any]) -> None: ...
    def fits(self, state: dict[str, Any]) -> bool: ...


class LoopConfig(Protocol):
    """What the loop reads of a stage's configuration."""

    steps: int  # optimiser steps of the whole run
    accumulate: int  # batches per step
    eval_every: int  # steps; 0: only at the end
    checkpoint_every: int  # steps; 0: by time only
    checkpoint_seconds: float  # 0: by steps only
    tensorboard: bool  # whether records go there too
    precision: Literal["float32", "bfloat16"]  # of the products; weights and moments stay float32
    schedule: ScheduleConfig
    optim: OptimConfig


@dataclass(frozen=True)
class _Step:
    """What one optimiser step gave."""

    loss: float
    gradient_norm: float
    targets: int
    shape: list[int]  # rows of all its batches, positions of a row
    parts: dict[str, float]


def loop(
    model: nn.Module,
    batches: Batches,
    loss_fn: LossFn,
    cfg: LoopConfig,
    run: RunFolder,
    *,
    evaluate: Evaluate | None = None,
    team: Team = ALONE,
) -> None:
    """Train `model` up to `cfg.steps`, from the run's newest checkpoint where it has one.

    team: the processes that share the work; `model` is spread over it, `batches` gives this
    process's rows.

    evaluate(model) -> numbers to log, every `cfg.eval_every` steps and after the last one. Raises
    UserError when the loss stops being a number; the last checkpoint is then still good.
    """
    optimizer = make_optimizer(model, cfg.optim)
    start, tokens = _resume(model, optimizer, batches, run, team)
    run.begin(start)
    clock = Watch(cfg, run, start, model, processes=team.world.size)
    model.train()
    for step in range(start + 1, cfg.steps + 1):
        rate = share(step, cfg.steps, cfg.schedule)
        set_share(optimizer, rate)
        done = _optimise(model, optimizer, batches, loss_fn, cfg=cfg, team=team)
        _check_finite(done, step, run)
        optimizer.step()
        tokens += done.targets
        record = {
            "loss": done.loss, "learning_rate": cfg.optim.learning_rate * rate,
            "gradient_norm": done.gradient_norm, "tokens": tokens, **done.parts,
        }  # fmt: skip
        clock.tick(step, record, targets=done.targets, shape=done.shape)
        last = step == cfg.steps
        if evaluate and (last or (cfg.eval_every and step % cfg.eval_every == 0)):
            with _products(cfg, next(model.parameters()).device):
                clock.evaluated(step, evaluate(model))
            team.settle(model)
        # The main process's clock decides for all.
        if last or team.agree(partial(clock.checkpoint_due, step)):
            state = {"tokens": tokens, "phase": phase(step, cfg.steps, cfg.schedule)}
            _save(model, optimizer, batches, run, step=step, state=state, team=team)
            clock.saved()
    clock.close()


def _resume(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    run: RunFolder,
    team: Team,
) -> tuple[int, int]:
    """Put the newest checkpoint into everything; its step and tokens, or zeros without one."""
    saved = team.agree(run.latest)
    if saved is None:
        return 0, 0
    load_model(model, saved)
    load_state_tensors(optimizer, saved.tensors("optimizer"))
    state = saved.state
    if saved.foreign and not batches.fits(state["data"]):
        run.progress.note(
            f"{saved.folder} read other data: this branch starts its own from the beginning"
        )
    else:
        batches.restore(state["data"])
    _restore_random(saved)
    verb = "branching from" if saved.foreign else "resuming from"
    run.progress.note(f"{verb} {saved.folder}")
    return saved.step, state["tokens"]


def load_model(model: nn.Module, saved: Saved) -> None:
    """Copy a checkpoint's parameters into `model`; UserError names the first that differs."""
    tensors, own = saved.tensors("model"), model.state_dict()
    for name in sorted(own.keys() | tensors.keys()):
        shapes = [tuple(side[name].shape) if name in side else "absent" for side in (tensors, own)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{saved.folder} is of another model: {name} is {shapes[0]} there and {shapes[1]} "
                "here; use the model configuration it was trained with"
            )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(placed(tensors[name], tensor))


def _optimise(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    loss_fn: LossFn,
    *,
    cfg: LoopConfig,
    team: Team,
) -> _Step:
    """Leave the clipped mean gradient of `cfg.accumulate` batches in the parameters."""
    device = next(model.parameters()).device
    optimizer.zero_grad(set_to_none=True)
    losses = []
    for _ in range(cfg.accumulate):
        with _products(cfg, device):
            batch = next(batches).to(device)
            loss = loss_fn(model, batch)
        loss.total.backward()
        losses.append(loss)
    targets = team.sum(torch.stack([loss.targets for loss in losses]).sum()).clamp(min=1)
    gradients = team.sum_gradients(model)
    norm = team.norm(gradients) / targets
    clip = (cfg.optim.clip / norm).clamp(max=1.0) if cfg.optim.clip else torch.ones_like(norm)
    torch._foreach_mul_([local(gradient) for gradient in gradients], clip / targets)
    weights = [loss.targets / targets for loss in losses]
    values = [{"loss": loss.loss, **loss.parts} for loss in losses]
    sums = [
        sum(w * value[name] for w, value in zip(weights, values, strict=True)) for name in values[0]
    ]
    means = dict(zip(values[0], team.sum(torch.stack(sums)).tolist(), strict=True))
    rows, length = batch.tokens.shape
    shape = [cfg.accumulate * rows * team.data.size, length - 1]
    return _Step(means.pop("loss"), norm.item(), int(targets), shape, means)


def _products(cfg: LoopConfig, device: torch.device) -> Any:
    if cfg.precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def _check_finite(done: _Step, step: int, run: RunFolder) -> None:
    values = {"loss": done.loss, **done.parts, "gradient norm": done.gradient_norm}
    for name, value in values.items():
        if not math.isfinite(value):
            raise UserError(
                f"{name} is {value} at step {step} of {run.path}: training stopped before it could "
                "spoil the weights; lower optim.learning_rate, lengthen schedule.warmup or look at "
                "the data, and start a new run"
            )


def _save(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    run: RunFolder,
    *,
    step: int,
    state: dict[str, Any],
    team: Team,
) -> None:
    version, words, gauss = random.getstate()
    parts = {
        "model": team.gather(model.state_dict()),
        "optimizer": team.gather(state_tensors(optimizer)),
        "rng": {"torch": torch.get_rng_state(), "python": torch.tensor(words), **_cuda_random()},
    }
    if team.main:
        state = {**state, "data": batches.state(), "python_random": [version, gauss]}
        run.save(step, parts, state)


def _cuda_random() -> dict[str, torch.Tensor]:
    return {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {}


def _restore_random(saved: Saved) -> None:
    states = saved.tensors("rng")
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    version, gauss = saved.state["python_random"]
    random.setstate((version, tuple(states["python"].tolist()), gauss))
