"""mup, wsd, mtp and fp8: what they conclude from given losses, and each of them run tiny."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from endside.data.pack import PackConfig, byte_encoder, pack
from reproduce import fp8, mtp, mup, small, wsd
from reproduce.fp8 import Run as Fp8Run
from reproduce.mup import Cell
from reproduce.wsd import End
from tests.train.conftest import sentences


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Where shards are there already, so that nothing large is packed."""
    pack(sentences(200), tmp_path / "bytes", byte_encoder(), PackConfig(heldout_share=0.2))
    return tmp_path


def run(script: ModuleType, work: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> dict:
    """The script's main on a small corpus; its JSON. The picture must be one."""
    out = work / "out" / "result.json"
    flags = ("x", f"--work={work}", f"--out={out}", *flags)
    monkeypatch.setattr(sys, "argv", list(flags))
    script.main()
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    return json.loads(out.read_text())


def cells(name: str, width: int, losses: dict[int, float]) -> list[Cell]:
    return [Cell(name, width, power, (loss, loss + 0.02)) for power, loss in losses.items()]


def test_the_best_rate_is_the_lowest_and_between_its_neighbours() -> None:
    found = mup.best(cells("muP", 64, {-9: 2.5, -8: 2.2, -7: 2.1, -6: 2.3, -5: 2.6}))
    assert found.power == -7 and found.inside and found.loss == pytest.approx(2.11)
    assert found.between == pytest.approx(-7 - 1 / 6)
    assert not mup.best(cells("muP", 64, {-9: 2.0, -8: 2.2, -7: 2.3})).inside


def test_mup_verdict_wants_one_step_inside_the_grid_and_a_control_that_moves() -> None:
    at = {p: {q: 2.0 + abs(q - p) for q in mup.GRID} for p in mup.GRID}

    def verdict(powers: list[int], control: list[int]) -> str:
        found = [mup.best(cells("muP", 64 * 2**i, at[p])) for i, p in enumerate(powers)]
        found += [mup.best(cells("control", 64 * 2**i, at[p])) for i, p in enumerate(control)]
        return mup.verdict(found)

    assert "claim held; nothing scaled, 64 to 256: 2, it moves further" in verdict(
        [-7, -7, -6, -7], [-6, -7, -8]
    )
    assert "did not hold" in verdict([-6, -7, -8], [])
    assert "a weak test" in verdict([-7, -7], [-7, -7])
    assert "edge of the grid" in verdict([-9, -9], [])
    table = mup.table(cells("muP", 64, at[-7]) + cells("control", 64, at[-6]))
    assert "2.0100*" in table and "at most 0.0200" in table


def test_the_grid_grows_where_its_edge_is_best(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def measure(name: str, width: int, power: int, _: mup.Flags) -> Cell:
        asked.append(power)
        return Cell(name, width, power, (abs(power + 11.0),))

    monkeypatch.setattr(mup, "measure", measure)
    row = list(mup.sweep("muP", 64, mup.Flags(Path())))
    assert asked == [*mup.GRID, -10, -11, -12] and mup.best(row).power == -11
    assert mup.seeds_of(512, 512, 3) == range(1) and mup.seeds_of(64, 512, 3) == range(3)


def test_mup_tiny(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mup, "GRID", (-8, -7))
    monkeypatch.setattr(mup, "REACH", (-8, -7))
    flags = ("--widths=64,128", "--control=64", "--steps=4", "--seeds=1")
    result = run(mup, work, monkeypatch, *flags)
    assert [one["width"] for one in result["best"]] == [64, 128, 64]
    assert len(result["cells"]) == 6 and result["tokens"] == 4 * 512


def test_wsd_verdict_compares_with_the_best_cosine() -> None:
    ends = [
        End("cosine", 300, 0.01, 2.00, 300), End("cosine", 300, 0.02, 2.10, 300),
        End("cosine", 300, 0.005, 2.20, 300), End("WSD 10%", 300, 0.01, 2.03, 30),
        End("WSD 20%", 300, 0.01, 2.01, 60), End("stable", 270, 0.01, 2.3, 270),
    ]  # fmt: skip
    said = wsd.verdict(ends)
    assert "+0.50% at 300 steps" in said and "held." in said and "360 branched, 900" in said
    worse = [replace(end, loss=2.05) if end.name == "WSD 20%" else end for end in ends]
    assert "+1.50%" in wsd.verdict(worse) and "did not hold" in wsd.verdict(worse)
    faster = [replace(e, rate=0.03) if e.loss == 2.00 else e for e in ends]
    assert "at the edge of its rates at [300]" in wsd.verdict(faster)
    assert "+5.00%" in wsd.table(ends)


def test_wsd_tiny(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wsd, "MULTIPLES", (1,))
    monkeypatch.setattr(wsd, "COSINE_RATES", (wsd.RATE,))
    ends = run(wsd, work, monkeypatch, "--unit=10")["ends"]
    assert [(e["name"], e["cost"]) for e in ends] == [
        ("stable", 9), ("WSD 10%", 1), ("WSD 20%", 2), ("cosine", 10)
    ]  # fmt: skip


def test_mtp_verdict_is_about_pairs_of_seeds() -> None:
    draft = mtp.Draft(1.8, 0.7, 0.3, 100)
    pairs = [(2.0, 2.04), (1.9, 1.919)]
    runs = [
        mtp.Run(weight, seed, loss, draft if weight else None)
        for seed, both in enumerate(pairs)
        for weight, loss in zip(mtp.WEIGHTS, both, strict=True)
    ]
    assert mtp.gaps(runs) == pytest.approx([0.02, 0.01])
    assert "harms" in mtp.verdict(runs) and "did not hold" in mtp.verdict(runs)
    better = [replace(one, loss=1.8) if one.weight else one for one in runs]
    assert "helps" in mtp.verdict(better) and "accepted 70%" in mtp.verdict(better)


def test_mtp_tiny(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mtp, "ROWS", 4)
    without, with_layer = run(mtp, work, monkeypatch, "--steps=3", "--seeds=1")["runs"]
    assert without["draft"] is None and with_layer["draft"]["guesses"] > 50
    assert 0 <= with_layer["draft"]["accepted"] <= 1 and with_layer["draft"]["prior"] > 0


def test_fp8_verdict_stands_beside_the_spread_of_seeds() -> None:
    runs = [
        Fp8Run("float32", 0, 2.00), Fp8Run("float32", 1, 2.04), Fp8Run("bfloat16", 0, 2.00),
        Fp8Run("fp8", 0, 2.004),
    ]  # fmt: skip
    said = fp8.verdict(runs)
    assert "+0.20% from BF16" in said and "seeds differ by 2.00%" in said and " held" in said
    runs[-1] = replace(runs[-1], loss=2.02)
    assert "did not hold" in fp8.verdict(runs)


def test_fp8_tiny(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(fp8, work, monkeypatch, "--steps=3", "--seeds=2")["runs"]
    assert [(one["precision"], one["seed"]) for one in result] == [
        ("float32", 0), ("float32", 1), ("bfloat16", 0), ("fp8", 0)
    ]  # fmt: skip
    losses = {one["precision"]: one["loss"] for one in result if one["seed"] == 0}
    assert len(set(losses.values())) == 3, "a precision changed nothing"


def test_a_finished_run_is_recalled_not_trained_again(work: Path) -> None:
    cfg = small.config(work, small.shape(64), 3, 0.01)
    first = small.train(cfg, work / "run")
    again = small.train(cfg, work / "run")
    assert [r for r in again if "loss" in r] == [r for r in first if "loss" in r]
    assert small.heldout(again) == small.heldout(first)
