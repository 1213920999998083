"""The loss sees only targets of its own document, at any split of the batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from endside.data.loader import TokenBatch
from endside.errors import UserError
from endside.model.batch import Batch
from endside.model.presets import preset
from endside.model.transformer import Transformer
from endside.ops.cross_entropy.reference import IGNORE
from endside.train.losses import LossConfig, model_batch, next_token, shifted_targets


def build(**changes: object) -> Transformer:
    model = Transformer(replace(preset("tiny"), **changes)).double()
    model.init_weights(torch.Generator().manual_seed(4))
    return model


def batch(lengths: list[list[int]]) -> TokenBatch:
    """Random tokens; row r holds documents of the given lengths, T + 1 in sum."""
    generator = torch.Generator().manual_seed(9)
    total = sum(lengths[0])
    tokens = torch.randint(0, 320, (len(lengths), total), generator=generator)
    documents = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths]
    return TokenBatch(tokens, torch.stack(documents))


def test_targets_and_positions_by_hand() -> None:
    tokens = torch.tensor([[10, 11, 12, 13, 14, 15, 16]])
    both = TokenBatch(tokens, torch.tensor([[0, 0, 0, 1, 2, 2, 2]]))
    assert shifted_targets(both, 1).tolist() == [[11, 12, IGNORE, IGNORE, 15, 16]]
    assert shifted_targets(both, 2).tolist() == [[12, IGNORE, IGNORE, IGNORE, 16, IGNORE]]
    inputs = model_batch(both)
    assert inputs.tokens.tolist() == [[10, 11, 12, 13, 14, 15]]
    assert inputs.positions.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert inputs.documents.tolist() == [[0, 0, 0, 1, 2, 2]]


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_packed_documents_equal_separate_ones(weight: float) -> None:
    model = build(mtp_layers=1)
    packed = batch([[5, 9, 2, 13], [20, 1, 1, 7]])
    loss = next_token(LossConfig(mtp_weight=weight))(model, packed)
    first, second = [], []
    for tokens, owner in zip(packed.tokens, packed.documents, strict=True):
        for number in range(int(owner.max()) + 1):
            own = tokens[owner == number]
            if len(own) < 2:
                continue
            inputs = Batch(own[None, :-1])
            hidden = model(inputs)
            first.append(F.cross_entropy(model.logits(hidden)[0], own[1:], reduction="none"))
            further = model.predict_further(hidden, own[None, 1:], inputs)[0, :-1]
            second.append(F.cross_entropy(further, own[2:], reduction="none"))
    expected = torch.cat(first).mean()
    assert int(loss.targets) == len(torch.cat(first)) == 50
    assert loss.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    if weight:
        mtp = torch.cat(second).mean()
        assert loss.parts["mtp_loss"].item() == pytest.approx(mtp.item(), rel=1e-6)
        expected = expected + weight * mtp
    assert loss.total.item() == pytest.approx(50 * expected.item(), rel=1e-6)


@pytest.mark.parametrize("chunk", [1, 7, 29, 58, 1000])
def test_chunks_change_memory_and_nothing_else(chunk: int) -> None:
    model = build(tie_word_embeddings=True)
    packed = batch([[5, 9, 2, 14], [22, 1, 1, 6]])

    def gradients(size: int) -> tuple[float, list[torch.Tensor]]:
        model.zero_grad()
        loss = next_token(LossConfig(chunk=size))(model, packed)
        loss.total.backward()
        return loss.total.item(), [parameter.grad.clone() for parameter in model.parameters()]

    whole, pieces = gradients(0), gradients(chunk)
    assert pieces[0] == pytest.approx(whole[0], rel=1e-6)
    for one, other in zip(whole[1], pieces[1], strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


def test_chunks_hold_fewer_logits() -> None:
    model, packed = build(), batch([[30], [30]])
    sizes: list[int] = []
    original = model.logits

    def watched(hidden: torch.Tensor) -> torch.Tensor:
        sizes.append(hidden[..., 0].numel())
        return original(hidden)

    model.logits = watched
    next_token(LossConfig(chunk=8))(model, packed).total.backward()
    assert max(sizes) == 8
    assert sum(sizes) == 2 * 58, "each chunk is computed forward, and again backward"


def test_a_batch_without_targets_has_no_loss() -> None:
    loss = next_token(LossConfig())(build(), batch([[1] * 8]))
    assert loss.total.item() == 0.0
    assert int(loss.targets) == 0


def test_weights_cannot_be_negative() -> None:
    with pytest.raises(UserError, match=r"loss\.mtp_weight -1"):
        LossConfig(mtp_weight=-1.0)
