"""SentencePiece files against the published tokenizer.json and the `sentencepiece` package."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest

from endside import spm
from endside.errors import UserError
from endside.tokenizer import Tokenizer

SENTENCES = [
    "the cat sat on the mat and looked at the other cat",
    "she sells sea shells by the sea shore, doesn't she?",
    "numbers 12 345 6789 and signs: +-*/ (a) [b] {c}",
    "def f(x): return x ** 2  # the square",
] * 50
PROBES = [
    "the cat sat", "", " ", "  two  spaces  ", "sea shells\n", "x ** 2", "caf\u00e9 \u4f60\u597d",
    "\U0001f600 the", "aaaaaaaa", "\tthe", "</s> the <s>", "<0x41>",
]  # fmt: skip


def train(folder: Path, **options: object) -> Path:
    """A small model file by the package itself."""
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=out, vocab_size=400, hard_vocab_limit=False,
        minloglevel=2, **options,
    )  # fmt: skip
    path = folder / "tokenizer.model"
    path.write_bytes(out.getvalue())
    return path


@pytest.fixture(scope="module")
def published(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published folder without its tokenizer.json."""
    folder = tmp_path_factory.mktemp("spm")
    for path in (test_data / "minicpm4-8b").iterdir():
        if path.name != "tokenizer.json":
            shutil.copy(path, folder)
    return folder


def test_published_model_gives_the_published_description(published: Path, test_data: Path) -> None:
    made = Tokenizer.load(published)
    wanted = json.loads((test_data / "minicpm4-8b" / "tokenizer.json").read_text())
    assert [" ".join(one) for one in made.spec["model"]["merges"]] == wanted["model"]["merges"]
    assert made.spec["model"]["vocab"] == wanted["model"]["vocab"]
    for name in ("normalizer", "pre_tokenizer", "decoder", "added_tokens"):
        assert made.spec[name] == wanted[name], name
    assert (made.bos_id, made.eos_ids, made.add_bos) == (1, (73440,), True)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("rule", ["identity", "nmt_nfkc"])
def test_ids_of_the_package(tmp_path: Path, kind: str, rule: str) -> None:
    """With byte fallback and the trainer's own treatment of spaces, the ids are the package's."""
    import sentencepiece

    path = train(
        tmp_path, model_type=kind, byte_fallback=True, normalization_rule_name=rule,
        remove_extra_whitespaces=rule != "identity",
    )  # fmt: skip
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(path))
    made = Tokenizer.load(tmp_path)
    assert made.bos_id == oracle.bos_id() and made.eos_ids == (oracle.eos_id(),)
    for text in [*PROBES, *SENTENCES[:4]]:
        if kind == "unigram" and "<0x41>" in text:
            continue
        assert made.encode(text, bos=False) == oracle.encode(text), repr(text)


def test_no_dummy_prefix_without_llama(tmp_path: Path) -> None:
    """A class that is not Llama's follows the model file; Llama's adds the space anyway."""
    path = train(
        tmp_path, model_type="bpe", byte_fallback=True, add_dummy_prefix=False,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        user_defined_symbols=["<sep>"],
    )  # fmt: skip
    import sentencepiece

    oracle = sentencepiece.SentencePieceProcessor(model_file=str(path))
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"tokenizer_class": "GemmaTokenizer"}))
    made = Tokenizer.load(tmp_path)
    for text in ("the cat", " the cat", "sea<sep>shells"):
        assert made.encode(text, bos=False, control=True) == oracle.encode(text), repr(text)
        assert made.decode(made.encode(text)) == text
    config.write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": True}))
    made = Tokenizer.load(tmp_path)
    assert (
        made.encode("the cat", bos=False) == oracle.encode(" the cat") != oracle.encode("the cat")
    )


def test_not_legacy_puts_the_space_only_first(tmp_path: Path) -> None:
    train(tmp_path, model_type="bpe", byte_fallback=True)
    ids = {}
    for legacy in (True, False):
        config = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        made = Tokenizer.load(tmp_path)
        ids[legacy] = made.encode("the</s>the", control=True)
        assert made.decode(made.encode("the</s>the")) == "the</s>the"
    end = ids[False].index(2)
    assert ids[True][:end] == ids[False][:end] and ids[True][end:] != ids[False][end:]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: len(data) // 2], "damaged|pieces"),
        (lambda data: b"", "no pieces"),
        (lambda data: b"\xff" * 40, "damaged"),
        (lambda data: b"hello, this is text", "damaged"),
        (lambda data: data.replace(b"<0x41>", b"<0xZZ>"), "damaged"),
    ],
)
def test_damage_is_refused_by_name(tmp_path: Path, damage, message: str) -> None:
    path = train(tmp_path, model_type="bpe", byte_fallback=True)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=f"tokenizer.model.*({message})"):
        Tokenizer.load(tmp_path)


def test_every_cut_of_the_file_is_refused_or_read(tmp_path: Path) -> None:
    """No truncation escapes as another exception."""
    path = train(tmp_path, model_type="bpe", byte_fallback=True, normalization_rule_name="identity")
    data = path.read_bytes()
    refused = 0
    for end in range(0, len(data) - 1, 97):
        path.write_bytes(data[:end])
        try:
            spm.read_model(path)
        except UserError:
            refused += 1
    assert refused > len(data) // 97 // 2


def small(scores: dict[str, float]) -> spm.Model:
    """A BPE model with these pieces after the three that every model has."""
    ends = [spm.Piece("<unk>", 0.0, 2), spm.Piece("<s>", 0.0, 3), spm.Piece("</s>", 0.0, 3)]
    return spm.Model(
        pieces=(*ends, *(spm.Piece(text, score, 1) for text, score in scores.items())),
        algorithm=spm.BPE, byte_fallback=False, bos_id=1, eos_id=2, charsmap=b"",
        add_dummy_prefix=True, remove_extra_whitespaces=False,
    )  # fmt: skip


def test_merges_follow_the_scores() -> None:
    """Also where the pieces do not; the two cuts of one piece in the order of their halves' ids."""
    model = small({"ab": -9.0, "b": -1.0, "a": -2.0, "ba": -3.0, "aba": -4.0, "<": 0.0, "s>": 0.0})
    assert spm.merges(model) == [["b", "a"], ["ab", "a"], ["a", "ba"], ["a", "b"]]


def test_word_model_and_equal_scores_are_refused(tmp_path: Path) -> None:
    train(tmp_path, model_type="char")
    with pytest.raises(UserError, match="only BPE and unigram"):
        Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match="same score"):
        spm.merges(small(dict.fromkeys(["a", "b", "ab", "ba"], -1000.0)))
