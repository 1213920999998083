"""Supervised fine-tuning: conversations and a model in, a chat model out.

    endside sft runs/gsm8k.toml start=runs/demo/model
    endside sft runs/gsm8k.toml lora.rank=16 run=runs/gsm8k-lora

Conversations become ids and a mask through the one chat template code (`data.conversations`), lie
packed in rows without seeing each other (`data.conversation_rows`), and the loop of pre-training
minimises the loss of what the assistant has to write. A row with its mask costs and teaches what
its conversations would one by one.

`start` is a model folder in any layout that is read, the folder of a run, or a checkpoint of
pre-training. The optimizer starts fresh. With `lora.rank` the weights stay and adapters learn. What
comes out is `<run>/model`, a folder that `endside run` chats with: its tokenizer has a template,
its generation_config.json ends answers where the turn ends.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import nn

from endside import chat
from endside import config as configuration
from endside.chatml import CHATML
from endside.checkpoint import Checkpoint, resolve
from endside.data.conversation_rows import ConversationRows, best_fit, stack
from endside.data.conversations import (
    ConversationConfig,
    Example,
    Examples,
    ThoughtConfig,
    gather,
)
from endside.errors import UserError
from endside.formats import hf
from endside.formats.hf_config import Attention
from endside.model.config import ModelConfig
from endside.model.transformer import Transformer
from endside.tokenizer import Tokenizer
from endside.train import ema, lora, parallel, spikes
from endside.train import schedule as wsd
from endside.train.loop import Evaluate, check_counts, loop
from endside.train.lora import LoraConfig
from endside.train.losses import LossConfig, next_token
from endside.train.optim import OptimConfig
from endside.train.parallel import ParallelConfig, Team
from endside.train.precision import Precision
from endside.train.pretrain import deterministic, whole_model
from endside.train.run_folder import STATE, RunFolder, read_checkpoint
from endside.train.schedule import ScheduleConfig
from endside.train.sparsity import visible_logged
from endside.train.spikes import SpikeConfig


@dataclass(frozen=True)
class SftConfig:
    """A fine-tuning run."""

    start: str  # model folder, hub name, run folder, or checkpoint of pre-training
    data: ConversationConfig
    steps: int  # optimiser steps of the whole run
    run: str = ""  # run folder; empty: the configuration's path without its suffix
    tokenizer: str = ""  # folder of the tokenizer; empty: the one of `start`
    template: str = ""  # "chatml": ours; a jinja file; empty: the tokenizer's, else ours
    batch: int = 8  # rows, of all processes together
    accumulate: int = 1  # batches per step
    seq_len: int = 1024  # tokens a row predicts
    seed: int = 0  # of the reading order, the mixture of thoughts and the adapters
    attention: Attention = "auto"
    precision: Precision = "float32"
    checkpoint_activations: bool = False  # keep a block's input alone, compute the rest again
    ema: float = 0.0  # decay of a running average of the weights; 0: none is kept
    export: Literal["last", "ema"] = "last"  # which weights become the model
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int | None = None  # of the CPU; None: what PyTorch takes, then fixed for the run
    eval_every: int = 0  # steps; 0: only at the end
    eval_rows: int = 64  # rows of held-out conversations that are looked at
    checkpoint_every: int = 0  # steps; 0: by time only
    checkpoint_seconds: float = 60.0  # 0: by steps only
    tensorboard: bool = False  # also write the records for TensorBoard, into the run folder
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = (
        "auto"  # of the result; auto: start's
    )
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(warmup=10))
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(learning_rate=0.001))
    loss: LossConfig = field(default_factory=LossConfig)
    thoughts: ThoughtConfig = field(default_factory=ThoughtConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    spikes: SpikeConfig = field(default_factory=SpikeConfig)

    def __post_init__(self) -> None:
        check_counts(self)
        ema.check(self.ema, self.export)
        spikes.check(self.spikes, self.checkpoint_every, self.checkpoint_seconds)
        special = (self.precision == "fp8", self.lora.rank > 0, self.parallel.tensor > 1)
        if sum(special) > 1:
            raise UserError(
                "precision fp8, lora.rank and parallel.tensor each have projections of their own: "
                "use one of them"
            )
        wsd.check(self.steps, self.schedule)


@dataclass(frozen=True)
class Start:
    """A model to begin with, and what its folder says besides."""

    model: Transformer
    base_config: dict[str, Any] | None  # config.json, whose foreign keys are kept
    dtype: str  # what its weights are stored in
    folder: Path | None  # where its tokenizer lies


def from_file(path: Path, overrides: Sequence[str] = ()) -> Path:
    """Run, or resume, the fine-tuning that a TOML file describes; returns its run folder."""
    cfg = configuration.load(path, SftConfig, overrides)
    folder = Path(cfg.run) if cfg.run else Path(path).with_suffix("")
    with RunFolder(folder) as run:
        main(cfg, run)
    return folder


def main(cfg: SftConfig, run: RunFolder) -> Transformer:
    """Train from the run's newest checkpoint to `cfg.steps`, write `<run>/model`; the model."""
    with parallel.team(cfg.parallel, cfg.device) as team:
        cfg = team.agree(lambda: _resolve(cfg, run))
        start = open_start(cfg.start, cfg.attention)
        tokenizer = open_tokenizer(cfg, start)
        _check_fits(cfg, start.model.config, tokenizer)
        with deterministic(cfg):
            longest = cfg.seq_len + 1
            examples = gather(cfg.data, cfg.thoughts, tokenizer, longest=longest, seed=cfg.seed)
            batches = _rows(cfg, examples, start, team)
            _tell(cfg, examples, batches, run)
            team.agree(lambda: run.fix(cfg, free=("run", "export", "tensorboard", "parallel")))
            model = team.spread(prepare(cfg, start), cfg.precision)
            measure = heldout(examples, cfg)
            loss_fn = visible_logged(next_token(cfg.loss), model.config.sparse)
            loop(model, batches, loss_fn, cfg, run, evaluate=measure, team=team)
        model = whole_model(model, lambda: prepare(cfg, open_start(cfg.start, cfg.attention)), team)
    model.eval()
    if run.main:
        if cfg.export == "ema":
            ema.put(model, run.latest().tensors("ema"))
        model = finish(model, cfg, start, tokenizer, run.path)
    return model


def prepare(cfg: SftConfig, start: Start) -> Transformer:
    """The model as it is trained: with its adapters, where there are any."""
    model = start.model.train()
    if cfg.lora.rank:
        lora.attach(model, cfg.lora, torch.Generator().manual_seed(cfg.seed))
    for block in model.layers:
        block.recompute = cfg.checkpoint_activations
    return model.to(cfg.device)


def finish(
    model: Transformer, cfg: SftConfig, start: Start, tokenizer: Tokenizer, folder: Path
) -> Transformer:
    """Write `model`, and `adapter` beside it; the model without adapters that does the same."""
    if cfg.lora.rank:
        lora.write_peft(model, cfg.lora, cfg.start, folder / "adapter")
        model = lora.merge(model)
    export(model, start, tokenizer, folder / "model", dtype=cfg.dtype)
    return model


def _resolve(cfg: SftConfig, run: RunFolder) -> SftConfig:
    """`cfg` with the number of threads that the run started with."""
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise UserError('device is "cuda" but PyTorch finds no CUDA device: use device = "cpu"')
    if cfg.threads is not None:
        return cfg
    before = run.stored(SftConfig)
    threads = before.threads if before else torch.get_num_threads()
    return dataclasses.replace(cfg, threads=threads)


def open_start(start: str, attention: Attention = "auto") -> Start:
    """The model that `start` names, its parameters in float32."""
    place = Path(start)
    if (place / STATE).is_file():
        return Start(_of_checkpoint(place), None, "float32", None)
    if not (place / "config.json").is_file() and (place / "model" / "config.json").is_file():
        place = place / "model"
    folder = resolve(place if place.exists() else start)
    checkpoint = Checkpoint.open(folder)
    model = hf.load_checkpoint(checkpoint, dtype="float32", attention=attention)
    raw = checkpoint.config
    named = raw.get("dtype") or raw.get("torch_dtype")
    base = {key: value for key, value in raw.items() if key != "quantization_config"}
    return Start(model, base, named if named in hf.DTYPES else "float32", folder)


def _of_checkpoint(place: Path) -> Transformer:
    """The model of a pre-training checkpoint: its shape stands in the run's configuration."""
    saved, file = read_checkpoint(place), place.parent.parent / "config.toml"
    values = configuration.read(file)
    shape = values.get("model")
    if not isinstance(shape, dict) or "kind" in values:
        raise UserError(
            f"{place} is no checkpoint of pre-training: start from the folder that its run wrote, "
            f"{file.parent / 'model'}"
        )
    shape = configuration.build(ModelConfig, shape, source=str(file))
    if values.get("attention") == "dense":
        shape = dataclasses.replace(shape, sparse=None)
    with torch.device("meta"):
        model = Transformer(shape)
    model.load_state_dict(saved.tensors("model"), strict=True, assign=True)
    return model


def open_tokenizer(cfg: SftConfig, start: Start) -> Tokenizer:
    """The tokenizer to train with, its template chosen; ours where there is none."""
    place = cfg.tokenizer or start.folder
    if not place:
        raise UserError(f"start {cfg.start} has no tokenizer: name its folder as tokenizer = ...")
    tokenizer = Tokenizer.load(place)
    if cfg.template == "chatml":
        return tokenizer.with_chat_template(CHATML)
    if cfg.template:
        try:
            return tokenizer.with_chat_template(Path(cfg.template).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read template {cfg.template}: {error}") from error
    if tokenizer.chat_template is None and chat.can_chat(tokenizer):
        return tokenizer.with_chat_template(CHATML)
    return tokenizer


def _check_fits(cfg: SftConfig, model: ModelConfig, tokenizer: Tokenizer) -> None:
    if cfg.seq_len > model.max_position_embeddings:
        raise UserError(
            f"seq_len {cfg.seq_len} is longer than the model's max_position_embeddings "
            f"{model.max_position_embeddings}: shorten it"
        )
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {model.vocab_size}: use "
            "the model's own tokenizer"
        )


def _rows(cfg: SftConfig, examples: Examples, start: Start, team: Team) -> ConversationRows:
    return ConversationRows(
        examples.train, batch=team.rows(cfg.batch), seq_len=cfg.seq_len,
        weights=tuple(cfg.data.sources.values()), seed=cfg.seed, world=team.data,
        base=lora.fingerprint(start.model) if cfg.lora.rank else "",
    )  # fmt: skip


def _tell(cfg: SftConfig, examples: Examples, batches: ConversationRows, run: RunFolder) -> None:
    steps = batches.rows / (cfg.batch * cfg.accumulate)
    run.progress.note(examples.report())
    run.progress.note(
        f"{batches.rows:,} rows of {cfg.seq_len + 1} tokens, {batches.filled:.1%} filled: an epoch "
        f"is {steps:,.1f} steps, the run {cfg.steps / steps:.2f} epochs"
    )


def heldout(examples: Examples, cfg: SftConfig) -> Evaluate | None:
    """evaluate(model) -> nats per token of held-out answers: all, and by mode where there are two.

    Row by row through the same loss as in training.
    """
    groups: dict[str, list[Example]] = {}
    for example in examples.heldout:
        groups.setdefault(example.mode, []).append(example)
    if not groups:
        return None
    loss_fn = next_token(dataclasses.replace(cfg.loss, mtp_weight=0.0, z_weight=0.0))
    rows = {name: _spread(group, cfg, len(groups)) for name, group in groups.items()}

    @torch.no_grad()
    def evaluate(model: nn.Module) -> dict[str, float]:
        model.eval()
        device = next(model.parameters()).device
        sums = {name: [0.0, 0] for name in rows}
        for name, group in rows.items():
            for start in range(0, len(group), cfg.batch):
                batch = stack(group[start : start + cfg.batch], cfg.seq_len).to(device)
                loss = loss_fn(model, batch)
                sums[name][0] += loss.total.item()
                sums[name][1] += int(loss.targets)
        model.train()
        total, count = (sum(part) for part in zip(*sums.values(), strict=True))
        parts = {f"heldout_{name}": one / number for name, (one, number) in sums.items()}
        return {"heldout_loss": total / count, **(parts if len(parts) > 1 else {})}

    return evaluate


def _spread(group: list[Example], cfg: SftConfig, groups: int) -> list[list[Example]]:
    """Rows of held-out examples, spread over all of them."""
    rows = best_fit([len(example) for example in group], cfg.seq_len + 1)
    wanted = min(len(rows), max(1, cfg.eval_rows // groups))
    chosen = [rows[number * len(rows) // wanted] for number in range(wanted)]
    return [[group[item] for item in row] for row in chosen]


def export(
    model: Transformer, start: Start, tokenizer: Tokenizer, folder: Path, *, dtype: str = "auto"
) -> Path:
    """Write a folder that chats: weights, tokenizer with its template, where answers end."""
    kind = start.dtype if dtype == "auto" else dtype
    with _chat_files(start, tokenizer) as files:
        return hf.save(
            model, folder, tokenizer_files=files, base_config=start.base_config, dtype=kind,
            overwrite=True,
        )  # fmt: skip


@contextmanager
def _chat_files(start: Start, tokenizer: Tokenizer) -> Iterator[Path]:
    """A folder with everything beside the weights."""
    with TemporaryDirectory() as made:
        folder = Path(made)
        for name, file in hf.companions(start.folder).items():
            shutil.copyfile(file, folder / name)
        tokenizer.save(folder)
        path = folder / "generation_config.json"
        settings = json.loads(path.read_text()) if path.exists() else {}
        written = settings.get("eos_token_id", [])
        ends = [*(written if isinstance(written, list) else [written]), *tokenizer.eos_ids]
        turn = tokenizer.id_of(chat.TURN[1])
        ends += [turn] if turn is not None else []
        settings = {"bos_token_id": tokenizer.bos_id, **settings}
        settings["eos_token_id"] = list(dict.fromkeys(ends))
        path.write_text(json.dumps(settings, indent=1) + "\n")
        yield folder
