"""Draft heads trained on what the model itself writes.

    text     windows of token shards; best those the model wrote (`endside draft train` makes them),
             since that is what will be drafted
    target   the model's own distribution behind each pair, not the text: it says more per token,
             and what it says is what drafts are accepted by
    loss     cross entropy at each of `unroll` steps of the head on itself, a step counting 0.8 of
             the one before (EAGLE-3, arXiv 2503.01840)

`kind = "bita"` trains no head but rows that the model is asked by (train/bita.py).

The model is frozen and stands outside: a run's checkpoints hold the head alone. With
`bits = "int4"` the projections are trained as they will be rounded (MiniCPM4, section 4.1.3: a
draft rounded afterwards loses acceptance, one trained so does not). `evaluate` follows the head for
`unroll` steps on held-out text and counts how many guesses in a row are what the text says: the
mean accepted length, the token that comes for nothing included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn

from endside.data.loader import Loader, LoaderConfig, TokenBatch, Windows
from endside.data.pack import Packed
from endside.errors import UserError
from endside.formats import draft_head, draft_soft
from endside.model.config import ModelConfig
from endside.model.draft import DraftHead, Pairs, feature_layers
from endside.model.transformer import Transformer
from endside.quant.pack import Scheme
from endside.quant.ternary import FakeLinear, fake_quantized
from endside.train import bita
from endside.train.loop import Evaluate, loop
from endside.train.losses import Loss, LossFn, model_batch
from endside.train.optim import OptimConfig
from endside.train.run_folder import RunFolder
from endside.train.schedule import ScheduleConfig, check
from endside.train.spikes import SpikeConfig

DECAY = 0.8  # weight of a step's loss over the one before


@dataclass(frozen=True)
class WriteConfig:
    """The text that the model writes for its draft."""

    shards: str = ""  # folder of its own text; written first where it is missing
    prompts: str = ""  # folder of token shards whose beginnings it continues
    rows: int = 512  # texts
    prompt: int = 32  # tokens given
    tokens: int = 224  # tokens written
    temperature: float = 0.7


@dataclass(frozen=True)
class DraftConfig:
    """Training of a head."""

    model: str  # folder of the model it drafts for
    steps: int
    kind: Literal["eagle2", "eagle3", "mtp", "bita"] = "eagle2"
    text: WriteConfig = field(default_factory=WriteConfig)
    ranking: str = ""  # eagle3: token frequencies (endside draft rank); empty: all tokens
    keep: int = 0  # eagle3: how many of them its own head has; 0: all
    bits: Literal["none", "int4"] = "none"
    group: int = 32  # weights per scale
    unroll: int = 4  # steps of the head on itself; bita: mask tokens
    prompts: int = 1  # bita: prompt tokens before the masks
    run: str = ""  # run folder; empty: the configuration's path without its suffix
    batch: int = 8
    accumulate: int = 1
    seq_len: int = 128
    seed: int = 0
    precision: Literal["float32", "bfloat16"] = "float32"
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int | None = None
    eval_every: int = 100
    eval_rows: int = 64
    checkpoint_every: int = 0
    checkpoint_seconds: float = 60.0
    tensorboard: bool = False
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    # bita's few rows learn well with 0.1 to 0.3
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(learning_rate=0.005))
    ema: float = 0.0  # decay of a running average of the weights; 0: none is kept
    spikes: SpikeConfig = field(default_factory=SpikeConfig)

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "seq_len", "eval_rows", "unroll"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.seq_len < self.unroll + 2:
            raise UserError(
                f"seq_len {self.seq_len} leaves no guess of {self.unroll} steps to check: "
                "lengthen it or lower unroll"
            )
        if self.group not in (32, 64, 128):
            raise UserError(f"group is {self.group}: weights share a scale by 32, 64 or 128")
        if self.keep and (self.kind != "eagle3" or not self.ranking):
            raise UserError("keep cuts eagle3's own head by frequency: give kind and ranking too")
        self._check_bita()
        check(self.steps, self.schedule)

    def _check_bita(self) -> None:
        if self.kind != "bita":
            return
        if self.ranking or self.bits != "none":
            raise UserError("kind bita has no head to cut or round: leave ranking and bits out")
        if self.prompts < 0 or self.prompts + self.unroll > draft_soft.MOST:
            raise UserError(
                f"prompts {self.prompts} and unroll {self.unroll}: at most {draft_soft.MOST} soft "
                "tokens fit into a draft"
            )


def train(cfg: DraftConfig, model: Transformer, packed: Packed, run: RunFolder) -> Path:
    """Train from the run's newest checkpoint to `cfg.steps` -> folder of the head."""
    _fits(cfg, model.config, packed)
    run.fix(cfg, free=("run", "tensorboard"))
    torch.manual_seed(cfg.seed)
    model.eval().requires_grad_(False).to(cfg.device)
    batches = Loader(packed, LoaderConfig(cfg.batch, cfg.seq_len, cfg.seed))
    folder = run.path / "draft"
    if cfg.kind == "bita":
        soft = bita.make(cfg, model).to(cfg.device)
        measure = accepted_length(partial(bita.matches, model=model), packed, cfg)
        loop(soft, batches, bita.loss_of(model, decay=DECAY), cfg, run, evaluate=measure)
        return draft_soft.write(bita.export(soft), folder, overwrite=True)
    ids = _ids(cfg, model.config.vocab_size)
    head = make(cfg, model, ids).to(cfg.device)
    measure = accepted_length(partial(matches, model=model, cfg=cfg, ids=ids), packed, cfg)
    loop(head, batches, loss_of(model, cfg, ids), cfg, run, evaluate=measure)
    return draft_head.write(export(head, cfg, ids), folder, overwrite=True)


def _fits(cfg: DraftConfig, model: ModelConfig, packed: Packed) -> None:
    if packed.index.vocab_size > model.vocab_size:
        raise UserError(
            f"the shards in {packed.folder} use a vocabulary of {packed.index.vocab_size}, the "
            f"model {cfg.model} has {model.vocab_size}: give text that this model wrote"
        )
    if cfg.kind == "eagle3" and model.num_hidden_layers < 6:
        raise UserError(
            f"eagle3 reads three layers inside the model, and {cfg.model} has "
            f"{model.num_hidden_layers} in all: at least 6 are needed, or take kind = eagle2"
        )


def make(cfg: DraftConfig, model: Transformer, ids: torch.Tensor | None) -> DraftHead:
    """A fresh head for the model; int4: its projections see themselves rounded."""
    scheme = Scheme("int4", cfg.group)

    def slot(inputs: int, outputs: int) -> nn.Module:
        return FakeLinear(inputs, outputs, scheme)

    kind = {"make_linear": slot} if cfg.bits == "int4" else {}
    config = replace(model.config, mtp_layers=0)
    head = DraftHead(config, cfg.kind, rows=len(ids) if ids is not None else 0, **kind)
    head.init_weights(torch.Generator().manual_seed(cfg.seed))
    return head


def _ids(cfg: DraftConfig, vocab_size: int) -> torch.Tensor | None:
    if not cfg.ranking:
        return None
    ids = draft_head.read_ranking(cfg.ranking, vocab_size)
    if cfg.keep > len(ids):
        raise UserError(f"keep is {cfg.keep}, {cfg.ranking} ranks {len(ids)} tokens: lower it")
    return torch.from_numpy(np.sort(ids[: cfg.keep or None]))


def loss_of(model: Transformer, cfg: DraftConfig, ids: torch.Tensor | None) -> LossFn:
    """loss_fn(head, batch): how far its guesses are from the model's, `cfg.unroll` steps deep."""

    def loss_fn(head: nn.Module, batch: TokenBatch) -> Loss:
        pairs, hidden = teach(model, batch, cfg.kind)
        own = _output(model, cfg.kind, ids)
        with torch.no_grad():
            wanted = model.logits(hidden)
            wanted = (wanted if ids is None else wanted[..., ids]).softmax(-1)[:, 1:]
        total, parts = torch.zeros((), device=hidden.device), {}
        for step, states in enumerate(head(pairs, cfg.unroll)):
            logits = head.guess(states[:, :-1], own)
            inside = _inside(pairs.documents, step)
            each = -(wanted * logits.log_softmax(-1)).sum(-1)
            mean = (each * inside).sum() / inside.sum().clamp(min=1)
            total = total + DECAY**step * mean
            parts[f"loss_{step + 1}"] = mean.detach()
        count = torch.tensor(pairs.positions.numel(), device=hidden.device)
        return Loss(total * count, total.detach(), count, parts)

    return loss_fn


def _output(model: Transformer, kind: str, ids: torch.Tensor | None) -> torch.Tensor | None:
    """(Vd, C): the rows of the model's head that are guessed with; None: the draft has its own."""
    if kind == "eagle3":
        return None
    tied = model.config.tie_word_embeddings
    whole = model.embed_tokens.weight if tied else model.lm_head.weight
    return whole if ids is None else whole[ids]


@torch.no_grad()
def teach(model: Transformer, batch: TokenBatch, kind: str) -> tuple[Pairs, torch.Tensor]:
    """What the frozen model says of a batch (B, T + 1) -> the head's input, hidden (B, T, C)."""
    inputs = model_batch(batch)
    layers = feature_layers(kind, len(model.layers))
    streams: dict[int, torch.Tensor] = {}
    hooks = [
        model.layers[layer].register_forward_pre_hook(
            lambda module, given, layer=layer: streams.update({layer: given[0]})
        )
        for layer in layers
        if layer < len(model.layers)
    ]
    try:
        hidden = streams[len(model.layers)] = model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    features = torch.cat([streams[layer] for layer in layers], -1)
    assert inputs.positions is not None and inputs.documents is not None, "a batch has both"
    embeds = model.embed(batch.tokens[:, 1:])
    # Attention may start anew at a document; so does the head.
    return Pairs(embeds, features, inputs.positions, inputs.documents), hidden


def _inside(documents: torch.Tensor, step: int) -> torch.Tensor:
    """(B, T - 1): pairs whose whole path, `step` guesses deep, and target are of one document."""
    good = documents[:, 1:] == documents[:, :-1]
    good[:, :step] = False
    for back in range(1, step + 1):
        good[:, back:] &= documents[:, back:-1] == documents[:, : -1 - back]
    return good


def accepted_length(
    right_of: Callable[..., torch.Tensor], packed: Packed, cfg: DraftConfig
) -> Evaluate:
    """evaluate(head) -> {"accepted_length"}: tokens a pass on held-out text, by chains.

    right_of: (head, batch=…) -> (k, …) 0 or 1, as `matches`.
    """
    windows = Windows(packed, "heldout", cfg.seq_len)
    looked_at = min(cfg.eval_rows, len(windows))
    rows = [number * len(windows) // looked_at for number in range(looked_at)]

    @torch.no_grad()
    def evaluate(head: nn.Module) -> dict[str, float]:
        head.eval()
        kept = roots = 0.0
        for start in range(0, len(rows), cfg.batch):
            batch = windows.stack(rows[start : start + cfg.batch]).to(cfg.device)
            right = right_of(head, batch=batch)
            kept += float(right.cumprod(0).sum())
            roots += right[0].numel()
        head.train()
        return {"accepted_length": 1 + kept / roots}

    return evaluate


def matches(
    head: nn.Module,
    model: Transformer,
    batch: TokenBatch,
    cfg: DraftConfig,
    ids: torch.Tensor | None,
) -> torch.Tensor:
    """(unroll, B, R) 0 or 1: whether guess k of a chain behind pair r is the text's own token."""
    pairs, _ = teach(model, batch, cfg.kind)
    own = _output(model, cfg.kind, ids)
    roots = batch.tokens.shape[1] - 1 - cfg.unroll
    right = []
    for step, states in enumerate(head(pairs, cfg.unroll)):
        best = head.guess(states[:, step : step + roots], own).argmax(-1)
        best = best if ids is None else ids[best]
        right.append(best == batch.tokens[:, step + 2 : step + 2 + roots])
    return torch.stack(right).float()


def export(head: DraftHead, cfg: DraftConfig, ids: torch.Tensor | None) -> draft_head.DraftHead:
    """The trained head as files hold it; int4: with exactly the values that training saw."""
    scheme = Scheme("int4", cfg.group)
    tensors = {}
    for name, parameter in head.state_dict().items():
        rounded = cfg.bits == "int4" and parameter.dim() == 2 and name != "lm_head.weight"
        value = fake_quantized(parameter, scheme) if rounded else parameter
        tensors[name] = value.float().cpu().numpy()
    own = None if ids is None else ids.numpy()
    return draft_head.DraftHead(cfg.kind, head.config, tensors, own, cfg.bits, cfg.group)
