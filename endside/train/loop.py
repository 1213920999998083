"""The only training loop: batches in, checkpoints and metrics out.

    for step in start + 1 .. steps:
        gradient of sum(losses) over `accumulate` batches, divided by the number of targets
        stop, or rewind, where loss or norm is no number or a spike (`spikes.py`)
        clip; AdamW with the schedule's share; move the average of the weights (`ema.py`)
        write the record; evaluate; write a checkpoint

Pre-training, fine-tuning and quantization-aware training differ in the three arguments `batches`,
`loss_fn` and `evaluate`. Everything that influences a later step (parameters, moments, reader
position, random states, recent losses) is in the checkpoint and nothing else is, so a run that was
killed ends as one that was not: bit for bit on a CPU with the same number of threads. Loss and norm
are read back every step, because the check for NaN must come before the step spoils the weights.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from endside import dist
from endside.data.loader import TokenBatch
from endside.errors import UserError
from endside.ops.passes import denormals_as_zero
from endside.train.ema import Averages
from endside.train.losses import LossFn
from endside.train.optim import (
    OptimConfig,
    load_state_tensors,
    make_optimizer,
    set_share,
    state_tensors,
)
from endside.train.pages import keep_pages
from endside.train.parallel import ALONE, Team, local, placed
from endside.train.precision import Precision, Products
from endside.train.run_folder import RunFolder, Saved
from endside.train.schedule import ScheduleConfig, phase, share
from endside.train.spikes import SpikeConfig, Spikes
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
    precision: Precision  # of the products; weights and moments stay float32
    ema: float  # decay of the running average of the weights; 0: none is kept
    schedule: ScheduleConfig
    optim: OptimConfig
    spikes: SpikeConfig


def check_counts(cfg: Any) -> None:
    """The counts of every stage's configuration; UserError names the one that is too small."""
    for name in ("steps", "batch", "accumulate", "seq_len", "eval_rows"):
        if getattr(cfg, name) < 1:
            raise UserError(f"{name} is {getattr(cfg, name)}: it must be at least 1")
    if min(cfg.eval_every, cfg.checkpoint_every, cfg.checkpoint_seconds) < 0:
        raise UserError("eval_every, checkpoint_every and checkpoint_seconds must be at least 0")


@dataclass(frozen=True)
class _Step:
    """What one optimiser step gave."""

    loss: float
    gradient_norm: float
    targets: int
    shape: list[int]  # rows of all its batches, positions of a row
    parts: dict[str, float]


@dataclass(frozen=True)
class _Training:
    """All that changes from step to step and is saved, and the processes that share it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batches: Batches
    averages: Averages | None
    spikes: Spikes
    team: Team


@denormals_as_zero()
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
    if team.alone and dist.world().size > 1:
        raise UserError("this stage trains in one process: start it without torchrun")
    keep_pages()
    averages = Averages(model, cfg.ema) if cfg.ema else None
    optimizer = make_optimizer(model, cfg.optim)
    training = _Training(model, optimizer, batches, averages, Spikes(cfg.spikes), team)
    step, tokens = _resume(training, run)
    run.begin(step)
    clock = Watch(cfg, run, step, model, processes=team.world.size)
    products = Products(model, cfg.precision, note=run.progress.note)
    model.train()
    while step < cfg.steps:
        step += 1
        rate = share(step, cfg.steps, cfg.schedule)
        set_share(optimizer, rate)
        done = _optimise(training, products, loss_fn, cfg)
        trouble = training.spikes.look(done.loss, done.gradient_norm, done.parts)
        if trouble:
            step, tokens = _rewind(training, run, step=step, trouble=trouble)
            continue
        optimizer.step()
        if averages is not None:
            averages.update(model)
        tokens += done.targets
        record = {
            "loss": done.loss, "learning_rate": cfg.optim.learning_rate * rate,
            "gradient_norm": done.gradient_norm, "tokens": tokens, **done.parts,
        }  # fmt: skip
        clock.tick(step, record, targets=done.targets, shape=done.shape)
        last = step == cfg.steps
        if evaluate and (last or (cfg.eval_every and step % cfg.eval_every == 0)):
            with products.exact():
                clock.evaluated(step, _evaluate(training, evaluate))
        # The main process's clock decides for all.
        if last or team.agree(partial(clock.checkpoint_due, step)):
            state = {"tokens": tokens, "phase": phase(step, cfg.steps, cfg.schedule)}
            _save(training, run, step=step, state=state)
            clock.saved()
    products.remove()
    clock.close()


def _evaluate(training: _Training, evaluate: Evaluate) -> dict[str, float]:
    """The numbers of `evaluate`, and with an average of the weights also its, as ema_..."""
    model, averages = training.model, training.averages
    values = evaluate(model)
    training.team.settle(model)
    if averages is not None:
        with averages.in_place(model):
            values = {**values, **{f"ema_{k}": v for k, v in evaluate(model).items()}}
            training.team.settle(model)
    return values


def _resume(training: _Training, run: RunFolder) -> tuple[int, int]:
    """Put the newest checkpoint into everything; its step and tokens, or zeros without one."""
    saved = training.team.agree(run.latest)
    if saved is None:
        return 0, 0
    _load(training, saved)
    batches, state = training.batches, saved.state
    if saved.foreign and not batches.fits(state["data"]):
        run.progress.note(
            f"{saved.folder} read other data: this branch starts its own from the beginning"
        )
    else:
        batches.restore(state["data"])
    verb = "branching from" if saved.foreign else "resuming from"
    run.progress.note(f"{verb} {saved.folder}")
    return saved.step, state["tokens"]


def _load(training: _Training, saved: Saved) -> None:
    """Put everything but the reader's position where the checkpoint has it."""
    load_model(training.model, saved)
    load_state_tensors(training.optimizer, saved.tensors("optimizer"))
    if training.averages is not None:
        training.averages.load(saved.tensors("ema") if saved.has("ema") else training.model)
    training.spikes.restore(saved.state.get("spikes", {}))
    _restore_random(saved)


def _rewind(training: _Training, run: RunFolder, *, step: int, trouble: str) -> tuple[int, int]:
    """Back to the newest checkpoint, while the reader stays behind what led to the trouble.

    The batches read since that checkpoint are thereby skipped. A run that dies before its next
    checkpoint comes the same way again: same batches, same trouble, same rewind.
    """
    training.spikes.count_rewind(trouble, step, run.path)
    saved = training.team.agree(run.latest)
    if saved is None or saved.foreign:
        raise UserError(
            f"{trouble} at step {step} of {run.path}, and there is no checkpoint yet to rewind to: "
            "lower optim.learning_rate, lengthen schedule.warmup or lower checkpoint_every"
        )
    rewinds = training.spikes.rewinds
    _load(training, saved)
    training.spikes.rewinds = rewinds
    run.progress.note(
        f"{trouble} at step {step}: rewound to step {saved.step} (rewind {rewinds} of at most "
        f"{training.spikes.config.max_rewinds}), skipping the batches read since"
    )
    run.begin(saved.step)
    run.metrics.append(saved.step + 1, {"rewound_from": step, "because": trouble})
    return saved.step, saved.state["tokens"]


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


def _optimise(training: _Training, products: Products, loss_fn: LossFn, cfg: LoopConfig) -> _Step:
    """Leave the clipped mean gradient of `cfg.accumulate` batches in the parameters."""
    model, team = training.model, training.team
    device = next(model.parameters()).device
    training.optimizer.zero_grad(set_to_none=True)
    losses = []
    for _ in range(cfg.accumulate):
        with products.forward():
            batch = next(training.batches).to(device)
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


def _save(training: _Training, run: RunFolder, *, step: int, state: dict[str, Any]) -> None:
    version, words, gauss = random.getstate()
    team = training.team
    parts = {"model": training.model.state_dict(), "optimizer": state_tensors(training.optimizer)}
    if training.averages is not None:
        parts["ema"] = training.averages.tensors()
    split = parts if team.splits_checkpoints else {}
    whole = {name: team.gather(parts[name]) for name in parts if name not in split}
    if not team.main:
        if split:
            team.write(split, None)
        return
    state = {
        **state, "data": training.batches.state(), "spikes": training.spikes.state(),
        "python_random": [version, gauss],
    }  # fmt: skip
    rng = {"torch": torch.get_rng_state(), "python": torch.tensor(words), **_cuda_random()}
    fill = partial(team.write, split) if split else None
    run.save(step, {**whole, "rng": rng}, state, fill=fill)


def _cuda_random() -> dict[str, torch.Tensor]:
    return {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {}


def _restore_random(saved: Saved) -> None:
    states = saved.tensors("rng")
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    version, gauss = saved.state["python_random"]
    random.setstate((version, tuple(states["python"].tolist()), gauss))
