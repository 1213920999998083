"""Tokenizers through GGUF keys: SentencePiece scores, byte-level merges, and the known traps."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from endside import gguf_tokenizer, spm
from endside.errors import UserError
from endside.formats.gguf_file import Typed
from endside.gguf_tokenizer import LLAMA3_WORDS, PREFIX, from_keys, to_keys
from endside.tokenizer import Tokenizer, train_bpe

TEXTS = ["the cat sat on the mat", "she sells sea shells", "numbers 12 345 6789", "caf\u00e9"] * 20
PROBES = ["the cat", " shells  sea", "12 345", "caf\u00e9 \u4f60\u597d \U0001f600", "<s> the </s>",
          "", "\n\tx", "numbers."]  # fmt: skip


def as_read(keys: dict[str, Any]) -> dict[str, Any]:
    """Keys as the reader gives them back: numbers plain, arrays as numpy."""
    kinds = {4: np.uint32, 5: np.int32, 6: np.float32}
    found = {}
    for name, value in keys.items():
        if isinstance(value, Typed):
            many = isinstance(value.value, list)
            value = np.array(value.value, kinds[value.kind]) if many else value.value
        found[name] = value
    return found


def load(files: dict[str, bytes | Path], folder: Path) -> Tokenizer:
    folder.mkdir()
    for name, content in files.items():
        assert isinstance(content, bytes), "made files are bytes"
        (folder / name).write_bytes(content)
    return Tokenizer.load(folder)


def same(one: Tokenizer, other: Tokenizer) -> None:
    for text in PROBES:
        assert one.encode(text) == other.encode(text), text
        assert one.decode(one.encode(text)) == other.decode(other.encode(text))
    assert (one.bos_id, one.eos_ids) == (other.bos_id, other.eos_ids)
    assert one.control_tokens == other.control_tokens
    assert one.chat_template == other.chat_template


@pytest.fixture
def pieces(tmp_path: Path) -> Path:
    """A folder with a small SentencePiece model trained by the package."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path / "spm"
    folder.mkdir()
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS), model_writer=file, model_type="bpe", vocab_size=330,
            byte_fallback=True, user_defined_symbols=["<h2>"], normalization_rule_name="identity",
            remove_extra_whitespaces=False, minloglevel=2, hard_vocab_limit=False,
        )  # fmt: skip
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "unk_token": "<unk>",
              "eos_token": "<|im_end|>", "add_bos_token": True,
              "chat_template": "{{ messages }}"}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 330, "<think>": 331}))
    return folder


def paths(folder: Path) -> dict[str, bytes | Path]:
    return {file.name: file for file in folder.iterdir()}


def test_sentence_piece_there_and_back(pieces: Path, tmp_path: Path) -> None:
    """Real scores; special and shown tokens; padding up to the model's vocabulary."""
    before = Tokenizer.load(pieces)
    keys, notes = to_keys(paths(pieces), before.vocab_size + 5)
    assert notes == [] and keys[f"{PREFIX}model"] == "llama"
    real = {one.text: one.score for one in spm.read_model(pieces / "tokenizer.model").pieces}
    tokens, types = keys[f"{PREFIX}tokens"], keys[f"{PREFIX}token_type"].value
    scores = keys[f"{PREFIX}scores"].value
    assert len(tokens) == len(types) == len(scores) == before.vocab_size + 5
    assert all(scores[tokens.index(text)] == score for text, score in real.items())
    kinds = dict(zip(tokens, types))
    assert (kinds["<unk>"], kinds["<s>"], kinds["<0x0A>"]) == (2, 3, 6)
    assert kinds["<h2>"] == 1, "a symbol that the published encoder does not cut out"
    assert (kinds["<|im_end|>"], kinds["<think>"], types[-1]) == (3, 4, 5)
    assert keys[f"{PREFIX}eos_token_id"].value == keys[f"{PREFIX}eot_token_id"].value == 330
    files, notes = from_keys(as_read(keys), tmp_path)
    assert notes == []
    same(before, load(files, tmp_path / "back"))


def test_without_a_model_file_scores_follow_the_merges(pieces: Path, tmp_path: Path) -> None:
    before = Tokenizer.load(pieces)
    folder = tmp_path / "json"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(before.spec))
    (folder / "tokenizer_config.json").write_bytes((pieces / "tokenizer_config.json").read_bytes())
    keys, notes = to_keys(paths(folder), before.vocab_size)
    assert "order of merges" in notes[0]
    files, _ = from_keys(as_read(keys), tmp_path)
    same(before, load(files, tmp_path / "back"))


def test_constant_scores(pieces: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Merges are used where there are some; without them no tokenizer is made, with a warning."""
    before = Tokenizer.load(pieces)
    keys = as_read(to_keys(paths(pieces), before.vocab_size)[0])
    keys[f"{PREFIX}scores"] = np.full(before.vocab_size, -1000, np.float32)
    with caplog.at_level(logging.WARNING):
        files, notes = from_keys(keys, tmp_path)
    assert files == {} and "same score" in notes[0] and "same score" in caplog.text
    keys[f"{PREFIX}merges"] = [" ".join(one) for one in before.spec["model"]["merges"]]
    files, notes = from_keys(keys, tmp_path)
    assert "merges are used" in notes[0]
    same(before, load(files, tmp_path / "back"))


def test_byte_level_there_and_back(tmp_path: Path) -> None:
    """Our own vocabulary: its word pattern has no name, so the whole description travels."""
    before = train_bpe(TEXTS, 300)
    before.save(tmp_path / "own")
    keys, notes = to_keys(paths(tmp_path / "own"), 304)
    assert keys[f"{PREFIX}model"] == "gpt2" and keys[f"{PREFIX}pre"] == "llama-bpe"
    assert "no name" in notes[0]
    files, notes = from_keys(as_read(keys), tmp_path)
    assert notes == []
    same(before, load(files, tmp_path / "back"))


def test_byte_level_without_the_description(tmp_path: Path) -> None:
    """A named word pattern is rebuilt; an unknown name makes no tokenizer."""
    before = train_bpe(TEXTS, 300)
    spec = json.loads(json.dumps(before.spec))
    spec["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": LLAMA3_WORDS}
    folder = tmp_path / "named"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    names = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    keys, notes = to_keys(paths(folder), 300)
    assert notes == [] and keys[f"{PREFIX}pre"] == "llama-bpe"
    keys = as_read(keys)
    del keys[gguf_tokenizer.WHOLE]
    files, notes = from_keys(keys, tmp_path)
    same(Tokenizer.load(folder), load(files, tmp_path / "back"))
    files, notes = from_keys({**keys, f"{PREFIX}pre": "klingon"}, tmp_path)
    assert files == {} and "'klingon' is not known" in notes[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"token_type": np.ones(3, np.int32)}, "3 types for"),
        ({"scores": np.ones(3, np.float32)}, "3 scores for"),
        ({"tokens": "abc"}, "no list of texts"),
        ({"tokens": ["<unk>", "x" * 600]}, "more than 512"),
        ({"token_type": None}, "tokenizer in"),
    ],
)
def test_damaged_lists(pieces: Path, tmp_path: Path, change: dict, words: str) -> None:
    keys = as_read(to_keys(paths(pieces), 332)[0])
    keys |= {f"{PREFIX}{name}": value for name, value in change.items()}
    with pytest.raises(UserError, match=words):
        from_keys(keys, tmp_path / "x.gguf")


def test_a_tokenizer_of_another_model_is_refused(pieces: Path) -> None:
    with pytest.raises(UserError, match="332 tokens, the model 100"):
        to_keys(paths(pieces), 100)
    keys, notes = to_keys({}, 100)
    assert keys == {} and "no tokenizer" in notes[0]


def test_user_defined_pieces_of_foreign_files(pieces: Path, tmp_path: Path) -> None:
    """llama.cpp's converter marks SentencePiece's symbols; the original does not cut at them."""
    before = Tokenizer.load(pieces)
    keys = as_read(to_keys(paths(pieces), before.vocab_size)[0])
    at = keys[f"{PREFIX}tokens"].index("<h2>")
    keys[f"{PREFIX}token_type"][at] = spm.USER_DEFINED
    after = load(from_keys(keys, tmp_path)[0], tmp_path / "back")
    same(before, after)
    assert before.encode("a<h2>b") == after.encode("a<h2>b")
    assert "<h2>" not in after.control_tokens and "<think>" in after.control_tokens
