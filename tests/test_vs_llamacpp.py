"""bench/vs_llamacpp.py on engines of known speed: what it chooses, integrates and concludes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PER_TOKEN, PER_DEPTH = 2e-3, 1e-7  # seconds: of a peer's token, and of each key behind it


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as a module; its companions lie beside it."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import vs_llamacpp

    yield vs_llamacpp


class Known:
    """A worker that answers from a formula; flash attention halves the part that grows."""

    pid = 1

    def __init__(self, *, visible: float = 0.1, sparse: bool = False) -> None:
        self.visible, self.sparse = visible, sparse
        self.depth = self.flash = 0
        self.log: list[tuple] = []

    def ask(self, verb: str, *numbers: int) -> dict[str, Any]:
        self.log.append((verb, *numbers))
        if verb == "depth":
            self.depth = numbers[0]
        if verb == "context":
            self.flash = numbers[1]
        if verb in ("prefill", "decode"):
            keys = 0 if self.sparse else self.depth + numbers[0] / 2
            grows = PER_DEPTH * keys / (1 + self.flash)
            return {"seconds": numbers[0] * (PER_TOKEN + grows)}
        if verb in ("sight", "expected"):
            available = self.depth + (numbers[0] + 1) / 2
            return {"visible": self.visible * available, "available": available}
        return {"bytes": 1_000_000}


@pytest.fixture
def pair(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A pair of known engines; the memory gives one GB/s."""
    monkeypatch.setattr(bench, "page_kind", lambda pid, size: "huge")
    monkeypatch.setattr(bench.peer_llamacpp, "limits", lambda folder: folder / "limits")
    monkeypatch.setattr(bench.Probe, "__call__", lambda self: 1e9)
    return bench.Pair("sparse", Path("nowhere"), 1, Known(sparse=True), Known())


def _cell(bench: ModuleType, name: str) -> Any:
    return next(cell for cell in bench.CELLS if cell.name == name)


def test_the_faster_setting_of_the_peer_is_taken_and_both_are_told(
    bench: ModuleType, pair: Any
) -> None:
    """At depth flash attention is faster here; ours reads the ratio that the formulas give."""
    row = pair.run(_cell(bench, "sparse decode at 32K"), 3)
    assert row["flash"] == 1 and row["peer_by_flash"]["0"] < row["peer_by_flash"]["1"]
    ours, peer = PER_TOKEN, PER_TOKEN + PER_DEPTH * (32768 + 1.5) / 2
    assert row["ratio"]["median"] == pytest.approx(peer / ours)
    assert row["reached"] == row["ratio"]["median"] and not row["met"]
    assert row["share_of_bandwidth"]["median"] == pytest.approx(1e6 / PER_TOKEN / 1e9)
    assert (row["pages"], row["available"]) == ("huge", 32769)
    line = bench._line(row)
    assert "MISSED" in line and "sees 3,277 of 32,769" in line
    json.dumps(row)


def test_a_share_of_bandwidth_is_the_target_at_empty_context(bench: ModuleType, pair: Any) -> None:
    """The ratio is told, the verdict is about the memory."""
    cell = replace(_cell(bench, "decode"), target=0.49)
    row = pair.run(cell, 2)
    assert row["reached"] == pytest.approx(0.5) and row["met"]
    assert not pair.run(replace(cell, target=0.51), 2)["met"]


def test_a_cell_that_is_not_sparse_ends_the_run(bench: ModuleType, pair: Any) -> None:
    """Half of the tokens seen is no sparse attention."""
    pair.ours.visible = 0.5
    for name in ("sparse decode at 32K", "sparse prompt of 32K"):
        with pytest.raises(AssertionError, match="not sparse"):
            pair.run(_cell(bench, name), 1)


def test_a_whole_prompt_of_the_peer_is_the_integral(bench: ModuleType, pair: Any) -> None:
    """Cost linear in depth: trapezoids through the middles are exact."""
    row = pair.run(_cell(bench, "sparse prompt of 32K"), 1)
    exact = 32768 * PER_TOKEN + PER_DEPTH / 2 * 32768**2 / 2
    middle_of_first = (PER_TOKEN + PER_DEPTH * 256 / 2) * 256
    first = 256 * PER_TOKEN + PER_DEPTH / 2 * 256**2 / 2
    assert 32768 / row["peer"]["median"] == pytest.approx(exact + middle_of_first - first, rel=1e-3)
    assert row["peer_integrated"] and ", peer integrated" in bench._line(row)
    assert row["at_the_end"]["available"] == 32256 + 513 / 2
    assert set(row["peer_seconds_per_token"]) == {"0", "4096", "16384", "32256"}


def test_every_cell_is_cheap_for_a_slow_peer(bench: ModuleType, pair: Any) -> None:
    """The peer never decodes more than asked for at depth, nor warms up with a whole prompt."""
    pair.run(_cell(bench, "sparse decode at 128K"), 1)
    decoded = [words[1] for words in pair.peer.log if words[0] == "decode"]
    assert decoded and max(decoded) == 2
    pair.peer.log.clear()
    pair.run(_cell(bench, "sparse prefill at 64K"), 1)
    filled = [words[1] for words in pair.peer.log if words[0] == "prefill"]
    assert filled == [64, 64, 8, 512]


def test_the_plot_is_written(bench: ModuleType, pair: Any, tmp_path: Path) -> None:
    """From rows as they are in the JSON file."""
    rows = [pair.run(_cell(bench, "sparse decode at 32K"), 2), pair.run(_cell(bench, "decode"), 2)]
    bench._plot(json.loads(json.dumps(rows)), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_flags(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are checked; quick leaves the slow cells out unless they are named."""
    monkeypatch.setattr("sys.argv", ["vs", "--quick"])
    assert not set(bench._flags().chosen) & bench.SLOW
    monkeypatch.setattr("sys.argv", ["vs", "--quick", "--cells", "8B decode,memory"])
    assert bench._flags().chosen == ["8B decode", "memory"]
    monkeypatch.setattr("sys.argv", ["vs", "--cells", "decoding"])
    with pytest.raises(SystemExit):
        bench._flags()
