"""A .gguf file opened as a checkpoint: its text beside it once, its weights where they are."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from endside import gguf_tokenizer
from endside.errors import UserError
from endside.formats.convert import convert
from endside.formats.gguf_folder import ORIGIN, open_checkpoint
from endside.formats.hf import load_checkpoint, read_config, save
from endside.formats.source import folder_source, low_bits, needs_reader, open_source, state_dict
from endside.model.batch import Batch
from endside.model.presets import preset
from endside.model.transformer import Transformer
from endside.tokenizer import Tokenizer, train_bpe

TEXT = "the quick brown fox jumps over the lazy dog. "


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a tokenizer and two end tokens."""
    place = tmp_path_factory.mktemp("gguf")
    tokenizer = train_bpe([TEXT * 40], 300).with_chat_template("{{ messages[0]['content'] }}")
    tokenizer.save(place / "text")
    config = replace(
        preset("tiny"), vocab_size=300, hidden_size=64, intermediate_size=128, bos_token_id=0,
        eos_token_ids=(1, 3),
    )  # fmt: skip
    model = Transformer(config)
    model.init_weights(torch.Generator().manual_seed(2))
    return save(model, place / "hf", dtype="float16", tokenizer_files=place / "text")


@pytest.fixture
def file(plain: Path, tmp_path: Path) -> Path:
    """The model as Q4_0."""
    path = tmp_path / "here" / "m.gguf"
    path.parent.mkdir()
    convert(plain, path, to="gguf", type="q4_0", texts=gguf_tokenizer)
    return path


def test_configuration_tokenizer_and_weights_are_the_files(file: Path, plain: Path) -> None:
    checkpoint, source = open_checkpoint(file, gguf_tokenizer), open_source(file)
    assert checkpoint.folder == file.parent / ".endside" / "m.gguf"
    assert read_config(checkpoint) == source.config
    assert source.config == open_source(plain).config
    found, stored = Tokenizer.load(checkpoint.folder), Tokenizer.load(plain)
    assert found.encode(TEXT) == stored.encode(TEXT)
    assert (found.eos_ids, found.chat_template) == (stored.eos_ids, stored.chat_template)
    assert needs_reader(checkpoint) and low_bits(folder_source(checkpoint)) == ("int4", "int8")
    assert folder_source(checkpoint).place == file
    tokens = torch.arange(2, 200, 3)[None]
    with torch.inference_mode():
        got, want = (
            model.logits(model(Batch(tokens)))
            for model in (load_checkpoint(checkpoint, dtype="float32"), _unpacked(file))
        )
    assert torch.equal(got, want)
    assert not list(checkpoint.folder.glob("*.safetensors")), "weights were copied"


def _unpacked(file: Path) -> Transformer:
    source = open_source(file)
    model = Transformer(source.config)
    model.load_state_dict(state_dict(source, torch.float32, "cpu"))
    return model


def test_the_text_is_written_once_and_anew_for_another_file(file: Path, plain: Path) -> None:
    folder = open_checkpoint(file, gguf_tokenizer).folder
    before = (folder / ORIGIN).stat().st_ino
    (folder / "tokenizer_config.json").write_text("{}")  # an edit of the user's own stays
    assert (open_checkpoint(file, gguf_tokenizer).folder / ORIGIN).stat().st_ino == before
    assert (folder / "tokenizer_config.json").read_text() == "{}"
    (folder / ORIGIN).write_text("half a j")
    open_checkpoint(file, gguf_tokenizer)
    assert json.loads((folder / ORIGIN).read_text())["bytes"] == file.stat().st_size
    assert (folder / "tokenizer_config.json").read_text() != "{}"
    convert(plain, file, to="gguf", type="q8_0", texts=gguf_tokenizer, overwrite=True)
    again = open_checkpoint(file, gguf_tokenizer)
    assert json.loads((folder / ORIGIN).read_text())["bytes"] == file.stat().st_size
    assert {one.dtype for one in again.tensors.values()} == {"Q8_0", "F32"}


def test_a_place_that_cannot_be_written_is_left_alone(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user's cache takes the text; without one the message names both places."""
    (file.parent / ".endside").write_text("a file where the folder would be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    checkpoint = open_checkpoint(file, gguf_tokenizer)
    assert tmp_path / "cache" in checkpoint.folder.parents
    assert folder_source(checkpoint).place == file
    (tmp_path / "none").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"here/\.endside nor .*none.* can be written"):
        open_checkpoint(file, gguf_tokenizer)


def test_what_is_no_model_leaves_nothing_behind(file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        open_checkpoint(tmp_path / "absent.gguf", gguf_tokenizer)
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"bad\.gguf"):
        open_checkpoint(bad, gguf_tokenizer)
    assert not (tmp_path / ".endside" / "bad.gguf").exists()


def test_a_link_without_the_suffix_behind_it(file: Path, tmp_path: Path) -> None:
    """Hub caches link NAME.gguf to a file that is called by its checksum."""
    blob = tmp_path / "0123abcd"
    os.rename(file, blob)
    file.symlink_to(blob)
    checkpoint = open_checkpoint(file, gguf_tokenizer)
    assert folder_source(checkpoint).place == file
    assert checkpoint.folder.parent.parent == file.parent


def test_many_openings_at_once_write_one_folder(file: Path) -> None:
    written = []

    class Counted:
        def from_keys(self, *arguments: object) -> object:
            written.append(1)
            return gguf_tokenizer.from_keys(*arguments)  # type: ignore[arg-type]

    threads = [threading.Thread(target=open_checkpoint, args=(file, Counted())) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(written) == 1
    assert {one.name for one in (file.parent / ".endside").iterdir()} == {"lock", "m.gguf"}
