"""The layer-by-layer pass: what it writes, that its methods differ as they should, its refusals."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from endside.checkpoint import Checkpoint
from endside.errors import UserError
from endside.formats.hf_config import config_from_hf
from endside.log import Progress
from endside.model.batch import Batch
from endside.model.transformer import Transformer
from endside.ops.cross_entropy.reference import cross_entropy
from endside.quant.pack import Scheme, from_arrays, round_to_nearest, stored_names
from endside.quant.quantize import Recipe, Target, Texts, quantize
from tests.quant.text import rows

Make = Callable[..., Transformer]
Where = Callable[..., Target]
LINEARS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


def texts() -> Texts:
    return Texts(rows(12, 63, 100), rows(6, 65, 200))


def files(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}


def loaded(folder: Path) -> Transformer:
    """The written model with its codes turned back into float32 weights."""
    checkpoint = Checkpoint.open(folder)
    config, _ = config_from_hf(checkpoint.config)
    scheme = Scheme.from_config(checkpoint.config["quantization_config"])
    model = Transformer(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            stored = name if name == "lm_head.weight" else f"model.{name}"
            if not name.endswith("_proj.weight"):
                parameter.copy_(checkpoint.torch(stored))
                continue
            base = stored.removesuffix(".weight")
            parts = [part for part in stored_names(base).values() if part in checkpoint.tensors]
            arrays = {part: checkpoint.numpy(part) for part in parts}
            linear = from_arrays(base, arrays, scheme, parameter.shape[1])
            parameter.copy_(torch.from_numpy(linear.dequantize()))
    return model.eval()


@torch.no_grad()
def perplexity(model: Transformer, tokens: torch.Tensor) -> float:
    logits = model.logits(model(Batch(tokens[:, :-1])))
    return math.exp(cross_entropy(logits, tokens[:, 1:]))


@torch.no_grad()
def divergence(one: Transformer, other: Transformer, tokens: torch.Tensor, first: int = 0) -> float:
    """Mean KL over tokens from position `first` on, in float64."""
    p, q = (m.logits(m(Batch(tokens[:, :-1]))).double().log_softmax(-1) for m in (one, other))
    return (p.exp() * (p - q)).sum(-1)[:, first:].mean().item()


RECIPES = {
    "gptq": Recipe(Scheme("int4", 32), "gptq"),
    "pgptq asymmetric": Recipe(Scheme("int4", 64, False), "pgptq"),
    "pgptq smooth": Recipe(Scheme("int4", 32), "pgptq", smooth=True),
    "gptq rotate": Recipe(Scheme("int4", 32), "gptq", rotate=True, act_order=True),
    "rtn all": Recipe(Scheme("int8", 128), "rtn", smooth=True, rotate=True),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", RECIPES)
def test_the_written_folder_is_what_was_measured(
    make_model: Make, target: Where, quiet: Progress, name: str, tied: bool
) -> None:
    recipe, where = RECIPES[name], target()
    made = quantize(make_model(tied), recipe, texts(), where, quiet)
    model = loaded(where.folder)
    heldout = texts().heldout
    before, after = (perplexity(one, heldout) for one in (make_model(tied), model))
    assert made.heldout.perplexity_before == pytest.approx(before, rel=1e-5)
    assert made.heldout.perplexity_after == pytest.approx(after, rel=1e-5)
    assert 0 < abs(made.heldout.increase) < 0.1
    assert made.heldout.apart == pytest.approx(
        divergence(make_model(tied), model, heldout), rel=1e-2
    )
    later = divergence(make_model(tied), model, heldout, first=4)
    assert made.heldout.apart_later == pytest.approx(later, rel=1e-2)
    assert made.heldout.tokens == heldout[:, 1:].numel()
    assert model.config.tie_word_embeddings == (tied and not recipe.rotate)
    assert (where.folder / "extra.txt").read_text() == "beside\n"
    stored = json.loads((where.folder / "quantization.json").read_text())
    assert len(stored["rows"]) == 3 * len(LINEARS) == len(made.rows)
    assert stored["worst"] == made.worst
    assert not list(where.folder.parent.glob(".*"))


def test_gptq_loses_less_than_rounding_in_every_projection(
    make_model: Make, target: Where, quiet: Progress
) -> None:
    made = quantize(make_model(), RECIPES["gptq"], texts(), target(), quiet)
    assert all(0 < row["error"] < row["rtn_error"] for row in made.rows)
    assert "perplexity" in str(made) and made.worst[0]["name"] in str(made)


def test_rounding_without_text_is_that_of_pack(
    make_model: Make, target: Where, quiet: Progress
) -> None:
    where, source = target(), make_model(dtype=torch.bfloat16)
    weight = source.layers[2].mlp.up_proj.weight.detach().float().numpy()
    recipe = Recipe(Scheme("int4", 32, False), "rtn")
    made = quantize(source, recipe, Texts(), where, quiet)
    expected = round_to_nearest(weight, "int4", 32, symmetric=False).dequantize()
    checkpoint = Checkpoint.open(where.folder)
    assert checkpoint.info("model.norm.weight").dtype == "BF16"
    ours = loaded(where.folder).layers[2].mlp.up_proj.weight.detach().numpy()
    np.testing.assert_array_equal(ours, expected)
    row = next(r for r in made.rows if r["layer"] == 2 and r["name"] == "mlp.up_proj")
    plain = ((weight - expected) ** 2).sum() / (weight**2).sum()
    assert row["error"] == pytest.approx(plain, rel=1e-5)
    assert made.heldout is None


def test_prefix_zero_is_gptq_and_a_prefix_is_not(
    make_model: Make, target: Where, quiet: Progress
) -> None:
    made = {}
    for name, recipe in (
        ("gptq", Recipe(Scheme("int4", 32), "gptq")),
        ("none", Recipe(Scheme("int4", 32), "pgptq", prefix=0)),
        ("four", Recipe(Scheme("int4", 32), "pgptq", prefix=4)),
    ):
        quantize(make_model(), recipe, texts(), target(name), quiet)
        made[name] = files(target(name).folder)["model.safetensors"]
    assert made["gptq"] == made["none"] != made["four"]


def test_another_plan_starts_afresh_and_the_same_goes_on(
    make_model: Make, target: Where, quiet: Progress, monkeypatch: pytest.MonkeyPatch
) -> None:
    from endside.quant import quantize as room

    recipe, calls = RECIPES["pgptq smooth"], []
    whole = quantize(make_model(), recipe, texts(), target("whole"), quiet)
    finish = room.Workplace.finish

    def dies(self: room.Workplace, layer: int, *rest: object) -> None:
        finish(self, layer, *rest)
        calls.append(layer)
        if calls == [0, 1]:
            raise KeyboardInterrupt

    monkeypatch.setattr(room.Workplace, "finish", dies)
    with pytest.raises(KeyboardInterrupt):
        quantize(make_model(), recipe, texts(), target("torn"), quiet)
    again = quantize(make_model(), recipe, texts(), target("torn"), quiet)
    assert calls == [0, 1, 2] and again == whole
    assert files(target("torn").folder) == files(target("whole").folder)
    calls[:] = []
    with pytest.raises(KeyboardInterrupt):
        quantize(make_model(), recipe, texts(), target("other"), quiet)
    quantize(make_model(), replace(recipe, act_order=True), texts(), target("other"), quiet)
    assert calls == [0, 1, 0, 1, 2]


@pytest.mark.parametrize(
    ("recipe", "given", "part"),
    [
        (Recipe(Scheme("int4", 32), "gptq"), Texts(), "needs calibration text"),
        (Recipe(Scheme("int4", 32), "pgptq", prefix=63), texts(), "leaves nothing"),
        (RECIPES["gptq"], Texts(torch.full((2, 9), 400)), "holds token 400"),
    ],
)
def test_refusals(
    make_model: Make, target: Where, quiet: Progress, recipe: Recipe, given: Texts, part: str
) -> None:
    with pytest.raises(UserError, match=part):
        quantize(make_model(), recipe, given, target(), quiet)
    assert not list(target().folder.parent.iterdir())


@pytest.mark.parametrize(
    ("values", "part"), [({"prefix": -1}, "--prefix"), ({"damp": 0.0}, "--damp")]
)
def test_recipes_that_make_no_sense(values: dict, part: str) -> None:
    with pytest.raises(UserError, match=part):
        Recipe(Scheme("int4", 32), **values)


def test_a_target_that_is_there_is_refused_before_any_work(
    make_model: Make, target: Where, quiet: Progress
) -> None:
    where = target()
    quantize(make_model(), Recipe(Scheme("int4", 32), "rtn"), Texts(), where, quiet)
    made = files(where.folder)
    other = Recipe(Scheme("int4", 64), "rtn")
    with pytest.raises(UserError, match="already holds files"):
        quantize(make_model(), other, Texts(), where, quiet)
    assert files(where.folder) == made and not list(where.folder.parent.glob(".*"))
    quantize(make_model(), other, Texts(), replace(where, overwrite=True), quiet)
    assert files(where.folder) != made


def test_one_process_at_a_time(make_model: Make, target: Where, quiet: Progress) -> None:
    from endside.quant.stream import Workplace

    place = target().folder.with_name(".out.quantizing")
    with Workplace(place, {}), pytest.raises(UserError, match="another process"):
        quantize(make_model(), RECIPES["gptq"], texts(), target(), quiet)
