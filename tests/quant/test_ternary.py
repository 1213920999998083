"""The slot that trains in low bits sees exactly what will be packed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from endside.errors import UserError
from endside.model.linear import Linear
from endside.model.presets import preset
from endside.quant.pack import Scheme, round_to_nearest
from endside.quant.ternary import FakeLinear, fake_quantized, fake_transformer


def weights(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=draw) * torch.logspace(-9, 1, rows)[:, None]
    weight[0] = 0
    weight[2, : width // 2] = 0
    weight[3] = torch.sign(weight[3]) * 0.25  # nothing but -s and s, which is kept
    return weight


@pytest.mark.parametrize("kind", ["ternary", "int4"])
@pytest.mark.parametrize(("width", "group"), [(63, 32), (128, 128), (129, 64)])
def test_it_is_the_rule_of_pack_bit_for_bit(kind: str, width: int, group: int) -> None:
    weight = weights(65, width)
    packed = round_to_nearest(weight.numpy(), kind, group)
    ours = fake_quantized(weight, Scheme(kind, group))
    np.testing.assert_array_equal(ours.numpy(), packed.dequantize())


def test_a_ternary_matrix_survives_rounding_again() -> None:
    ours = fake_quantized(weights(65, 129), Scheme("ternary", 64)).numpy()
    again = round_to_nearest(ours, "ternary", 64).dequantize()
    np.testing.assert_array_equal(again, ours)


def test_the_gradient_goes_straight_through() -> None:
    slot = FakeLinear(96, 5, Scheme("ternary", 32))
    slot.weight.data = weights(5, 96, seed=1)
    plain = Linear(96, 5)
    plain.weight.data = fake_quantized(slot.weight.data, slot.scheme)
    x = torch.randn(3, 7, 96, generator=torch.Generator().manual_seed(2), requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    goal = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(3))
    (slot(x) * goal).sum().backward()
    (plain(twin) * goal).sum().backward()
    assert torch.equal(slot(x), plain(x))
    assert torch.equal(slot.weight.grad, plain.weight.grad)
    assert torch.equal(x.grad, twin.grad)
    assert not torch.equal(slot.weight, plain.weight)


@pytest.mark.parametrize("tied", [False, True])
def test_only_the_blocks_are_filled(tied: bool) -> None:
    config = replace(preset("tiny"), tie_word_embeddings=tied)
    model = fake_transformer(config, Scheme("ternary", 32))
    kinds = {
        name: type(m) for name, m in model.named_modules() if isinstance(m, Linear | FakeLinear)
    }
    assert kinds.pop("lm_head", Linear) is Linear
    assert len(kinds) == 14 and set(kinds.values()) == {FakeLinear}


@pytest.mark.parametrize(
    ("scheme", "changes", "part"),
    [
        (Scheme("int8", 32), {}, "cannot train in int8"),
        (Scheme("int4", 32, False), {}, "both symmetric"),
        (Scheme("ternary", 32), {"mtp_layers": 1}, "MTP"),
    ],
)
def test_refusals(scheme: Scheme, changes: dict, part: str) -> None:
    with pytest.raises(UserError, match=part):
        fake_transformer(replace(preset("tiny"), **changes), scheme)
