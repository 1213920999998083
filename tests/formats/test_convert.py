"""`convert`: each layout holds the same function, and the report says what was done."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from endside.checkpoint import Checkpoint
from endside.errors import UserError
from endside.formats.convert import convert
from endside.formats.hf import load, save
from endside.formats.llama import fold_config
from endside.model.batch import Batch
from endside.model.presets import preset
from endside.model.transformer import Transformer

TOKENS = torch.arange(2, 300, 5)[None]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A sparse, tied MiniCPM with an MTP layer, foreign keys and companions."""
    model = Transformer(replace(preset("tiny-sparse"), tie_word_embeddings=True, mtp_layers=1))
    model.init_weights(torch.Generator().manual_seed(3))
    files = tmp_path / "files"
    files.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "configuration_minicpm.py", "junk.bin"):
        (files / name).write_text(name)
    base = {"colour": "red", "auto_map": {"AutoConfig": "configuration_minicpm.MiniCPMConfig"}}
    return save(
        model,
        tmp_path / "src",
        tokenizer_files=files,
        base_config={**base, "model_type": "minicpm"},
    )


def logits(folder: Path, **options: object) -> torch.Tensor:
    """Of a fixed prompt, in fp32."""
    model = load(folder, dtype="float32", **options)
    with torch.inference_mode():
        return model.logits(model(Batch(TOKENS)))


def test_to_llama(source: Path, tmp_path: Path) -> None:
    """Plain Llama: neutral, untied, dense, no foreign code; the same logits."""
    report = convert(source, tmp_path / "out", to="llama")
    checkpoint = Checkpoint.open(report.destination)
    assert checkpoint.config["model_type"] == "llama"
    assert not {"scale_emb", "sparse_config", "mtp_layers", "auto_map"} & set(checkpoint.config)
    assert "lm_head.weight" in checkpoint.names() and report.tensors == len(checkpoint.names())
    assert not any("mtp" in name for name in checkpoint.names())
    config = load(report.destination).config
    assert config == fold_config(load(source).config)
    assert (config.residual_scale, config.logit_divisor, config.scale_emb) == (1.0, 1.0, 1.0)
    assert report.copied == ("chat_template.jinja", "tokenizer.json")
    notes = "; ".join(report.notes)
    for word in ("embeddings x 3", "increments x 0.9899495", "logits / 3", "tied", "sparse",
                 "multi-token"):  # fmt: skip
        assert word in notes
    assert str(report).startswith(f"wrote {tmp_path / 'out'} (llama): {report.tensors} tensors")
    assert "not used: " in str(report) and "copied: chat_template.jinja" in str(report)
    want = logits(source, attention="dense")
    assert (logits(report.destination) - want).abs().max() < 1e-5


def test_to_hf_keeps_what_is_foreign(source: Path, tmp_path: Path) -> None:
    report = convert(source, tmp_path / "out", to="hf")
    assert Checkpoint.open(report.destination).config == Checkpoint.open(source).config
    assert "configuration_minicpm.py" in report.copied and "junk.bin" not in report.copied
    assert set(report.ignored) == {"colour", "auto_map"}
    for file in source.iterdir():
        assert (report.destination / file.name).read_bytes() == file.read_bytes(), file.name
    assert report.bytes == sum(file.stat().st_size for file in source.iterdir())


def test_to_endside_keeps_only_what_is_read(source: Path, tmp_path: Path) -> None:
    report = convert(source, tmp_path / "out", to="endside")
    config = Checkpoint.open(report.destination).config
    assert "colour" not in config and config["sparse_config"]["selection"] == "4.1"
    assert load(report.destination).config == load(source).config
    assert torch.equal(logits(report.destination), logits(source))


def test_dtype_is_rounded_once_and_said(source: Path, tmp_path: Path) -> None:
    """Folding happens before rounding: bf16 of the product, not the product of bf16."""
    report = convert(source, tmp_path / "out", to="llama", dtype="bfloat16")
    assert report.dtype == "bfloat16" and "float32 to bfloat16" in report.notes[0]
    original = load(source)
    want = original.layers[0].mlp.down_proj.weight.double() * original.config.residual_scale
    got = load(report.destination).layers[0].mlp.down_proj.weight
    assert torch.equal(got, want.bfloat16())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"to": "onnx"}, "--to is 'onnx': use hf, llama, gptq, gguf, endside"),
        ({"to": "gguf"}, "must end in .gguf"),
        ({"to": "gguf", "type": "int4"}, "--type is 'int4': --to gguf takes auto, f32"),
        ({"to": "hf", "type": "int4"}, "--type is 'int4': --to hf takes auto"),
        ({"to": "endside", "type": "int4", "group": 2}, "--group is 2"),
        ({"to": "gptq"}, "no codes to keep: name the type"),
        ({"to": "endside", "type": "ternary"}, "is not ternary"),
        ({"to": "hf", "dtype": "int4"}, "--dtype is 'int4'"),
    ],
)
def test_wrong_options_are_refused(source: Path, tmp_path: Path, options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        convert(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_source_is_never_its_own_destination(source: Path) -> None:
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    with pytest.raises(UserError, match="is the source itself"):
        convert(source, source, to="llama", overwrite=True)
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before


def test_a_damaged_source_writes_nothing(source: Path, tmp_path: Path) -> None:
    shard = source / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(UserError, match="truncated"):
        convert(source, tmp_path / "out", to="llama")
    assert not (tmp_path / "out").exists()
