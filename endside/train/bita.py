"""Tuning prompt and mask tokens so that a frozen model guesses further ahead (BiTA, 2401.12522).

    row         x₀ x₁ … x_t … x_T-1, and behind some places t: P₁ … Pₚ M₁ … Mₘ
    positions   t + 1, t + 2, …: as in a pass that drafts (engine/drafts/bita.py)
    seen        the text up to t and the soft tokens of the same place up to itself
    target      of Mᵢ: what the model itself says behind x_t+i, so of the token t + i + 1

Text and questions run together in one pass, whose own logits are the targets; only the soft tokens
get a gradient. They are asked behind every p + m-th place, starting where the text's ids say: as
many soft rows as text, and every place in its turn.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from endside.data.loader import TokenBatch
from endside.formats.draft_soft import SoftTokens
from endside.model.batch import Batch
from endside.model.config import ModelConfig
from endside.model.transformer import Transformer
from endside.train.losses import Loss, LossFn, model_batch

if TYPE_CHECKING:
    from endside.train.draft import DraftConfig


class SoftEmbedding(nn.Module):
    """The rows, in the units of the model's embedding, whose muP group their name gives them."""

    def __init__(self, config: ModelConfig, prompts: int, masks: int) -> None:
        super().__init__()
        self.config, self.prompts, self.masks = config, prompts, masks
        self.embed_tokens = nn.Embedding(prompts + masks, config.hidden_size)

    def inputs(self) -> torch.Tensor:
        """What enters the first layer, (p + m, C)."""
        return self.embed_tokens.weight * self.config.scale_emb


@dataclass(frozen=True)
class Asked:
    """Hidden states behind a batch's text (B, T, C) and its masks (B, A, m, C).

    places (A,): tokens that the questions stand behind; inside (B, A, m): whether the mask's target
    belongs to the same document.
    """

    text: torch.Tensor
    masks: torch.Tensor
    places: torch.Tensor
    inside: torch.Tensor


def make(cfg: DraftConfig, model: Transformer) -> SoftEmbedding:
    """Soft tokens that start as embeddings of the model's own, drawn at random."""
    soft = SoftEmbedding(model.config, cfg.prompts, cfg.unroll)
    noise = torch.Generator().manual_seed(cfg.seed)
    drawn = torch.randint(model.config.vocab_size, (cfg.prompts + cfg.unroll,), generator=noise)
    with torch.no_grad():
        soft.embed_tokens.weight.copy_(model.embed_tokens.weight[drawn.to(cfg.device)])
    return soft


def loss_of(model: Transformer, *, decay: float) -> LossFn:
    """loss_fn(soft, batch): how far the masks' guesses are from the model's own words."""

    def loss_fn(soft: nn.Module, batch: TokenBatch) -> Loss:
        asked = ask(soft, model, batch)
        with torch.no_grad():
            said = model.logits(asked.text).softmax(-1)
        total, parts = torch.zeros((), device=asked.text.device), {}
        for step in range(soft.masks):
            wanted = said[:, asked.places + 1 + step]
            guessed = model.logits(asked.masks[:, :, step]).log_softmax(-1)
            inside = asked.inside[:, :, step]
            each = -(wanted * guessed).sum(-1)
            mean = (each * inside).sum() / inside.sum().clamp(min=1)
            total = total + decay**step * mean
            parts[f"loss_{step + 1}"] = mean.detach()
        count = torch.tensor(asked.inside[:, :, 0].numel(), device=total.device)
        return Loss(total * count, total.detach(), count, parts)

    return loss_fn


def matches(soft: nn.Module, model: Transformer, batch: TokenBatch) -> torch.Tensor:
    """(m, B, A) 0 or 1: whether the guess of each mask is the text's own token."""
    asked = ask(soft, model, batch)
    right = [
        model.logits(asked.masks[:, :, step]).argmax(-1) == batch.tokens[:, asked.places + 2 + step]
        for step in range(soft.masks)
    ]
    return torch.stack(right).float()


def ask(soft: nn.Module, model: Transformer, batch: TokenBatch) -> Asked:
    """Run a batch (B, T + 1) with questions behind some of its places."""
    text = model_batch(batch)
    assert text.positions is not None and text.documents is not None, "a batch has both"
    rows, length = text.tokens.shape
    size = soft.prompts + soft.masks
    device = text.tokens.device
    # The last mask's target must still be in the text; where to begin follows from the text alone,
    # so that a resumed run asks the same.
    begin = int(batch.tokens.sum()) % min(size, length - soft.masks)
    places = torch.arange(begin, length - soft.masks, size, device=device)
    steps = torch.arange(size, device=device)
    ids = (model.config.vocab_size + steps).repeat(len(places)).expand(rows, -1)
    behind = text.positions[:, places, None] + 1 + steps
    hidden = model(
        Batch(
            tokens=torch.cat([text.tokens, ids], 1),
            positions=torch.cat([text.positions, behind.flatten(1)], 1),
            inputs=soft.inputs(),
            seen=_seen(text.documents, places, size),
        )
    )
    masks = hidden[:, length:].unflatten(1, (len(places), size))[:, :, soft.prompts :]
    ends = places[:, None] + 1 + torch.arange(soft.masks, device=device)  # (A, m)
    inside = text.documents[:, ends] == text.documents[:, places, None]
    return Asked(hidden[:, :length].detach(), masks, places, inside)


def _seen(documents: torch.Tensor, places: torch.Tensor, size: int) -> torch.Tensor:
    """(B, T + A size, T + A size) bool: which row of text and questions sees which."""
    length = documents.shape[1]
    text = torch.arange(length, device=documents.device)
    # Where a row's text ends for it; which question it belongs to (the text: -1), and how deep.
    ends = torch.cat([text, places.repeat_interleave(size)])
    owner = torch.arange(len(places), device=text.device).repeat_interleave(size)
    owner = torch.cat([torch.full_like(text, -1), owner])
    depth = torch.arange(size, device=text.device).repeat(len(places))
    same = documents[:, ends, None] == documents[:, None, :]
    of_text = same & (ends[:, None] >= text)
    inner = (owner[:, None] == owner[length:]) & (
        torch.cat([torch.zeros_like(text), depth])[:, None] >= depth
    )
    return torch.cat([of_text, inner.expand(len(documents), -1, -1)], 2)


def export(soft: SoftEmbedding) -> SoftTokens:
    """The tuned rows as files hold them."""
    rows = soft.inputs().detach().float().cpu().numpy()
    return SoftTokens(replace(soft.config, mtp_layers=0), np.ascontiguousarray(rows), soft.prompts)
