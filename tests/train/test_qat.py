"""Training in low bits: starts from a checkpoint, re-warms, resumes, and is packed without loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from endside.checkpoint import Checkpoint
from endside.config import dump
from endside.data.loader import Loader, LoaderConfig
from endside.data.pack import open_packed
from endside.errors import UserError
from endside.formats import hf
from endside.log import read_metrics
from endside.quant.pack import Scheme, from_arrays, stored_names
from endside.quant.ternary import FakeLinear, fake_quantized
from endside.train import pretrain, qat
from endside.train.losses import model_batch
from endside.train.pretrain import PretrainConfig
from endside.train.qat import QatConfig
from endside.train.run_folder import read_checkpoint
from endside.train.schedule import ScheduleConfig
from endside.verbs import qat as verb
from tests.train.conftest import dies_at


@pytest.fixture
def stable(cfg: PretrainConfig, open_run: Callable[..., Any]) -> Path:
    """The last checkpoint of a stable high-precision run of 10 steps."""
    base = replace(cfg, steps=10, schedule=ScheduleConfig(warmup=4))
    with open_run("stable") as run:
        pretrain.main(base, run)
        return run.path / "checkpoints" / "step_10"


def low_bits(cfg: PretrainConfig, start: Path | str, **changes: Any) -> QatConfig:
    values = {field.name: getattr(cfg, field.name) for field in fields(cfg)}
    values |= {"steps": 12, "schedule": ScheduleConfig(warmup=4, decay=4), "eval_every": 4}
    return QatConfig(**{**values, "init_from": str(start), "group": 32, **changes})


def test_it_begins_with_the_weights_of_the_checkpoint(cfg: PretrainConfig, stable: Path) -> None:
    model = qat.make_model(low_bits(cfg, stable))
    plain = read_checkpoint(stable).tensors("model")
    assert {n: t.shape for n, t in plain.items()} == {
        n: t.shape for n, t in model.state_dict().items()
    }
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, plain[name])
    assert isinstance(model.layers[0].self_attn.q_proj, FakeLinear)
    scratch = qat.make_model(low_bits(cfg, ""))
    assert not torch.equal(scratch.norm.weight, model.norm.weight)


def test_a_model_folder_is_a_start_too(cfg: PretrainConfig, stable: Path, tmp_path: Path) -> None:
    plain = pretrain.make_model(cfg)
    plain.load_state_dict(read_checkpoint(stable).tensors("model"))
    hf.save(plain, tmp_path / "model", dtype="float32")
    ours, theirs = (qat.make_model(low_bits(cfg, s)) for s in (tmp_path / "model", stable))
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_learning_rate_is_warmed_again_and_the_loss_falls(
    cfg: PretrainConfig, stable: Path, open_run: Callable[..., Any]
) -> None:
    with open_run("qat") as run:
        qat.main(low_bits(cfg, stable, steps=30), run)
        records = read_metrics(run.path / "metrics.jsonl")
    rates = [record["learning_rate"] for record in records if "learning_rate" in record]
    assert rates[:5] == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01])
    assert rates[-1] == pytest.approx(0.001)
    held = [record["heldout_loss"] for record in records if "heldout_loss" in record]
    assert held[-1] < held[0] - 0.05
    latent = [r for r in records if "loss" in r]
    assert len(latent) == 30


def test_a_run_that_stopped_goes_on_to_the_same_weights(
    cfg: PretrainConfig, stable: Path, open_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = low_bits(cfg, stable, checkpoint_every=5)
    with open_run("whole") as run:
        whole = qat.main(chosen, run)
    with open_run("torn") as run:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(pretrain, "next_token", dies_at(2 * 7))
            qat.main(chosen, run)
        torn = qat.main(chosen, run)
    for one, other in zip(whole.parameters(), torn.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["ternary", "int4"])
def test_the_verb_packs_what_training_saw(
    cfg: PretrainConfig, stable: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture
) -> None:
    chosen = low_bits(cfg, "", kind=kind)
    path = tmp_path / "run.toml"
    path.write_text(dump(chosen))
    verb.main([str(path), "--init-from", str(stable), f"run={tmp_path / 'out'}"])
    assert str(tmp_path / "out" / "model") in capsys.readouterr().out
    latent = read_checkpoint(tmp_path / "out" / "checkpoints" / "step_12").tensors("model")
    folder = Checkpoint.open(tmp_path / "out" / "model")
    scheme = Scheme.from_config(folder.config["quantization_config"])
    assert scheme == Scheme(kind, 32)
    plain = pretrain.make_model(chosen)
    state = {}
    for name, weight in latent.items():
        stored = hf.hf_name(name)
        if not name.endswith("_proj.weight"):
            state[name] = folder.torch(stored)
            assert torch.equal(state[name], weight)
            continue
        base = stored.removesuffix(".weight")
        arrays = {
            part: folder.numpy(part)
            for part in stored_names(base).values()
            if part in folder.tensors
        }
        linear = from_arrays(base, arrays, scheme, weight.shape[1])
        np.testing.assert_array_equal(linear.dequantize(), fake_quantized(weight, scheme).numpy())
        state[name] = torch.from_numpy(linear.dequantize())
    plain.load_state_dict(state)
    trained = qat.make_model(chosen)
    trained.load_state_dict(latent)
    batch = next(Loader(open_packed(cfg.data.shards), LoaderConfig(2, 40, 0)))
    inputs = model_batch(batch)
    assert torch.equal(plain(inputs), trained(inputs))


def test_refusals(cfg: PretrainConfig, stable: Path) -> None:
    with pytest.raises(UserError, match="group is 48"):
        low_bits(cfg, stable, group=48)
    wider = low_bits(cfg, stable, model=replace(cfg.model, intermediate_size=100))
    with pytest.raises(UserError, match=r"is of another model: layers.0.mlp.down_proj.weight"):
        qat.make_model(wider)
