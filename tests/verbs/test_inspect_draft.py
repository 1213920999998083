"""`inspect` names the draft that will guess, why, and what is wrong with one that cannot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from endside import cli
from endside.errors import UserError
from endside.formats import draft_head, draft_soft
from endside.formats.draft_soft import SoftTokens
from endside.verbs.inspect_draft import draft, row
from tests.engine.test_equality import _random_head
from tests.engine.tiny import awkward, checkpoint

CONFIG = awkward("tiny", num_hidden_layers=6)


def test_auto_says_why(tmp_path: Path) -> None:
    assert draft("auto", str(tmp_path), CONFIG, "native")["kind"] == "lookup"
    found = draft("auto", str(tmp_path), CONFIG, "torch")
    assert found["kind"] == "none" and "--draft lookup" in row(found)
    assert "at most 64 rows" in row(draft("lookup", str(tmp_path), CONFIG, "torch"))
    with pytest.raises(UserError, match=r"draft mtp: .* does not bring one"):
        draft("mtp", str(tmp_path), CONFIG, "torch")


def test_what_a_model_brings_is_named(tmp_path: Path) -> None:
    (tmp_path / "bita").mkdir()
    found = draft("auto", str(tmp_path), replace(CONFIG, mtp_layers=1), "native")
    assert found["brings"] == ["mtp", "bita"] and "brings mtp, bita" in row(found)
    assert draft("mtp", str(tmp_path), replace(CONFIG, mtp_layers=1), "native")["kind"] == "mtp"


@pytest.mark.parametrize("kind", ["eagle2", "frspec", "eagle3", "mtp"])
def test_heads(kind: str, tmp_path: Path) -> None:
    folder = draft_head.write(_random_head(kind, CONFIG), tmp_path / "head")
    found = draft(str(folder), "", CONFIG, "native")
    assert found["kind"] == ("eagle2" if kind == "frspec" else kind)
    assert found["vocabulary"] == ("its own, cut" if kind == "frspec" else "the model's")
    with pytest.raises(UserError, match="vocabulary of 331 tokens, the model one of 77"):
        draft(str(folder), "", replace(CONFIG, vocab_size=77), "native")


def test_soft_tokens_and_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = np.zeros((5, CONFIG.hidden_size), np.float32)
    model = checkpoint(tmp_path, CONFIG).folder
    folder = draft_soft.write(SoftTokens(CONFIG, rows, 2), tmp_path / "soft")
    with pytest.raises(SystemExit) as left:
        cli.main(["inspect", str(model), "--draft", str(folder), "--executor", "torch"])
    assert not left.value.code
    said = capsys.readouterr().out
    assert "bita (asked for); prompts 2; masks 3; trees of at most 64 rows" in said
    assert draft(str(model), "", CONFIG, "torch")["kind"] == "model"
    with pytest.raises(UserError, match="neither a folder nor one of auto, none, lookup, mtp"):
        draft(str(tmp_path / "nothing"), "", CONFIG, "torch")
