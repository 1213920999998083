"""The containers are written, compared with what they were made from, and judged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from endside.formats import hf
from endside.model.transformer import Transformer
from reproduce import containers
from reproduce.containers import PLAIN, TERNARY, Form, Row


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Untrained originals of the script's own shape, one layer."""
    folder = tmp_path_factory.mktemp("containers")
    model = Transformer(replace(containers.SHAPE, num_hidden_layers=1))
    model.init_weights(torch.Generator().manual_seed(0))
    plain = hf.save(model, folder / "plain", dtype="float16")
    return {PLAIN: plain, TERNARY: containers.ternary(plain, folder / "ternary")}


def test_what_is_rounded_moved_and_refused(places: dict[str, Path], tmp_path: Path) -> None:
    forms = (
        Form("hf", PLAIN, "hf"),
        Form("four", PLAIN, "gguf", "q4_0"),
        Form("eight", PLAIN, "endside", "int8", 32),
        Form("moved", "eight", "gguf"),
        Form("lossy", PLAIN, "gguf", "tq2_0"),
        Form("kept", TERNARY, "gguf", "tq2_0"),
    )
    texts = torch.randint(256, (2, 65), generator=torch.Generator().manual_seed(1))
    rows = {row.name: row for row in containers.measure(dict(places), forms, texts, tmp_path)}
    assert (rows["hf"].linears, rows["hf"].apart) == (0, 0)
    assert 0.05 < rows["four"].linears < 0.12 and rows["four"].embedding < 0.01
    assert rows["four"].apart > 10 * rows["eight"].apart > 0
    assert 4 < rows["four"].bits < 6 < rows["eight"].bits < 10
    assert (rows["moved"].linears, rows["moved"].apart) == (0, 0)
    assert "is not ternary" in rows["lossy"].refused and str(tmp_path) not in rows["lossy"].refused
    assert (rows["kept"].linears, rows["kept"].embedding) == (0, 0)
    said = containers.verdict(list(rows.values()))
    assert "all 2 moves" in said and "lossy ways refused: 1" in said
    assert "refused" in containers.table(list(rows.values()))
    containers.plot(list(rows.values()), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
    json.dumps([row.__dict__ for row in rows.values()])


def test_a_move_that_loses_something_is_named() -> None:
    rows = [Row("a", PLAIN, linears=0.1), Row("b", "a", linears=0.001), Row("c", "a")]
    assert containers.verdict(rows) == "not lossless, though it should be: b from a"


def test_every_form_is_made_from_an_earlier_one() -> None:
    known = {PLAIN, TERNARY}
    for form in containers.FORMS:
        assert form.source in known, form
        known.add(form.name)
