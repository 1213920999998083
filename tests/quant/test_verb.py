"""`endside quantize` from text to folder, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from endside.errors import UserError
from endside.formats import hf
from endside.model.presets import preset
from endside.model.transformer import Transformer
from endside.tokenizer import train_bpe
from endside.verbs import quantize as verb
from tests.quant.text import WORDS

SENTENCES = " ".join(f"{a} {b}." for a in WORDS for b in WORDS)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tokenizer = train_bpe(iter([SENTENCES]), 300)
    tokenizer.save(tmp_path / "tokenizer")
    config = replace(preset("tiny"), bos_token_id=tokenizer.bos_id)
    model = Transformer(config)
    model.init_weights(torch.Generator().manual_seed(0))
    folder = tmp_path / "source"
    return hf.save(model, folder, tokenizer_files=tmp_path / "tokenizer")


@pytest.fixture
def library(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(16):
        (folder / f"{number:02d}.txt").write_text(f"{number} {SENTENCES}")
    return folder


def test_a_folder_of_text_quantizes_a_model(
    source: Path, library: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    given = f"{source} {out} --method pgptq --group 32 --asym --act-order --calibration {library}"
    verb.main([*given.split(), "--samples", "8", "--length", "24", "--perplexity", "4"])
    printed = capsys.readouterr().out
    assert str(out) in printed and "perplexity" in printed and "round-to-nearest" in printed
    report = json.loads((out / "quantization.json").read_text())
    assert report["recipe"]["scheme"] == {
        "kind": "int4",
        "group": 32,
        "symmetric": False,
        "head": None,
    }
    assert report["recipe"]["act_order"] and report["recipe"]["prefix"] == 4
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["sym"] is False
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert (out / "quantization.png").stat().st_size > 1000


def test_perplexity_is_measured_on_other_documents(
    source: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def spy(texts, samples: int, length: int, bos: int | None) -> torch.Tensor:
        seen.append([str(len(ids)) for ids in texts])
        return torch.zeros(samples, length, dtype=torch.long)

    monkeypatch.setattr("endside.quant.calibrate.rows", spy)
    flags = verb.Quantize(str(source), Path("x"), calibration=str(library), samples=3, length=9)
    verb._texts(flags, source)
    measured = replace(flags, perplexity=5)
    texts = verb._texts(measured, source)
    assert [len(part) for part in seen] == [16, 14, 2]
    assert texts.calibration.shape == (3, 9) and texts.heldout.shape == (5, 10)
    assert verb._texts(replace(flags, samples=0), source).calibration is None


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ("--sym --asym", "exclude each other"),
        ("--samples -1", "--samples is -1"),
        ("--length 1", "--length is 1"),
        ("--samples 0", "needs calibration text"),
        ("--samples 99999", "99999 are asked for"),
        ("--prefix -2", "--prefix is -2"),
    ],
)
def test_refusals(source: Path, library: Path, tmp_path: Path, flags: str, part: str) -> None:
    given = f"{source} {tmp_path / 'out'} --calibration {library} {flags}"
    with pytest.raises(UserError, match=part):
        verb.main(given.split())
    assert not (tmp_path / "out").exists()
