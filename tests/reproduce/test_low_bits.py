"""What the two low-bit reproductions measure with, and what their sentences say."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from endside.formats import hf
from endside.model.batch import Batch
from endside.model.presets import preset
from endside.model.transformer import Transformer
from endside.quant.report import Heldout
from endside.train.loop import LoopConfig
from reproduce import bits, needle, pgptq, qat_schedule
from reproduce.qat_schedule import Run


def test_planting_is_massive_at_the_first_position_and_nearly_keeps_the_function() -> None:
    config = replace(preset("tiny"), hidden_size=64, num_hidden_layers=3)
    model = Transformer(config)
    model.init_weights(torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(2, 300, (24, 60), generator=draw)
    tokens[:, 0] = pgptq.BOS
    with torch.no_grad():
        before = model.logits(model(Batch(tokens))).softmax(-1)
        pgptq.plant(model, tokens[:16])
        after = model.logits(model(Batch(tokens))).softmax(-1)
    for layer in pgptq.peaks(model, tokens[16:]):
        assert layer["first"] > 2 * layer["elsewhere"]
        assert layer["first"] > 300 * layer["median"]
    moved = (after - before)[:, 4:].abs().sum(-1).mean() / 2
    assert moved < 0.2, "more than the planted channels changed"


def test_the_detector_tells_one_vector_from_the_others() -> None:
    draw = torch.Generator().manual_seed(2)
    others = torch.randn(500, 12, generator=draw, dtype=torch.float64)
    first = torch.randn(12, generator=draw, dtype=torch.float64) * 3
    direction = pgptq.detector(first, others).double()
    assert direction @ first == pytest.approx(1.0, rel=1e-6)
    assert (others @ direction).square().mean().sqrt() < 1.2 / first.norm()


def cell(weights: str, method: str, after: float, apart: float) -> pgptq.Cell:
    return pgptq.Cell(weights, method, [Heldout(50.0, after, apart, apart / 2, 9)], 0.01)


def test_the_verdict_says_which_was_better(tmp_path: Path) -> None:
    made = {"round-to-nearest": (60.0, 9e-3), "GPTQ": (52.0, 4e-3), "P-GPTQ": (51.0, 2e-3),
            "smoothed GPTQ": (51.0, 2e-3), "smoothed P-GPTQ": (51.5, 3e-3)}  # fmt: skip
    cells = [cell("planted", name, *values) for name, values in made.items()]
    said = pgptq.verdict(cells)
    assert "P-GPTQ is no worse than GPTQ in perplexity (+2.00% against +4.00%)" in said[0]
    assert "differs by -50%, -50% without" in said[0]
    assert "smoothed P-GPTQ is worse than" in said[1] and "differs by +50%" in said[1]
    assert said[2].endswith("+4.00%")
    assert "+20.00%" in pgptq.table(cells)
    pgptq.plot(cells, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def runs(*losses: float) -> list[Run]:
    shares = [Run("ternary", s, 5e-3, x) for s, x in zip(qat_schedule.SHARES, losses, strict=True)]
    scratch = [Run("scratch", 0.0, 1e-2, 2.0), Run("scratch", 0.0, 5e-3, 2.1)]
    return [*scratch, *shares, Run("high precision", 1.0, 1e-2, 1.8)]


@pytest.mark.parametrize(
    ("losses", "parts"),
    [
        ((2.0, 2.01, 2.018, 2.2), ("at most +0.90%", "held;", "20 % it is +10.00%")),
        ((1.9, 2.05, 1.9, 1.9), ("at most +2.50%", "did not hold;", "-5.00%")),
    ],
)
def test_the_claim_is_about_forty_percent_or_more(
    losses: tuple[float, ...], parts: tuple[str, ...], tmp_path: Path
) -> None:
    said = qat_schedule.verdict(runs(*losses))
    assert all(part in said for part in parts), said
    assert qat_schedule.baseline(runs(*losses)).learning_rate == 1e-2
    assert "+5.00%" in qat_schedule.table(runs(*losses)), "the worse scratch run is in the table"
    qat_schedule.plot(runs(*losses), tmp_path / "plot.png", "a note")
    assert (tmp_path / "plot.png").stat().st_size > 1000


@pytest.mark.parametrize("steps", [40, 1000])
def test_every_run_spends_the_same_budget(steps: int, tmp_path: Path) -> None:
    base = qat_schedule.config(tmp_path, steps)
    assert base.schedule.decay == 0 and base.steps == 0.8 * steps
    for number, share in enumerate(qat_schedule.SHARES, start=1):
        spent = number * (steps // 5)
        assert spent == round(share * steps) and spent % base.checkpoint_every == 0
        cfg = qat_schedule.low_bits(base, steps - spent, "x", 5e-3, seed=1)
        assert cfg.schedule.warmup == steps // 20
        assert cfg.schedule.decay == min(round(0.2 * steps), steps - spent - steps // 20)
        assert cfg.model.vocab_size == 257 and cfg.group == qat_schedule.GROUP
    assert sum(p.numel() for p in Transformer(base.model).parameters()) < 1_000_000


@pytest.mark.parametrize("config", [pgptq.Training, needle.Stage])
def test_configurations_of_their_own_have_all_that_the_loop_reads(config: type) -> None:
    assert set(LoopConfig.__annotations__) <= {one.name for one in fields(config)}


def test_float_weights_are_measured_as_pytorch_measures_them(tmp_path: Path) -> None:
    """And every rounding is counted against them: coarser codes, wider apart."""
    config = replace(preset("tiny"), hidden_size=128, intermediate_size=256)
    model = Transformer(config)
    model.init_weights(torch.Generator().manual_seed(0))
    folder = hf.save(model, tmp_path / "model", dtype="float32")
    tokens = np.random.default_rng(1).integers(2, config.vocab_size, (3, 33))
    with torch.no_grad():
        given = torch.tensor(tokens[:, :-1])
        want = model.logits(model(Batch(given))).log_softmax(-1)
    said = bits.setting(folder, tokens, "none", "none", "f16")
    assert np.abs(said - want.numpy()).max() < 1e-2
    chosen = want.gather(-1, torch.tensor(tokens[:, 1:, None]))
    assert bits.perplexity(said, tokens) == pytest.approx((-chosen.mean()).exp().item(), rel=1e-3)
    made = {(row.blocks, row.head, row.cache): row for row in bits.measure(folder, tokens)}
    assert made["none", "none", "f16"].apart == 0 and made["none", "none", "f16"].same == 1
    fine, coarse = made["none", "int8", "f16"], made["none", "int4", "f16"]
    assert 0 < fine.apart < coarse.apart < made["int4", "int4", "f16"].apart
    assert "+0.00%" in bits.table(list(made.values()))
