"""`endside draft`: tokens ranked by frequency, and a head trained on what its model writes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from endside import cli, native
from endside.api import LLM
from endside.data.document import Document
from endside.data.pack import PackConfig, open_packed, pack, tokenizer_encoder
from endside.formats import hf
from endside.formats.draft_head import read_ranking
from endside.log import read_metrics
from endside.model.presets import preset
from endside.model.transformer import Transformer
from endside.tokenizer import Tokenizer, train_bpe

TEXT = "the quick brown fox jumps over the lazy dog, again and again. "


class Made:
    """A model that always goes on with the same few tokens, its tokenizer, and text to begin."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.tokenizer = train_bpe(iter([TEXT * 20]), 300)
        self.tokenizer.save(place / "text")
        config = replace(
            preset("tiny"), vocab_size=self.tokenizer.vocab_size, num_hidden_layers=2,
            tie_word_embeddings=True, bos_token_id=self.tokenizer.bos_id,
            eos_token_ids=tuple(self.tokenizer.eos_ids),
        )  # fmt: skip
        model = Transformer(config)
        model.init_weights(torch.Generator().manual_seed(3))
        self.model = hf.save(model, place / "model", tokenizer_files=place / "text")
        words = TEXT.split()
        texts = [" ".join(words[n % 7 :] * 3) for n in range(60)]
        documents = [Document(f"d{n}", text, "test") for n, text in enumerate(texts)]
        self.prompts = place / "prompts"
        encoder = tokenizer_encoder(self.tokenizer)
        pack(iter(documents), self.prompts, encoder, PackConfig(heldout_share=0.2))

    def config(self, name: str, **text: object) -> Path:
        values = {"shards": str(self.place / f"own-{name}"), "prompts": str(self.prompts)} | text
        lines = [f"{key} = {value!r}".replace("'", '"') for key, value in values.items()]
        file = self.place / f"{name}.toml"
        file.write_text(
            f'model = "{self.model}"\nsteps = 30\nbatch = 4\nseq_len = 24\nunroll = 2\n'
            "threads = 1\neval_every = 10\neval_rows = 4\n[schedule]\nwarmup = 2\ndecay = 4\n"
            "[text]\nrows = 60\nprompt = 4\ntokens = 40\n" + "\n".join(lines) + "\n"
        )
        return file


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("draft"))


def _draft(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    try:
        cli.main(["draft", *map(str, argv)])
        code = 0
    except SystemExit as left:
        code = left.code or 0
    said = capsys.readouterr()
    return code, said.out, said.err


def test_tokens_are_ranked_by_how_often_they_occur(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.txt").write_text(TEXT * 3)
    (corpus / "b.txt").write_text("lazy " * 50)
    out = tmp_path / "f.npy"
    code, said, _ = _draft(capsys, "rank", made.model, corpus, out)
    assert code == 0 and "tokens -> " in said
    ids = read_ranking(out, made.tokenizer.vocab_size)
    counts: Counter[int] = Counter()
    for file in sorted(corpus.iterdir()):
        counts.update(made.tokenizer.encode(file.read_text(), bos=False))
    ends = set(made.tokenizer.eos_ids)
    seen = [counts[one] for one in ids.tolist() if one not in ends]
    assert seen == sorted(counts.values(), reverse=True)
    assert ends <= set(ids.tolist()), "what ends an answer can always be guessed"
    _draft(capsys, "rank", made.model, corpus, out, "--tokens", 5)
    few = read_ranking(out, made.tokenizer.vocab_size)
    assert len(few) == 5 and ends <= set(few.tolist()) and few[0] == ids[0]


def test_an_end_is_kept_where_it_is_just_frequent_enough(made: Made) -> None:
    from endside.verbs.draft import _ranked

    class Ends:
        eos_ids = (1, 2)

    counts = Counter({5: 9, 6: 8, 2: 7, 8: 6})
    assert _ranked(counts, Ends(), 3).tolist() == [5, 1, 2]
    assert _ranked(counts, Ends(), 0).tolist() == [5, 6, 2, 8, 1]


def test_a_published_list_becomes_a_portable_file(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save([9, 4, 7], tmp_path / "freq_3.pt")
    code, _, _ = _draft(capsys, "rank", made.model, tmp_path / "freq_3.pt", tmp_path / "f.npy")
    assert code == 0 and np.load(tmp_path / "f.npy").tolist() == [9, 4, 7]
    assert np.load(tmp_path / "f.npy").dtype == np.int32


def test_a_trained_head_drafts_for_its_model(
    made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    config = made.config("whole")
    code, said, err = _draft(capsys, "train", config)
    assert code == 0, err
    folder = Path(said.strip().splitlines()[-1])
    own = open_packed(made.place / "own-whole")
    text = np.concatenate(own.tokens("train"))
    assert own.index.tokenizer == Tokenizer.load(made.model).fingerprint
    assert len(text) > 24 * 30, "the model hardly wrote"
    records = read_metrics(config.with_suffix("") / "metrics.jsonl")
    found = [one["accepted_length"] for one in records if "accepted_length" in one]
    assert len(found) >= 3 and all(1 <= one <= 3 for one in found)

    stamp = (made.place / "own-whole").stat().st_mtime_ns
    assert _draft(capsys, "train", config)[0] == 0  # done already: nothing is written again
    assert (made.place / "own-whole").stat().st_mtime_ns == stamp

    if not native.available_isas():
        return
    asked = {"max_tokens": 24, "temperature": 0.0}
    prompt = made.tokenizer.encode(TEXT)[:9]
    flags = {"executor": "native", "context": 256, "threads": 1}
    plain = LLM(made.model, draft="none", **flags).generate(prompt, **asked)
    drafted = LLM(made.model, draft=str(folder), **flags).generate(prompt, **asked)
    assert drafted.token_ids == plain.token_ids and len(plain.token_ids) > 5


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "use: endside draft rank"),
        (("guess",), "draft guess"),
        (("rank", "MODEL", "TEXT", "f.bin"), "rankings are .npy files"),
        (("rank", "MODEL", "NOWHERE", "f.npy"), "no corpus at"),
        (("train", "NOWHERE.toml"), "NOWHERE.toml"),
        (("train", "PROMPTLESS"), "text.prompts is missing"),
        (("train", "SHARDLESS"), "lacks text.shards"),
    ],
)
def test_what_cannot_be_done_is_said(
    argv: tuple[str, ...], message: str, made: Made, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    named = {
        "MODEL": str(made.model), "TEXT": str(tmp_path),
        "PROMPTLESS": str(made.config("promptless", prompts="")),
        "SHARDLESS": str(made.config("shardless", shards="")),
    }  # fmt: skip
    code, _, err = _draft(capsys, *[named.get(one, one) for one in argv])
    assert code and message in err and "Traceback" not in err


def test_the_run_file_for_the_tour_s_model_is_understood() -> None:
    from endside import config
    from endside.train.draft import DraftConfig

    file = Path(__file__).parents[2] / "runs" / "draft.toml"
    commands = [line for line in file.read_text().splitlines() if "draft train" in line]
    assert len(commands) == 2
    for command in commands:
        changes = tuple(command.split("draft.toml")[1].split())
        data = config.override(config.read(file), changes)
        cfg = config.build(DraftConfig, data, source=str(file))
        assert cfg.model == "runs/demo/model" and cfg.kind == ("bita" if changes else "eagle2")
