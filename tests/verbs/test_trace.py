"""`endside trace`: executors agree stage by stage, and a damaged layer is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from endside import cli, native
from endside.formats import hf
from endside.model.presets import preset
from endside.model.transformer import Transformer
from endside.ops.infllm.config import SparseConfig
from endside.tokenizer import train_bpe
from endside.verbs.trace import Side, compare

needs_core = pytest.mark.skipif(not native.available_isas(), reason="no native core here")
TEXT = ["the quick brown fox jumps over the lazy dog, again and again. " * 40]


class Made:
    """A sparse model of six layers, and the same with one layer damaged."""

    def __init__(self, place: Path) -> None:
        self.place = place
        tokenizer = train_bpe(iter(TEXT), 300)
        tokenizer.save(place / "text")
        sparse = SparseConfig(window_size=64, topk=2, dense_len=128)
        config = replace(
            preset("tiny-sparse"), vocab_size=tokenizer.vocab_size, num_hidden_layers=6,
            sparse=sparse, bos_token_id=tokenizer.bos_id, eos_token_ids=tuple(tokenizer.eos_ids),
        )  # fmt: skip
        self.model = Transformer(config)
        self.model.init_weights(torch.Generator().manual_seed(3))
        self.whole = self.save("whole")

    def save(self, name: str) -> Path:
        return hf.save(self.model, self.place / name, tokenizer_files=self.place / "text")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("trace"))


def _trace(capsys: pytest.CaptureFixture[str], *argv: object) -> dict:
    with pytest.raises(SystemExit) as left:
        cli.main(["trace", *map(str, argv), "--json"])
    said = capsys.readouterr()
    assert not left.value.code, said.err
    return json.loads(said.out)


STAGES = ["embed", *(f"layer {n}" for n in range(6)), "norm", "logits"]


@needs_core
def test_torch_and_native_agree(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    """900 tokens, so that sparse attention, several calls and several chunks are compared."""
    sides = (f"{made.whole}:torch", f"{made.whole}:native")
    report = _trace(capsys, *sides, "--tokens", "900", "--tolerance", "0.01")
    assert [one["stage"] for one in report["stages"]] == STAGES
    assert report["first"] is None and report["tokens"] == 900
    assert 0 < report["stages"][-1]["relative"] < 0.01
    few = _trace(capsys, sides[0], f"{made.whole}:native,quant=int4,group=32")
    assert few["first"]["stage"] == "layer 0"
    assert few["stages"][-1]["relative"] > 10 * report["stages"][-1]["relative"]


@pytest.mark.parametrize("layer", [0, 3, 5])
@pytest.mark.parametrize("executor", ["torch", pytest.param("native", marks=needs_core)])
def test_a_damaged_layer_is_named(
    made: Made, layer: int, executor: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with torch.no_grad():
        weight = made.model.layers[layer].mlp.down_proj.weight
        before = weight.clone()
        weight[:, :8] *= -1
        damaged = made.save(f"damaged-{executor}-{layer}")
        weight.copy_(before)
    report = _trace(capsys, f"{made.whole}:torch", f"{damaged}:{executor}")
    assert report["first"]["stage"] == f"layer {layer}"
    assert report["first"]["relative"] > 0.02


def test_a_damaged_head_is_named(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    """The table says it in words."""
    with torch.no_grad():
        made.model.norm.weight[5] += 4
        damaged = made.save("norm")
        made.model.norm.weight[5] -= 4
    with pytest.raises(SystemExit) as left:
        cli.main(["trace", f"{made.whole}:torch", f"{damaged}:torch", "--prompt", "the fox"])
    out = capsys.readouterr().out
    assert not left.value.code
    assert "norm is the first stage to differ by more than 0.02" in out
    assert out.count("0.000e+00") == 14, "stages before it are equal"


def test_one_wrong_row_is_enough() -> None:
    """The worst row counts, also one that is not a number."""
    rng = np.random.default_rng(0)
    a = {"embed": rng.normal(size=(200, 8)).astype(np.float32)}
    b = {"embed": a["embed"].copy()}
    b["embed"][77] *= 1.5
    (stage,) = compare(a, b)
    assert stage.row == 77 and stage.relative == pytest.approx(0.5)
    assert stage.cosine == pytest.approx(1)
    b["embed"][12, 3] = np.nan
    (stage,) = compare(a, b)
    assert stage.row == 12 and stage.relative == np.inf


def test_what_a_side_says() -> None:
    side = Side.parse("org/a:b:native,quant=int4,group=64,threads=1", 99)
    assert (side.model, side.plan.executor, side.plan.quant) == ("org/a:b", "native", "int4")
    assert (side.plan.group, side.plan.context) == (64, 99)
    assert Side.parse("c:/m.gguf").model == "c:/m.gguf"
    assert Side.parse("m,context=5", 99).plan.context == 5


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("{m}:torch,bits=4", "{m}"), "is no option: write NAME=VALUE"),
        (("{m}:torch,quant=int5", "{m}"), "quant is 'int5'"),
        (("{m}:torch", "{m}:torch", "--tokens", "0"), "at least one is needed"),
        (("{m}:torch", "no/such/place:torch"), "is neither a folder"),
        (("{m}:torch", "{m}:torch", "--prompt", "a", "--file", "b"), "both --prompt and --file"),
    ],
)
def test_what_is_refused(
    made: Made, argv: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["trace", *(one.format(m=made.whole) for one in argv)])
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_models_of_other_shapes(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    model = Transformer(replace(made.model.config, num_hidden_layers=2))
    model.init_weights(torch.Generator().manual_seed(3))
    other = hf.save(model, made.place / "two", tokenizer_files=made.place / "text")
    with pytest.raises(SystemExit) as left:
        cli.main(["trace", f"{made.whole}:torch", f"{other}:torch"])
    assert left.value.code == 2
    assert "compare two forms of one model" in capsys.readouterr().err
