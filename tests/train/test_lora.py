"""Adapters: nothing changes at step 0, only they learn and are kept, merged they do the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from endside.errors import UserError
from endside.formats import hf
from endside.model.batch import Batch
from endside.model.presets import preset
from endside.model.transformer import Transformer
from endside.train import lora, sft
from endside.train.lora import LoraConfig, LoraLinear
from endside.train.optim import OptimConfig, make_optimizer
from endside.train.run_folder import read_checkpoint
from tests.train.conftest import dies_at
from tests.train.sums import small, write_start, write_sums

TOKENS = torch.arange(24).view(2, 12) * 7 % 320


def model_of(seed: int = 0) -> Transformer:
    model = Transformer(preset("tiny"))
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


def adapted(config: LoraConfig) -> Transformer:
    return lora.attach(model_of(), config, torch.Generator().manual_seed(1))


def stir(model: Transformer) -> None:
    """Give B values, as training does."""
    draw = torch.Generator().manual_seed(9)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            parameter.data.normal_(std=0.2, generator=draw)


def test_step_zero_is_the_base_to_the_bit() -> None:
    # PyTorch's product of a weight that is to get a gradient may take another order of sums.
    model, base, batch = (
        adapted(LoraConfig(rank=4)),
        model_of().requires_grad_(False),
        Batch(TOKENS),
    )
    with torch.no_grad():
        assert torch.equal(model(batch), base(batch))
        stir(model)
        assert not torch.allclose(model(batch), base(batch), atol=1e-2)


def test_only_adapters_learn_and_b_at_the_full_rate() -> None:
    model = adapted(LoraConfig(rank=4, targets=("q_proj", "down_proj")))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        f"layers.{i}.{part}.lora_{x}"
        for i in range(2) for part in ("self_attn.q_proj", "mlp.down_proj") for x in "ab"
    }  # fmt: skip
    assert set(model.state_dict()) == trained
    rates = {g["name"]: g["lr"] for g in make_optimizer(model, OptimConfig(0.3)).param_groups}
    assert rates == {"hidden": pytest.approx(0.1), "head": pytest.approx(0.3)}


def test_the_gradient_is_the_slope() -> None:
    base = torch.nn.Linear(6, 5, bias=False).double()
    layer = LoraLinear(base, LoraConfig(rank=2, alpha=3.0), torch.Generator().manual_seed(0))
    layer.lora_b.data.normal_(generator=torch.Generator().manual_seed(1))
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)

    def run(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"lora_a": a, "lora_b": b}, (x,))

    assert torch.autograd.gradcheck(run, (x, layer.lora_a, layer.lora_b))
    expected = x @ (base.weight + 1.5 * layer.lora_b @ layer.lora_a).T
    torch.testing.assert_close(layer(x), expected)


def test_merged_equals_unmerged() -> None:
    model = adapted(LoraConfig(rank=4))
    stir(model)
    plain = lora.merge(model)
    assert set(plain.state_dict()) == set(model_of().state_dict())
    one, other = (each(Batch(TOKENS)).detach() for each in (plain, model))
    assert float((one - other).abs().max()) <= 1e-5 * float(other.abs().max())


def test_dropout_acts_only_in_training() -> None:
    model = adapted(LoraConfig(rank=4, dropout=0.5))
    stir(model)
    torch.manual_seed(0)
    still = model.eval()(Batch(TOKENS))
    assert torch.equal(still, model(Batch(TOKENS)))
    model.train()
    assert not torch.equal(model(Batch(TOKENS)), model(Batch(TOKENS)))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("lora")
    cfg = small(write_start(folder), write_sums(folder / "sums.jsonl"))
    return replace(cfg, lora=LoraConfig(rank=4, dropout=0.1), optim=OptimConfig(0.03))


def test_a_run_keeps_adapters_resumes_and_merges(
    tuned: Any, open_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_run("whole")
    merged = sft.main(tuned, run)
    saved = read_checkpoint(run.path / "checkpoints" / "step_20")
    tensors = saved.tensors("model")
    assert all(name.endswith(("lora_a", "lora_b")) for name in tensors)
    assert saved.state["data"]["base"] == lora.fingerprint(hf.load(tuned.start))
    written = hf.load(run.path / "model")
    for one, other in zip(written.parameters(), merged.parameters(), strict=True):
        assert torch.equal(one, other)
    base, peft = hf.load(tuned.start), load_file(run.path / "adapter" / "adapter_model.safetensors")
    settings = json.loads((run.path / "adapter" / "adapter_config.json").read_text())
    scale = settings["lora_alpha"] / settings["r"]
    for layer, block in enumerate(base.layers):
        place = f"base_model.model.model.layers.{layer}.mlp.up_proj"
        product = peft[f"{place}.lora_B.weight"] @ peft[f"{place}.lora_A.weight"]
        expected = block.mlp.up_proj.weight + scale * product
        torch.testing.assert_close(written.layers[layer].mlp.up_proj.weight, expected)
    torn = open_run("torn")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sft, "next_token", dies_at(2 * 12))
        sft.main(tuned, torn)
    again = sft.main(tuned, torn)
    for one, other in zip(again.parameters(), merged.parameters(), strict=True):
        assert torch.equal(one, other)


def test_adapters_of_another_base_do_not_resume(tuned: Any, open_run: Any, tmp_path: Path) -> None:
    mine = write_start(tmp_path / "mine")
    cfg = replace(tuned, start=str(mine), steps=4, schedule=replace(tuned.schedule, decay=0))
    run = open_run()
    sft.main(cfg, run)
    hf.save(_other_weights(tuned.start), mine, tokenizer_files=Path(tuned.start), overwrite=True)
    with pytest.raises(UserError, match="the checkpoint read data with base"):
        sft.main(cfg, run)


def _other_weights(start: str) -> Transformer:
    model = hf.load(start)
    model.layers[0].mlp.up_proj.weight.data[0, 0] += 1e-3
    return model


@pytest.mark.parametrize(
    "values", [{"rank": -1}, {"alpha": 0.0}, {"dropout": 1.0}, {"targets": ("lm_head",)},
               {"targets": ()}],
)  # fmt: skip
def test_settings_that_cannot_be(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="lora"):
        LoraConfig(**values)
