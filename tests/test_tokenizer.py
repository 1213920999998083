"""The tokenizer against the published files, and its promises: text is data, streams are whole."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from endside.errors import UserError
from endside.tokenizer import Detokenizer, Tokenizer, train_bpe

PARTS = [
    "Hello, world!", "\u4f60\u597d\uff0c\u4e16\u754c\uff01", "def f(x):\n    return x  # a\n", " ",
    "   ", "\n\n\n", "\t\t", "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467", "1234567890",
    "caf\u00e9 na\u00efve", "3.14e-10", "don't", "\u0e20\u0e32\u0e29\u0e32", "x" * 40, "\u2581",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629", "<h2>", "<0x0A>", "\x00", "</div>", "A\u0301",
    "\\frac{a}{b}", "\u3002\u3002\u3002\u3002", "http://a.b/c?d=e&f=g", "\u00a0", "\r\n", "``````",
    "\ud55c\uad6d\uc5b4", "\U00020000",
]  # fmt: skip
CONTROL = ["<|im_end|>", "<|im_start|>", "</s>", "<s>", "<|fim_suffix|>", "<unk>"]
CORPUS = [
    "the quick brown fox jumps over the lazy dog, and the dog does not mind at all. ",
    "def main(argv):\n    for name in argv[1:]:\n        print(name)  # 12345\n",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002 <think> hm </think> </s> <|im_end|> it's 2024!\n\n",
] * 30


def strings(seed: int, count: int, parts: list[str]) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices(parts, k=draw.randint(0, 6))) for _ in range(count)]


@pytest.fixture(scope="module")
def folder(test_data: Path) -> Path:
    return test_data / "minicpm4-8b"


@pytest.fixture(scope="module")
def published(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def oracle(folder: Path):
    import tokenizers

    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def own() -> Tokenizer:
    return train_bpe(CORPUS, 340)


def test_published_facts(published: Tokenizer) -> None:
    assert published.vocab_size == 73448
    assert (published.bos_id, published.eos_ids, published.add_bos) == (1, (73440,), True)
    assert published.id_of("<|im_start|>") == 73441 and published.id_of("<think>") is None
    assert published.chat_template is not None and "im_start" in published.chat_template


def test_plain_text_has_the_published_ids(published: Tokenizer, oracle) -> None:
    for text in [*PARTS, "", *strings(0, 400, PARTS)]:
        wanted = oracle.encode(text, add_special_tokens=False).ids
        assert published.encode(text, bos=False) == wanted, repr(text)
        assert published.encode(text) == [1, *wanted]


@pytest.mark.parametrize("which", ["published", "own"])
def test_short_texts_do_without_the_whole_model(
    which: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Same ids and places, at the start of a text and inside it; a long text builds the model."""
    whole = request.getfixturevalue(which)
    whole.save(tmp_path)
    quick = Tokenizer.load(tmp_path, whole=False)
    texts = [*strings(11, 300, PARTS + CONTROL + [CORPUS[0][:30], " the", "ing"]), *CORPUS[:3], ""]
    for text in texts:
        for first in (True, False):
            assert quick.encode_run(text, first=first) == whole.encode_run(text, first=first), text
        assert quick.encode(text, control=True) == whole.encode(text, control=True)
    assert "_head" not in vars(quick)
    long = CORPUS[0] * 40
    assert quick.encode(long) == whole.encode(long)
    assert "_head" in vars(quick)


def test_merges_of_bytes_act_on_short_texts_too(tmp_path: Path) -> None:
    """Pieces that stand for bytes do not show in the text, nor do the merges between them."""
    names = ["<unk>", "a", "<0x0A>", "<0x0A><0x0A>"]
    made = {
        "type": "BPE", "vocab": {text: at for at, text in enumerate(names)},
        "merges": [["<0x0A>", "<0x0A>"]], "unk_token": "<unk>", "byte_fallback": True,
    }  # fmt: skip
    spec = {"version": "1.0", "model": made, "added_tokens": [],
            "decoder": {"type": "ByteFallback"}}  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    for whole in (True, False):
        tokenizer = Tokenizer.load(tmp_path, whole=whole)
        assert tokenizer.encode("a\n\n\n", bos=False) == [1, 3, 2]


def test_control_tokens_have_the_published_ids(published: Tokenizer, oracle) -> None:
    for text in strings(1, 300, PARTS + CONTROL):
        wanted = oracle.encode(text, add_special_tokens=False).ids
        assert published.encode(text, bos=False, control=True) == wanted, repr(text)


def test_ids_of_the_package(published: Tokenizer, folder: Path) -> None:
    """SentencePiece gives them for text with an explicit space in front.

    Not where it cuts its user-defined symbols out first, which no published tokenizer.json does.
    """
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    symbols = ("<h2>", "</div>", "\r\n", "``````", "\u3002\u3002\u3002\u3002", "\u2581")
    for text in filter(None, strings(2, 300, [part for part in PARTS if part not in symbols])):
        assert published.encode(text, bos=False) == pieces.encode(" " + text), repr(text)


def test_bos_is_added_once(published: Tokenizer) -> None:
    assert published.encode("<s>a", control=True) == published.encode(
        "<s>a", bos=False, control=True
    )
    assert published.encode("<s>a")[0] == 1 and published.encode("<s>a")[1] != 1
    assert published.encode("") == [1]


def test_literal_control_strings_stay_text(published: Tokenizer, own: Tokenizer) -> None:
    for tokenizer in (published, own):
        control = set(tokenizer.control_tokens.values())
        for text in strings(3, 200, [*PARTS[:8], *tokenizer.control_tokens, "<", "|>", "s>"]):
            ids = tokenizer.encode(text, bos=False)
            assert control.isdisjoint(ids), repr(text)
            assert tokenizer.decode(ids) == text
        name = next(iter(tokenizer.control_tokens))
        assert tokenizer.encode(name, bos=False, control=True) == [tokenizer.id_of(name)]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("model", ["BPE", "Unigram", "ignore_merges"])
def test_merges_do_not_lead_to_a_control_token(tmp_path: Path, model: str, whole: bool) -> None:
    """A vocabulary whose merges, or whose search, would spell the token from plain text."""
    texts = ["<unk>", "<s>", "<", "s", ">", "<s", "a"]
    if model == "Unigram":
        made = {"type": "Unigram", "unk_id": 0, "vocab": [[text, -1.0] for text in texts]}
    else:
        made = {
            "type": "BPE", "vocab": {text: at for at, text in enumerate(texts)},
            "merges": [["<", "s"], ["<s", ">"]], "unk_token": "<unk>",
            "ignore_merges": model == "ignore_merges",
        }  # fmt: skip
    added = [{"id": 1, "content": "<s>", "special": True, "single_word": False, "lstrip": False,
              "rstrip": False, "normalized": False}]  # fmt: skip
    spec = {
        "version": "1.0",
        "model": made,
        "added_tokens": added,
        "decoder": {"type": "ByteLevel"},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = Tokenizer.load(tmp_path, whole=whole)
    assert tokenizer.encode("a<s>", bos=False) == [6, 5, 4]
    assert tokenizer.encode("<s>", bos=False) == [5, 4], "the whole word is in the vocabulary"
    assert tokenizer.encode("a<s>", bos=False, control=True) == [6, 1]


@settings(max_examples=150, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
def test_round_trip(published: Tokenizer, own: Tokenizer, text: str) -> None:
    for tokenizer in (published, own):
        assert tokenizer.decode(tokenizer.encode(text, bos=False)) == text
        assert tokenizer.decode(tokenizer.encode(text, bos=True)) == text


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_stream_is_the_whole(published: Tokenizer, own: Tokenizer, data: st.DataObject) -> None:
    """Any ids, also halves of characters and bytes that are no text: the pieces add up."""
    tokenizer = data.draw(st.sampled_from([published, own]))
    halves = [at for at, one in enumerate(tokenizer.token_bytes()) if one and one[-1] >= 128][:300]
    some = st.one_of(st.integers(0, tokenizer.vocab_size - 1), st.sampled_from(halves))
    ids = data.draw(st.lists(some, max_size=30))
    skip, start = data.draw(st.booleans()), data.draw(st.booleans())
    stream = Detokenizer(tokenizer, skip_special=skip, at_start=start)
    texts = [*(stream.push(one) for one in ids), stream.flush()]
    assert "".join(texts) == tokenizer.decode(ids, skip_special=skip, at_start=start)
    if skip and not start:
        raw = b"".join(tokenizer.token_bytes()[one] for one in ids)
        assert "".join(texts) == raw.decode("utf-8", errors="replace")


def test_decode_like_the_published(published: Tokenizer, oracle) -> None:
    for text in strings(4, 200, PARTS + CONTROL):
        ids = oracle.encode(text, add_special_tokens=False).ids
        for skip in (True, False):
            wanted = oracle.decode(ids, skip_special_tokens=skip)
            assert published.decode(ids, skip_special=skip) == wanted, repr(text)


def test_no_half_character_is_shown(published: Tokenizer) -> None:
    ids = published.encode("\U00020000!", bos=False)
    assert len(ids) > 4, "the probe must need byte pieces"
    stream = Detokenizer(published)
    assert "".join(filter(None, (stream.push(one) for one in ids))) == "\U00020000!"
    assert all("\ufffd" not in stream.push(one) for one in ids[:-2])
    assert stream.flush() == "\ufffd"


def test_leading_space_is_kept_in_a_continuation(published: Tokenizer) -> None:
    ids = published.encode("there", bos=False)
    assert published.decode(ids) == "there"
    assert published.decode(ids, at_start=False) == " there"
    assert published.decode([*ids, *ids]) == "there there"


def test_token_bytes(published: Tokenizer, own: Tokenizer) -> None:
    table = published.token_bytes(73_500)
    assert len(table) == 73_500 and table[73_448:] == [b""] * 52
    assert table[published.id_of("<0xE4>")] == b"\xe4"
    assert table[published.id_of("\u2581the")] == b" the"
    assert all(table[one] == b"" for one in published.control_tokens.values())
    assert {own.token_bytes()[own.encode(chr(one))[1]] for one in range(128)} == {
        bytes([one]) for one in range(128)
    }
    # shown, because a program has to see it in the answer
    assert own.token_bytes()[own.id_of("<think>")] == b"<think>"


def test_half_a_surrogate_is_refused(published: Tokenizer) -> None:
    with pytest.raises(UserError, match="surrogate"):
        published.encode("a\ud800b")
    with pytest.raises(UserError, match="negative"):
        published.decode([-1])


def test_save_copies_foreign_files(published: Tokenizer, folder: Path, tmp_path: Path) -> None:
    published.save(tmp_path)
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "added_tokens.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name
    published.with_chat_template("{{ 1 }}").save(tmp_path)
    assert Tokenizer.load(tmp_path).chat_template == "{{ 1 }}"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "tokenizer.json"),
        ("tokenizer.json", "[]", "tokenizer.json"),
        ("tokenizer.json", "{}", "tokenizer.json.*model"),
        ("tokenizer.json", '{"model": {"type": "WordPiece", "vocab": {"a": 0}}}', "WordPiece"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "vocabulary"),
        (
            "tokenizer.json",
            '{"model": {"type": "BPE", "vocab": 3, "merges": []}}',
            "tokenizer.json",
        ),
        (
            "tokenizer.json",
            '{"decoder": {"type": "ByteLevel"}, '
            '"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["x y"]}}',
            "tokenizer.json is damaged",
        ),
        (
            "tokenizer.json",
            '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, '
            '"added_tokens": [{"id": "x", "content": "b"}]}',
            "added token",
        ),
        (
            "tokenizer.json",
            '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}',
            "decoder",
        ),
        ("tokenizer_config.json", "{", "tokenizer_config.json"),
        ("tokenizer_config.json", '{"chat_template": 3}', "chat_template"),
        ("added_tokens.json", "nothing", "added_tokens.json"),
    ],
)
def test_damage_is_refused_by_name(
    own: Tokenizer, tmp_path: Path, name: str, content: str, message: str
) -> None:
    own.save(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        Tokenizer.load(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither tokenizer.json nor tokenizer.model"):
        Tokenizer.load(tmp_path)


def test_published_folder_without_config(
    published: Tokenizer, folder: Path, tmp_path: Path
) -> None:
    """tokenizer.json alone says enough to encode."""
    shutil.copy(folder / "tokenizer.json", tmp_path)
    alone = Tokenizer.load(tmp_path)
    for text in ("a <s>", "", PARTS[1]):
        assert alone.encode(text) == published.encode(text)
    assert (alone.bos_id, alone.add_bos, alone.chat_template) == (1, True, None)
    assert alone.eos_ids == (73440,)


def test_added_tokens_of_the_other_files_join(own: Tokenizer, tmp_path: Path) -> None:
    own.save(tmp_path)
    free, size = own.vocab_size, own.vocab_size + 2
    added = {"<|late|>": free, "<taken>": 5}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {str(free + 1): {"content": "<shown>", "special": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    made = Tokenizer.load(tmp_path)
    assert made.vocab_size == size and made.id_of("<taken>") is None
    assert made.encode("<|late|><shown>", bos=False, control=True) == [free, free + 1]
    assert made.decode([free, free + 1]) == "<shown>"


def test_blank_added_tokens_are_vocabulary(own: Tokenizer, tmp_path: Path) -> None:
    """Runs of spaces that some vocabularies add are text, with and without control."""
    import tokenizers

    own.save(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["added_tokens"].append(
        {"id": own.vocab_size, "content": " " * 7, "special": False, "single_word": False,
         "lstrip": False, "rstrip": False, "normalized": True}
    )  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    made = Tokenizer.load(tmp_path)
    text = "a" + " " * 9 + "b"
    oracle = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    wanted = oracle.encode(text, add_special_tokens=False).ids
    assert own.vocab_size in wanted
    assert made.encode(text, bos=False) == wanted == made.encode(text, bos=False, control=True)
    ids, starts = made.encode_run(text)
    assert starts == sorted(starts) and starts[ids.index(own.vocab_size)] == 1
    assert made.decode(wanted) == text


def test_flags_of_added_tokens_act_like_the_original(own: Tokenizer, tmp_path: Path) -> None:
    import tokenizers

    own.save(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    flags = ("lstrip", "rstrip", "single_word")
    chosen = {"[0]": "rstrip", "[1]": "lstrip", "STOP": "single_word", "[0": "", "</s>-": ""}
    for at, (text, flag) in enumerate(chosen.items(), own.vocab_size):
        one = {"id": at, "content": text, "special": True, "normalized": False}
        spec["added_tokens"].append(one | {name: name == flag for name in flags})
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    oracle = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    made = Tokenizer.load(tmp_path)
    for text in strings(5, 300, ["[0]", "[0", "[1]", "STOP", " ", "\n", "dog", "</s>", "-"]):
        wanted = oracle.encode(text, add_special_tokens=False).ids
        assert made.encode(text, bos=False, control=True) == wanted, repr(text)


def test_own_vocabulary(own: Tokenizer, tmp_path: Path) -> None:
    assert own.vocab_size == 340 and own.encode("")[0] == own.bos_id == 0
    assert [own.id_of(one) for one in ("<s>", "</s>", "<|im_start|>", "<|im_end|>")] == [0, 1, 2, 3]
    assert own.eos_ids == (1, 3)
    assert own.decode(own.encode("1234567", bos=False)[-1:]) == "7", (
        "digits in threes from the left"
    )
    assert train_bpe(CORPUS, 340, add_bos=False).encode("", bos=True) == []
    with pytest.raises(UserError, match="at least 264"):
        train_bpe(CORPUS, 100)


def test_own_vocabulary_loads_everywhere(own: Tokenizer, tmp_path: Path) -> None:
    import transformers

    own.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert again.fingerprint == own.fingerprint and again.add_bos
    assert (theirs.bos_token_id, theirs.eos_token_id) == (0, 1)
    for text in [*PARTS, *CORPUS[:3]]:
        assert again.encode(text) == own.encode(text)
        assert theirs(text)["input_ids"] == own.encode(text, control=True), repr(text)
        assert theirs.decode(own.encode(text, bos=False)) == text


def test_training_is_deterministic(own: Tokenizer) -> None:
    """Another process has another hash order; the file is the same, byte for byte."""
    code = (
        "import sys, json; from endside.tokenizer import train_bpe;"
        "sys.stdout.buffer.write(train_bpe(json.load(sys.stdin), 340).files()['tokenizer.json'])"
    )
    made = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(CORPUS).encode(), capture_output=True,
        cwd=Path(__file__).resolve().parent.parent, check=True,
    )  # fmt: skip
    assert made.stdout == own.files()["tokenizer.json"]


def test_fingerprint_sees_a_change(own: Tokenizer) -> None:
    other = train_bpe(CORPUS, 339)
    assert other.fingerprint != own.fingerprint
    assert own.with_chat_template("x").fingerprint == own.fingerprint
