"""Every switch of a training run acts, and does what its comment says and no more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from endside.data.loader import TokenBatch
from endside.errors import UserError
from endside.model.block import Block
from endside.train import pretrain
from endside.train.losses import LossConfig, next_token
from endside.train.pretrain import PretrainConfig
from endside.train.qat import QatConfig, make_model
from endside.train.run_folder import RunFolder, read_checkpoint
from tests.train.conftest import records


@pytest.fixture
def short(cfg: PretrainConfig) -> PretrainConfig:
    return replace(cfg, steps=8, schedule=replace(cfg.schedule, warmup=2, decay=0))


def train(cfg: PretrainConfig, run: RunFolder) -> list[dict]:
    pretrain.main(cfg, run)
    return records(run.path)


def losses(found: list[dict], key: str = "loss") -> list[float]:
    return [record[key] for record in found if key in record]


def kept_bytes(model: torch.nn.Module, cfg: PretrainConfig) -> int:
    """Bytes that the backward pass of one batch of 4 x 100 tokens will need, each tensor once."""
    tokens = torch.randint(0, 320, (4, 101), generator=torch.Generator().manual_seed(1))
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = next_token(cfg.loss)(model, TokenBatch(tokens, torch.zeros_like(tokens)))
    assert loss.total.requires_grad
    return sum(kept.values())


def test_recomputed_activations_are_the_same_bits_in_less_memory(
    short: PretrainConfig, open_run: Callable[..., RunFolder]
) -> None:
    short = replace(short, steps=3, model=replace(short.model, num_hidden_layers=3, mtp_layers=1))
    again = replace(short, checkpoint_activations=True)
    assert train(again, open_run("again")) == train(short, open_run("plain"))
    # The logits are the same in both; of the blocks, only their inputs are left.
    plain, less = (kept_bytes(pretrain.make_model(cfg), cfg) for cfg in (short, again))
    print(f"kept for the backward pass: {plain} bytes, recomputing {less}")
    assert less < plain / 2


def test_recomputing_runs_each_block_twice(short: PretrainConfig) -> None:
    calls = []
    for wanted in (False, True):
        model = pretrain.make_model(replace(short, checkpoint_activations=wanted))
        inner = [m for m in model.modules() if isinstance(m, Block)]
        count = []
        for block in inner:
            block.mlp.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        tokens = torch.zeros(1, 9, dtype=torch.int64)
        next_token(LossConfig())(model, TokenBatch(tokens, tokens)).total.backward()
        calls.append(len(count))
    assert calls == [2, 4]


def test_fp8_rounds_the_blocks_alone_and_keeps_full_weights(
    short: PretrainConfig, open_run: Callable[..., RunFolder], quiet: Any
) -> None:
    short = replace(short, model=replace(short.model, tie_word_embeddings=False))
    half = train(replace(short, precision="bfloat16"), open_run("half"))
    run = open_run("fp8")
    model = pretrain.main(replace(short, precision="fp8"), run)
    eighth = records(run.path)
    assert quiet.text().count("precision fp8: emulated, because a CPU has no FP8 product") == 1
    assert losses(eighth) != losses(half)
    assert losses(eighth) == pytest.approx(losses(half), abs=0.1)
    saved = run.latest()
    for part in ("model", "optimizer"):
        assert {t.dtype for t in saved.tensors(part).values()} == {torch.float32}
    # The trained model has its plain products back.
    x = torch.randn(3, 48)
    projection = model.layers[0].mlp.gate_proj
    assert torch.equal(projection(x), x @ projection.weight.t())


def test_which_products_are_in_fp8(short: PretrainConfig) -> None:
    from endside.train.precision import Products

    model = pretrain.make_model(replace(short, model=replace(short.model, mtp_layers=1)))
    plain = {n: m.product for n, m in model.named_modules() if hasattr(m, "product")}
    products = Products(model, "fp8", note=lambda _: None)
    changed = {n for n, m in model.named_modules() if n in plain and m.product is not plain[n]}
    assert changed == {name for name in plain if name != "lm_head"}
    assert "mtp.proj" in changed
    assert "layers.1.self_attn.o_proj" in changed
    with products.exact():
        assert all(m.product is plain[n] for n, m in model.named_modules() if n in plain)
    products.remove()
    assert all(m.product is plain[n] for n, m in model.named_modules() if n in plain)


def test_fp8_multiplies_low_bit_weights_too(short: PretrainConfig) -> None:
    from endside.train.precision import Products

    values = {name: getattr(short, name) for name in ("model", "data", "steps", "batch")}
    model = make_model(QatConfig(**values, schedule=short.schedule, group=32))
    tokens = torch.randint(0, 320, (2, 20), generator=torch.Generator().manual_seed(1))
    batch = TokenBatch(tokens, torch.zeros_like(tokens))
    before = next_token(LossConfig())(model, batch).loss
    Products(model, "fp8", note=lambda _: None)
    after = next_token(LossConfig())(model, batch).loss
    assert 0 < abs(before - after) < 0.1


def test_the_z_term_pulls_the_normaliser_to_zero(
    short: PretrainConfig, open_run: Callable[..., RunFolder]
) -> None:
    weak, strong = (
        train(replace(short, loss=LossConfig(z_weight=weight)), open_run(str(weight)))
        for weight in (1e-9, 1.0)
    )
    plain = train(short, open_run("plain"))
    assert "z_loss" not in plain[0]
    assert weak[0]["z_loss"] == strong[0]["z_loss"] > 10
    assert losses(weak) == pytest.approx(losses(plain), abs=1e-4)
    assert losses(strong, "z_loss")[-1] < losses(weak, "z_loss")[-1] - 1
    held = losses(strong, "heldout_loss")
    assert held == pytest.approx([losses(strong)[-1]], abs=0.9), "held-out loss is without it"


def test_the_average_follows_resumes_and_is_exported_on_request(
    short: PretrainConfig, open_run: Callable[..., RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = replace(short, ema=0.75, checkpoint_every=3, eval_every=4)
    seen, step = [], torch.optim.AdamW.step

    def watched(self: torch.optim.AdamW) -> None:
        step(self)
        seen.append(self.param_groups[0]["params"][0].detach().double().clone())

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", watched)
        run = open_run("whole")
        last = pretrain.main(cfg, run)
    name = next(n for n, p in last.named_parameters() if p.shape == seen[0].shape and p.dim() > 1)
    want = dict(pretrain.make_model(cfg).named_parameters())[name].detach().double()
    for weights in seen:
        want = want + 0.25 * (weights - want)
    ema = run.latest().tensors("ema")
    torch.testing.assert_close(ema[name].double(), want, rtol=0, atol=1e-6)
    assert losses(records(run.path)) == losses(train(short, open_run("plain"))), (
        "training ignores it"
    )
    assert losses(records(run.path), "ema_heldout_loss") != losses(
        records(run.path), "heldout_loss"
    )
    assert not torch.equal(dict(last.named_parameters())[name], ema[name])
    # A finished run is exported again, averaged.
    averaged = pretrain.main(replace(cfg, export="ema"), run)
    assert all(torch.equal(p, ema[n]) for n, p in averaged.named_parameters())
    # A run that died goes on with the same average, bit for bit.
    torn, calls = open_run("torn"), []

    def dies(self: torch.optim.AdamW) -> None:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        step(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.optim.AdamW, "step", dies)
        pretrain.main(cfg, torn)
    pretrain.main(cfg, torn)
    again = torn.latest().tensors("ema")
    assert all(torch.equal(again[n], ema[n]) for n in ema)
    assert records(torn.path) == records(run.path)


def test_init_from_takes_the_weights_and_nothing_else(
    short: PretrainConfig, open_run: Callable[..., RunFolder]
) -> None:
    first = open_run("first")
    pretrain.main(short, first)
    origin = first.path / "checkpoints" / "step_8"
    second = replace(short, init_from=str(origin), steps=4)
    model, weights = pretrain.make_model(second), read_checkpoint(origin).tensors("model")
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    run = open_run("second")
    found = train(second, run)
    assert [record["step"] for record in found if "loss" in record] == [1, 2, 3, 4]
    assert losses(found)[0] < losses(records(first.path))[0] - 0.5
    assert losses(found, "learning_rate")[0] == pytest.approx(0.005), "warmed up again"
    assert run.latest().state["data"]["consumed"] == 4 * short.batch * short.accumulate
    wider = replace(second, model=replace(short.model, intermediate_size=99))
    with pytest.raises(UserError, match=r"init_from .* is of another model: layers\.0\.mlp\.down"):
        pretrain.main(wider, open_run("wider"))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"ema": 1.0}, "ema is 1.0"),
        ({"export": "ema"}, 'export is "ema" but none is kept'),
        ({"init_from": "a", "decay_from": "b"}, "give one of them"),
        ({"loss": {"z_weight": -1.0}}, r"z_weight -1\.0"),
    ],
)
def test_contradictions(short: PretrainConfig, change: dict, part: str) -> None:
    with pytest.raises(UserError, match=part):
        if "loss" in change:
            LossConfig(**change["loss"])
        replace(short, **change)
