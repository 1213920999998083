"""The coordinate check says flat for muP, and not flat as soon as one of its factors is missing."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from endside import cli
from endside.errors import UserError
from endside.model.presets import preset
from endside.train import coordinate
from endside.train.coordinate import KINDS, Coordinate
from endside.train.pretrain import PretrainConfig

WIDTHS = (32, 64, 128, 256)


@pytest.fixture
def narrow(cfg: PretrainConfig) -> PretrainConfig:
    """A model whose narrowest version has two heads, and batches of 4 x 48."""
    model = replace(
        preset("tiny"), hidden_size=64, intermediate_size=160, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, dim_model_base=32, tie_word_embeddings=True,
    )  # fmt: skip
    return replace(cfg, model=model, batch=4)


def test_mup_is_flat_at_every_width(narrow: PretrainConfig) -> None:
    found = coordinate.check(narrow, WIDTHS, steps=4, seeds=1)
    assert len(found) == len(WIDTHS) * 5 * len(KINDS)
    assert all(one.size > 0 and (one.change > 0) == (one.step > 0) for one in found)
    trends = coordinate.trends(found)
    assert coordinate.sound(trends), coordinate.table(found)


def test_nothing_scaled_grows(narrow: PretrainConfig) -> None:
    standard = replace(narrow, model=replace(narrow.model, dim_model_base=None))
    trends = coordinate.last(
        coordinate.trends(coordinate.check(standard, WIDTHS, steps=4, seeds=1))
    )
    assert not coordinate.sound(trends)
    growing = {(t.kind, t.quantity) for t in trends if t.verdict == "growing"}
    assert {("residual", "size"), ("residual", "change"), ("mlp out", "change")} <= growing


@pytest.mark.parametrize("missing", ["rate", "start"])
def test_one_missing_factor_is_enough(
    narrow: PretrainConfig, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rates that do not fall, or initial matrices that do not, with the width."""
    make_optimizer, make_model = coordinate.make_optimizer, coordinate.make_model

    def same_rate(model, optim):
        optimizer = make_optimizer(model, optim)
        for group in optimizer.param_groups:
            group["lr"] = optim.learning_rate
        return optimizer

    def same_start(cfg):
        model = make_model(cfg)
        with torch.no_grad():
            for weight in (p for layer in model.layers for p in layer.parameters() if p.dim() == 2):
                weight.mul_(cfg.model.logit_divisor**0.5)
        return model

    if missing == "rate":
        monkeypatch.setattr(coordinate, "make_optimizer", same_rate)
    else:
        monkeypatch.setattr(coordinate, "make_model", same_start)
    trends = coordinate.trends(coordinate.check(narrow, WIDTHS, steps=2, seeds=1))
    assert not coordinate.sound(trends)
    bad = {trend.quantity for trend in coordinate.last(trends) if not trend.sound}
    assert "change" in bad


def test_slope_and_what_it_means() -> None:
    assert coordinate.slope([64, 128, 256, 512], [3.0, 6.0, 12.0, 24.0]) == pytest.approx(1.0)
    assert coordinate.slope([64, 128, 256, 512], [8.0, 8.0, 8.0, 8.0]) == pytest.approx(0.0)
    assert coordinate.slope([1, 4, 16, 64], [8.0, 4.0, 2.0, 1.0]) == pytest.approx(-0.5)
    assert math.isnan(coordinate.slope([1, 2, 4, 8], [1.0, 0.0, 1.0, 1.0]))
    trend = coordinate.Trend("logits", "size", 4, -0.5)
    assert trend.verdict == "shrinking" and trend.sound
    assert not replace(trend, quantity="change").sound
    assert not replace(trend, slope=0.3).sound and replace(trend, slope=0.2).verdict == "flat"
    assert not coordinate.sound([replace(trend, slope=math.nan)])


def test_trends_are_per_kind_and_step() -> None:
    found = [
        Coordinate(w, step, kind, size=1.0, change=step * w / 64)
        for w in WIDTHS for step in (0, 1) for kind in KINDS
    ]  # fmt: skip
    trends = coordinate.trends(found)
    assert len(trends) == 3 * len(KINDS)
    for trend in trends:
        assert trend.slope == pytest.approx(float(trend.quantity == "change"), abs=1e-12)


def test_widths_keep_the_heads_and_must_fit() -> None:
    model = preset("minicpm4-0.5b")
    wide = coordinate.at_width(model, 2048)
    assert (wide.num_attention_heads, wide.num_key_value_heads, wide.head_dim) == (32, 4, 64)
    assert wide.intermediate_size == 8192 and wide.logit_divisor == 8
    assert coordinate.at_width(model, 1024) == model
    assert coordinate.at_width(model, 128).num_key_value_heads == 1
    assert coordinate.default_widths(model) == (128, 256, 512, 1024)
    with pytest.raises(UserError, match=r"width 100 would need 1\.5625 heads"):
        coordinate.at_width(model, 100)


def test_fewer_than_four_widths_are_refused(narrow: PretrainConfig) -> None:
    with pytest.raises(UserError, match="at least 4 different widths"):
        coordinate.check(narrow, (32, 64, 128, 128))


@pytest.mark.parametrize(("base", "code"), [("dim_model_base = 32", 0), ("", 1)])
def test_verb_prints_writes_and_says_so_by_its_exit_code(
    base: str, code: int, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "run.toml", tmp_path / "deep" / "check.json"
    path.write_text(
        f"""steps = 200\nbatch = 4\nseq_len = 32\ndata.shards = "{shards}"
        [model]\nvocab_size = 320\nhidden_size = 64\nnum_hidden_layers = 2
        num_attention_heads = 4\nhead_dim = 16\nnum_key_value_heads = 2
        intermediate_size = 128\nmax_position_embeddings = 512\nscale_emb = 12.0
        scale_depth = 1.4\ntie_word_embeddings = true\n{base}\n"""
    )
    flags = [f"--out={out}", "--widths=32,64,128,256", "--steps=5", "--seeds=1"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["check", str(path), "batch=2", *flags])
    said = capsys.readouterr().out
    report = json.loads(out.read_text())
    assert (ended.value.code or 0) == code and report["flat"] == (code == 0), said
    assert "mlp out" in said and ("not flat" in said) == (code == 1)
    assert report["widths"] == [32, 64, 128, 256] and len(report["coordinates"]) == 4 * 6 * 5
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
