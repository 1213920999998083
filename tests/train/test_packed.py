"""A packed batch is worth its documents: loss and every gradient, dense and sparse, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from endside.data.loader import PADDING, TokenBatch
from endside.model.presets import preset
from endside.model.transformer import Transformer
from endside.ops.attention import segments
from endside.ops.infllm import attend_stats, is_dense
from endside.ops.infllm.config import SparseConfig
from endside.train import losses
from endside.train.losses import LossConfig, model_batch, next_token

SPARSE = SparseConfig(window_size=64, topk=2, dense_len=128)


class Double(Transformer):
    """A model whose logits keep the type of its states."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.lm_head(hidden / self.config.logit_divisor)


def build(sparse: SparseConfig | None) -> Transformer:
    """A tiny model with its muP scales, in float64 to the logits."""
    config = replace(preset("tiny"), num_hidden_layers=2, max_position_embeddings=1024)
    model = Double(replace(config, sparse=sparse))
    model.init_weights(torch.Generator().manual_seed(2))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 1, 0.2, generator=torch.Generator().manual_seed(len(name)))
    return model.double()


def batch_of(rows: list[list[int]], padding: int = 0) -> TokenBatch:
    """Seeded tokens; each row holds documents of those lengths, the first then `padding`."""
    width = sum(rows[0]) + padding
    tokens = torch.randint(2, 320, (len(rows), width), generator=torch.Generator().manual_seed(6))
    documents = torch.full((len(rows), width), PADDING)
    for row, lengths in enumerate(rows):
        owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        documents[row, : len(owner)] = owner
    return TokenBatch(tokens, documents)


def alone(batch: TokenBatch) -> list[TokenBatch]:
    """Every document of a batch as a batch of its own."""
    found = []
    for tokens, documents in zip(batch.tokens, batch.documents, strict=True):
        for number in documents.unique().tolist():
            text = tokens[documents == number][None]
            # One token alone has nothing to predict.
            if number != PADDING and text.shape[1] > 1:
                found.append(TokenBatch(text, torch.zeros_like(text)))
    return found


def value_and_gradients(model: Transformer, batches: list[TokenBatch]) -> list[torch.Tensor]:
    """Sum of next-token losses, number of targets, and the gradients, over `batches`."""
    loss_fn = next_token(LossConfig())
    model.zero_grad()
    each = [loss_fn(model, batch) for batch in batches]
    sum(loss.total for loss in each).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    total = sum(loss.total.detach() for loss in each)
    return [total, sum(loss.targets for loss in each).double(), *map(torch.clone, gradients)]


ROWS = [[640, 5, 1, 40, 70], [756]]


@pytest.fixture(autouse=True)
def float64_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss as wide as the model: its own rounding to float32 is not what is looked at."""

    def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        flat = logits.flatten(0, -2)
        return nn.functional.cross_entropy(flat, targets.flatten(), ignore_index=losses.IGNORE)

    monkeypatch.setattr(losses, "cross_entropy", cross_entropy)


@pytest.mark.parametrize("kind", ["dense", "sparse", "short"])
def test_packed_equals_separate(kind: str) -> None:
    """Rows longer than what one mask covers; "short": sparse layers that no document reaches."""
    rows = [[90, 60, 100, 70], [128, 128, 64]] if kind == "short" else ROWS
    sparse = None if kind == "dense" else SPARSE
    if kind == "sparse":
        stats = [attend_stats(length, length, SPARSE) for length in (640, 756)]
        print("visible / available", [round(one.ratio, 3) for one in stats])
        assert all(one.ratio < 0.5 for one in stats), "sparsity does not act"
    if kind == "short":
        assert all(is_dense(length, SPARSE) for row in rows for length in row)
    packed = batch_of(rows)
    assert packed.tokens.shape[1] > segments.TILE
    model = build(sparse)
    whole = value_and_gradients(model, [packed])
    separate = value_and_gradients(model, alone(packed))
    assert len(whole) == len(separate) > 8
    for one, other in zip(whole, separate, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_sparse_and_dense_differ_on_these_rows() -> None:
    """Else the test above would compare dense attention with itself."""
    packed = batch_of(ROWS)
    dense, sparse = (value_and_gradients(build(kind), [packed])[0] for kind in (None, SPARSE))
    assert abs(dense - sparse) > 1e-6 * dense


@pytest.mark.parametrize("sparse", [None, SPARSE], ids=["dense", "sparse"])
def test_padding_changes_nothing(sparse: SparseConfig | None) -> None:
    model = build(sparse)
    padded = batch_of([[200, 30], [150, 77]], padding=70)
    whole = value_and_gradients(model, [padded])
    separate = value_and_gradients(model, alone(padded))
    for one, other in zip(whole, separate, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_another_document_cannot_be_seen() -> None:
    """Other tokens in one document leave the other's part of the hidden states bit for bit."""
    for sparse in (None, SPARSE):
        model = build(sparse)
        packed = batch_of([[330, 110]])
        changed = packed.tokens.clone()
        changed[:, :330] = (changed[:, :330] + 7) % 320
        with torch.no_grad():
            one = model(model_batch(packed))
            other = model(model_batch(replace(packed, tokens=changed)))
        assert torch.equal(one[:, 330:], other[:, 330:])
        assert not torch.allclose(one[:, :330], other[:, :330])
