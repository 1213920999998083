"""What is minimised: the next token, and with an MTP layer also the one after it.

    loss = CE(logits_i, x_{i+1}) + mtp_weight * CE(mtp logits_i, x_{i+2})    (training spec, "MTP")
         + z_weight * mean(log Z_i ^ 2),  Z_i = sum_v exp(logits_iv)         (PaLM, 2204.02311)

The z term keeps the logits' level near zero, which cross entropy leaves free. Each mean runs over
the targets that count: a target in another document than its input does not, because nothing in the
window tells which text comes next; nor does one that the batch's mask leaves out, such as a user's
words. A loss function has one signature, `loss_fn(model, batch) -> Loss`, so that the loop does not
know what it trains. `Loss.total` is a sum over targets and the loop divides by their number over
all accumulated batches, so that splitting a batch does not change the gradient, even where parts
count different numbers of targets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from endside.data.loader import PADDING, TokenBatch
from endside.errors import UserError
from endside.model.batch import Batch
from endside.ops.cross_entropy.reference import IGNORE, cross_entropy


@dataclass(frozen=True)
class LossConfig:
    """Weights of the terms, and how many logits exist at once."""

    mtp_weight: float = 0.3  # lambda; acts where the model has an MTP layer
    z_weight: float = 0.0  # of the squared log normaliser of the main logits, such as 1e-4
    chunk: int = 0  # tokens whose logits are held at once, recomputed backward; 0: the whole batch

    def __post_init__(self) -> None:
        if min(self.mtp_weight, self.z_weight, self.chunk) < 0:
            raise UserError(
                f"loss.mtp_weight {self.mtp_weight}, z_weight {self.z_weight} and chunk "
                f"{self.chunk} must be at least 0"
            )


@dataclass(frozen=True)
class Loss:
    """total: scalar to differentiate, summed over `targets`; parts: other detached means to log."""

    total: torch.Tensor
    loss: torch.Tensor  # detached next-token mean, nats per target
    targets: torch.Tensor  # how many targets count
    parts: dict[str, torch.Tensor] = field(default_factory=dict)


LossFn = Callable[[nn.Module, TokenBatch], Loss]


def next_token(config: LossConfig) -> LossFn:
    """The pre-training loss function."""

    def loss_fn(model: nn.Module, batch: TokenBatch) -> Loss:
        inputs = model_batch(batch)
        hidden = model(inputs)
        targets = shifted_targets(batch, 1)
        count = (targets != IGNORE).sum()
        term = _with_z if config.z_weight else cross_entropy
        if config.chunk or config.z_weight:
            mean = chunked(model.logits, hidden, targets, chunk=config.chunk, term=term)
        else:
            mean = model.head_loss(hidden, targets)
        total, parts = mean, {}
        if config.z_weight:
            mean, z = mean.unbind()
            total, parts["z_loss"] = mean + config.z_weight * z, z.detach()
        if model.mtp is not None and config.mtp_weight:
            further = model.look_further(hidden, batch.tokens[:, 1:], inputs)
            later = shifted_targets(batch, 2)
            if config.chunk:
                mtp = chunked(model.logits, further, later, chunk=config.chunk)
            else:
                mtp = model.head_loss(further, later)
            total, parts["mtp_loss"] = total + config.mtp_weight * mtp, mtp.detach()
        return Loss(total * count, mean.detach(), count, parts)

    return loss_fn


def _with_z(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.stack((cross_entropy(logits, targets), square_of_log_z(logits, targets)))


def square_of_log_z(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """logits (..., V) -> mean of log(sum exp logits)^2 over the targets that count."""
    counted = targets != IGNORE
    squares = logits.logsumexp(-1).square()
    return torch.where(counted, squares, 0).sum() / counted.sum().clamp(min=1)


def model_batch(batch: TokenBatch) -> Batch:
    """The first T of T + 1 tokens for the model, positions counted within each document."""
    documents = batch.documents[:, :-1]
    return Batch(batch.tokens[:, :-1], _positions(documents), documents=documents)


def _positions(documents: torch.Tensor) -> torch.Tensor:
    """documents (B, T) -> (B, T): steps since the document's first token in this window."""
    steps = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    changed = torch.zeros_like(documents, dtype=torch.bool)
    changed[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return steps - torch.where(changed, steps, 0).cummax(dim=1).values


def shifted_targets(batch: TokenBatch, ahead: int) -> torch.Tensor:
    """(B, T): the token `ahead` of each input; IGNORE where the window or its document ends.

    With `batch.mask`, only tokens that it marks are targets.
    """
    length = batch.tokens.shape[1] - 1
    targets = torch.full_like(batch.tokens[:, :length], IGNORE)
    own, later = batch.documents[:, : length + 1 - ahead], batch.documents[:, ahead:]
    wanted = (own == later) & (own != PADDING)
    if batch.mask is not None:
        wanted = wanted & batch.mask[:, ahead:]
    targets[:, : length + 1 - ahead] = torch.where(wanted, batch.tokens[:, ahead:], IGNORE)
    return targets


Term = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (logits, targets) -> mean or means


def chunked(
    logits: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    targets: torch.Tensor,
    *,
    chunk: int,
    term: Term = cross_entropy,
) -> torch.Tensor:
    """Mean of `term` over hidden (B, T, C), `chunk` tokens at a time; 0: all at once.

    A chunk's logits are dropped and computed again in the backward pass: memory chunk x V instead
    of B T x V, for one more product with the head.
    """
    if chunk == 0:
        return term(logits(hidden), targets)

    def part(states: torch.Tensor, goals: torch.Tensor) -> torch.Tensor:
        return term(logits(states), goals) * (goals != IGNORE).sum()

    pieces = zip(hidden.flatten(0, 1).split(chunk), targets.flatten().split(chunk), strict=True)
    total = sum(checkpoint(part, *piece, use_reentrant=False) for piece in pieces)
    return total / (targets != IGNORE).sum().clamp(min=1)
