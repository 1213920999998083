"""muP groups: which parameter learns at which rate, at two widths, tied and untied."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from endside.errors import UserError
from endside.model.config import ModelConfig
from endside.model.presets import preset
from endside.model.transformer import Transformer
from endside.train.optim import (
    OptimConfig,
    load_state_tensors,
    make_optimizer,
    set_share,
    state_tensors,
)

OPTIM = OptimConfig(learning_rate=0.02, weight_decay=0.3)


def build(**changes: object) -> Transformer:
    model = Transformer(replace(preset("tiny"), mtp_layers=1, **changes))
    model.init_weights(torch.Generator().manual_seed(1))
    return model


def rates(model: Transformer) -> dict[str, tuple[float, float]]:
    """Parameter name -> (learning rate, weight decay)."""
    return {
        name: (group["lr"], group["weight_decay"])
        for group in make_optimizer(model, OPTIM).param_groups
        for name in group["param_names"]
    }


@pytest.mark.parametrize(("width", "m"), [(48, 3.0), (96, 6.0), (8, 0.5)])
@pytest.mark.parametrize("tied", [False, True])
def test_rate_of_every_parameter(width: int, m: float, tied: bool) -> None:
    model = build(hidden_size=width, tie_word_embeddings=tied)
    found = rates(model)
    assert set(found) == {name for name, _ in model.named_parameters()}
    hidden, plain = (pytest.approx(0.02 / m), 0.3), (0.02, 0.0)
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
        assert found[f"layers.1.{name}.weight"] == hidden
        assert found[f"mtp.layer.{name}.weight"] == hidden
    assert found["mtp.proj.weight"] == hidden
    assert found["embed_tokens.weight"] == plain
    for name in (
        "norm",
        "layers.0.input_layernorm",
        "mtp.hidden_norm",
        "mtp.layer.input_layernorm",
    ):
        assert found[f"{name}.weight"] == plain
    assert found.get("lm_head.weight") == (None if tied else (0.02, 0.3))


def test_without_a_base_width_one_rate_serves_all() -> None:
    assert {rate for rate, _ in rates(build(dim_model_base=None)).values()} == {0.02}


def test_the_share_scales_every_group() -> None:
    optimizer = make_optimizer(build(), OPTIM)
    set_share(optimizer, 0.25)
    set_share(optimizer, 0.5)
    found = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert found == pytest.approx({"hidden": 0.5 * 0.02 / 3, "head": 0.01, "plain": 0.01})


def step(model: Transformer, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def test_state_goes_out_and_back_by_name() -> None:
    straight, resumed = build(), build()
    one = make_optimizer(straight, OPTIM)
    assert state_tensors(one) == {}
    for seed in range(3):
        step(straight, one, seed)
    other = make_optimizer(resumed, OPTIM)
    resumed.load_state_dict(straight.state_dict())
    shuffled = dict(sorted(state_tensors(one).items(), key=lambda item: hash(item[0])))
    load_state_tensors(other, shuffled)
    step(straight, one, 7)
    step(resumed, other, 7)
    for mine, theirs in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_foreign_state_is_refused() -> None:
    model = build()
    optimizer = make_optimizer(model, OPTIM)
    step(model, optimizer, 0)
    good = state_tensors(optimizer)
    fresh = make_optimizer(build(), OPTIM)
    fewer = {name: tensor for name, tensor in good.items() if not name.startswith("norm.")}
    with pytest.raises(UserError, match=r"does not fit this model \(norm\.weight"):
        load_state_tensors(fresh, fewer)
    bent = {**good, "norm.weight.exp_avg": torch.zeros(3)}
    with pytest.raises(UserError, match=r"norm\.weight has shape \(3,\)"):
        load_state_tensors(fresh, bent)


@pytest.mark.parametrize(
    "wrong",
    [{"learning_rate": 0.0}, {"learning_rate": float("nan")}, {"beta1": 1.0}, {"beta2": -0.1},
     {"epsilon": 0.0}, {"weight_decay": -1.0}, {"clip": -1.0}],
)  # fmt: skip
def test_values_that_cannot_be(wrong: dict) -> None:
    with pytest.raises(UserError, match=r"optim\."):
        OptimConfig(**wrong)


def test_config_width_is_what_divides() -> None:
    config: ModelConfig = preset("tiny")
    assert config.logit_divisor == 3.0, "the tiny preset must not be neutral"
