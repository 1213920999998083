"""Pre-training: token shards and a model shape in, a trained model out.

    endside pretrain runs/tiny.toml steps=400 optim.learning_rate=0.02
    endside pretrain runs/tiny.toml run=runs/annealed decay_from=runs/tiny/checkpoints/step_300

A configuration is one screen of TOML. `[model]` takes the fields of ModelConfig, or `preset` and
the fields that differ from it. The first start fixes the resolved configuration in the run folder;
the same command again resumes. `attention = "sparse"` is the whole switch to InfLLM v2
(`[model.sparse]` holds its sizes, and there are no new weights). `decay_from` anneals a stable
checkpoint of another run over `schedule.decay` steps; `init_from` begins a new stage with the
weights of one, for example the long stage of `runs/long.toml`. Both leave that run alone.

Same seed, data and threads: same losses, bit for bit on a CPU.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from endside import config as configuration
from endside.data.loader import LoaderConfig, Source
from endside.data.pack import Packed
from endside.data.prefetch import Prefetch
from endside.data.source import DataConfig, heldout_windows, make_reader, open_sources
from endside.errors import UserError
from endside.model.block import Block
from endside.model.config import ModelConfig
from endside.model.presets import preset
from endside.model.transformer import Transformer
from endside.train import ema, parallel, spikes
from endside.train import schedule as wsd
from endside.train.loop import Evaluate, check_counts, loop
from endside.train.losses import LossConfig, next_token
from endside.train.optim import OptimConfig
from endside.train.parallel import ALONE, ParallelConfig, Team
from endside.train.precision import Precision
from endside.train.run_folder import RunFolder, read_checkpoint
from endside.train.schedule import ScheduleConfig
from endside.train.sparsity import visible_logged
from endside.train.spikes import SpikeConfig
from endside.train.start import start_from

Export = Callable[[Transformer, Path], None]


@dataclass(frozen=True)
class PretrainConfig:
    """A pre-training run."""

    model: ModelConfig
    data: DataConfig
    steps: int  # optimiser steps of the whole run
    run: str = ""  # run folder; empty: the configuration's path without its suffix
    batch: int = 8  # rows, of all processes together
    accumulate: int = 1  # batches per step
    seq_len: int = 256  # tokens a row predicts
    seed: int = 0  # of the weights and of the reading order
    attention: Literal["dense", "sparse"] = "dense"
    precision: Precision = "float32"
    checkpoint_activations: bool = False  # keep a block's input alone, compute the rest again
    ema: float = 0.0  # decay of a running average of the weights; 0: none is kept
    export: Literal["last", "ema"] = "last"  # which weights become the model
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int | None = None  # of the CPU; None: what PyTorch takes, then fixed for the run
    eval_every: int = 0  # steps; 0: only at the end
    eval_rows: int = 64  # windows of the held-out split that are looked at
    checkpoint_every: int = 0  # steps; 0: by time only
    checkpoint_seconds: float = 60.0  # 0: by steps only
    tensorboard: bool = False  # also write the records for TensorBoard, into the run folder
    decay_from: str = ""  # checkpoint of a stable run to anneal
    init_from: str = ""  # checkpoint of a run, or a model folder, to take the first weights from
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    spikes: SpikeConfig = field(default_factory=SpikeConfig)

    def __post_init__(self) -> None:
        check_counts(self)
        if self.seq_len > self.model.max_position_embeddings:
            raise UserError(
                f"seq_len {self.seq_len} is longer than model.max_position_embeddings "
                f"{self.model.max_position_embeddings}: shorten one or raise the other"
            )
        if self.attention == "sparse" and self.model.sparse is None:
            raise UserError(
                'attention is "sparse" but the model has no [model.sparse]: add its sizes'
            )
        self._check_averages_and_starts()
        if not self.decay_from:
            wsd.check(self.steps, self.schedule)
        elif not self.schedule.decay:
            raise UserError(
                "decay_from needs schedule.decay: give the number of steps to anneal over"
            )

    def _check_averages_and_starts(self) -> None:
        ema.check(self.ema, self.export)
        spikes.check(self.spikes, self.checkpoint_every, self.checkpoint_seconds)
        if self.decay_from and self.init_from:
            raise UserError("decay_from continues a run and init_from begins one: give one of them")
        if self.precision == "fp8" and self.parallel.tensor > 1:
            raise UserError("precision fp8 multiplies whole matrices: use parallel.tensor = 1")


Config = TypeVar("Config", bound=PretrainConfig)
Model = TypeVar("Model", bound=nn.Module)


def from_file(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    decay_from: Path | None = None,
    export: Export | None = None,
) -> Path:
    """Run, or resume, the pre-training that a TOML file describes; returns its run folder."""
    extra = [f"decay_from={decay_from}"] if decay_from else []
    cfg = read_config(path, [*overrides, *extra])
    folder = Path(cfg.run) if cfg.run else Path(path).with_suffix("")
    with RunFolder(folder) as run:
        main(cfg, run, export=export)
    return folder


def read_config(
    path: str | Path, overrides: Sequence[str] = (), kind: type[Config] = PretrainConfig
) -> Config:
    """A configuration from TOML and overrides, with `model.preset` filled in."""
    data = configuration.override(configuration.read(path), overrides)
    if isinstance(data.get("model"), dict):
        data["model"] = model_table(data["model"])
    return configuration.build(kind, data, source=str(path))


def model_table(model: dict[str, Any]) -> dict[str, Any]:
    """`[model]` with its preset, where it names one, filled in."""
    if "preset" not in model:
        return model
    over = {key: value for key, value in model.items() if key != "preset"}
    return _merge(dataclasses.asdict(preset(model["preset"])), over)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    nested = {
        key: _merge(base[key], value)
        for key, value in over.items()
        if isinstance(value, dict) and isinstance(base.get(key), dict)
    }
    return {**base, **over, **nested}


def main(
    cfg: Config,
    run: RunFolder,
    *,
    make: Callable[[Config], Transformer] | None = None,
    export: Export | None = None,
) -> Transformer:
    """Train from the run's newest checkpoint to `cfg.steps`; returns the model.

    make(cfg) gives the model before its first step (`make_model`). export(model, folder) writes the
    result, to `<run>/model`, in whatever layout the caller wants.
    """
    make = make or make_model
    with parallel.team(cfg.parallel, cfg.device) as team:
        cfg = team.agree(lambda: resolve(cfg, run))
        data = team.first(lambda: open_sources(cfg.data, cfg.model.vocab_size, run.progress))
        team.agree(lambda: run.fix(cfg, free=("run", "export", "tensorboard", "parallel")))
        with deterministic(cfg):
            model = team.spread(make(cfg), cfg.precision)
            reader = make_reader(data, cfg.data.bands, _loader(cfg, team), team.data)
            measure = heldout(data, cfg, team)
            loss_fn = visible_logged(next_token(cfg.loss), shape(cfg).sparse)
            with Prefetch(reader) as batches:
                loop(model, batches, loss_fn, cfg, run, evaluate=measure, team=team)
        model = whole_model(model, lambda: make(cfg), team)
    if cfg.export == "ema" and run.main:
        ema.put(model, run.latest().tensors("ema"))
    model.eval()
    if export is not None and run.main:
        export(model, run.path / "model")
    return model


def whole_model(model: Model, make: Callable[[], Model], team: Team) -> Model:
    """The trained model as one process uses it, in the main process; elsewhere as it is."""
    if team.alone:
        return model
    tensors = team.gather(model.state_dict())
    if not team.main:
        return model
    plain = make()
    plain.load_state_dict(tensors)
    return plain


def resolve(cfg: Config, run: RunFolder) -> Config:
    """`cfg` with what only the start of a run decides: threads, and the steps of a branch."""
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise UserError('device is "cuda" but PyTorch finds no CUDA device: use device = "cpu"')
    before = run.stored(type(cfg))
    if cfg.threads is None:
        threads = before.threads if before else torch.get_num_threads()
        cfg = dataclasses.replace(cfg, threads=threads)
    return _branch(cfg, run, before) if cfg.decay_from else cfg


def _branch(cfg: Config, run: RunFolder, before: Config | None) -> Config:
    if before is not None and any((run.path / "checkpoints").glob("step_*")):
        return dataclasses.replace(cfg, steps=before.steps)
    origin = read_checkpoint(Path(cfg.decay_from))
    if origin.state["phase"] != "stable":
        raise UserError(
            f"{cfg.decay_from} was written in the {origin.state['phase']} phase: choose a "
            "checkpoint of the stable one"
        )
    run.branch(origin)
    return dataclasses.replace(cfg, steps=origin.step + cfg.schedule.decay)


def make_model(cfg: PretrainConfig) -> Transformer:
    """The model with the weights of `cfg.init_from`, or muP ones drawn from `cfg.seed`."""
    return begin(Transformer(shape(cfg)), cfg)


def begin(model: Transformer, cfg: PretrainConfig) -> Transformer:
    """`model` as its first step finds it: weights, what it keeps for the backward pass, device."""
    if cfg.init_from:
        start_from(model, cfg.init_from)
    else:
        model.init_weights(torch.Generator().manual_seed(cfg.seed))
    for module in model.modules():
        if isinstance(module, Block):
            module.recompute = cfg.checkpoint_activations
    return model.to(cfg.device)


def shape(cfg: PretrainConfig) -> ModelConfig:
    """The model's shape, dense unless sparse attention is asked for."""
    return cfg.model if cfg.attention == "sparse" else dataclasses.replace(cfg.model, sparse=None)


def _loader(cfg: PretrainConfig, team: Team = ALONE) -> LoaderConfig:
    return LoaderConfig(team.rows(cfg.batch), cfg.seq_len, cfg.seed)


def heldout(data: Packed | Sequence[Source], cfg: PretrainConfig, team: Team = ALONE) -> Evaluate:
    """evaluate(model) -> {"heldout_loss"}: nats per token over windows spread over unseen text."""
    windows = heldout_windows(data, cfg.seq_len)
    looked_at = min(cfg.eval_rows, len(windows))
    rows = [number * len(windows) // looked_at for number in range(looked_at)]
    groups = [rows[start : start + cfg.batch] for start in range(0, len(rows), cfg.batch)]
    each, rank = team.rows(cfg.batch), team.data.rank
    shares = [group[rank * each : (rank + 1) * each] for group in groups]
    loss_fn = next_token(dataclasses.replace(cfg.loss, mtp_weight=0.0, z_weight=0.0))

    @torch.no_grad()
    def evaluate(model: nn.Module) -> dict[str, float]:
        model.eval()
        device = next(model.parameters()).device
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        for share in shares:
            # A process without a row still takes part: the others may need its shard of weights.
            loss = loss_fn(model, windows.stack(share or rows[:1]).to(device))
            if share:
                sums += torch.stack((loss.total.double(), loss.targets.double()))
        model.train()
        total, targets = team.sum(sums).tolist()
        return {"heldout_loss": total / targets}

    return evaluate


@contextmanager
def deterministic(cfg: PretrainConfig) -> Iterator[None]:
    """A fixed number of threads, and on the CPU only operations whose result never varies."""
    threads = torch.get_num_threads()
    strict = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.set_num_threads(cfg.threads or threads)
    torch.manual_seed(cfg.seed)
    random.seed(cfg.seed)
    torch.use_deterministic_algorithms(strict or cfg.device == "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(strict)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def measure_speed(
    cfg: Config, *, make: Callable[[Config], Transformer] | None = None, seconds: float = 3.0
) -> float:
    """Tokens per second of training steps on this machine, without a run folder.

    Two steps warm up; at least two are timed. Nothing is kept.
    """
    from endside.train.optim import make_optimizer

    data = open_sources(cfg.data, cfg.model.vocab_size)
    with deterministic(cfg):
        model = (make or make_model)(cfg)
        batches = make_reader(data, cfg.data.bands, _loader(cfg))
        optimizer = make_optimizer(model, cfg.optim)
        loss_fn = next_token(cfg.loss)
        timed, begun = -2, time.monotonic()
        while timed < 2 or time.monotonic() - begun < seconds:
            if timed == 0:
                begun = time.monotonic()
            optimizer.zero_grad(set_to_none=True)
            loss_fn(model, next(batches).to(cfg.device)).total.backward()
            optimizer.step()
            timed += 1
        return timed * cfg.batch * cfg.seq_len / (time.monotonic() - begun)
