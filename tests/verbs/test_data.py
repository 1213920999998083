"""`endside data`: every kind of file gives the same documents, and what is wrong is one message."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from endside import cli
from endside.data import files
from endside.data.files import Tally, find, read
from endside.data.pack import open_packed
from endside.tokenizer import train_bpe

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["one", "two", "three", "häuser", "四", "x" * 30]
TEXTS = [" ".join(random.Random(i).choices(WORDS, k=5 + i % 30)) + "\nend\n" for i in range(60)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(TEXTS, 300).save(folder)
    return folder


def endside(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        cli.main([str(one) for one in argv])
    said = capsys.readouterr()
    return left.value.code or 0, said.out, said.err


def jsonl(texts: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({"id": 1, field: text}) + "\n" for text in texts).encode()


def texts_of(path: Path, field: str = "text") -> list[str]:
    return [document.text for document in read(find([path]), field, Tally())]


def test_every_kind_of_file_gives_its_texts_in_order(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(TEXTS, "body")))
    (tmp_path / "c.md").write_text(TEXTS[0])
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(("\ufeff" + TEXTS[1]).encode()))
    (tmp_path / "e.png").write_bytes(b"\0")
    assert texts_of(tmp_path / "a.jsonl") == TEXTS
    assert texts_of(tmp_path / "b.jsonl.gz", "body") == TEXTS
    assert texts_of(tmp_path / "c.md") == TEXTS[:1]
    assert texts_of(tmp_path / "d.txt.gz") == TEXTS[1:2]
    found = list(read(find([tmp_path]), "text", Tally()))
    assert [one.id for one in found[:2]] == [f"{tmp_path.name}/a.jsonl:{n}" for n in (1, 2)]
    assert [one.id for one in found[-2:]] == [f"{tmp_path.name}/{n}" for n in ("c.md", "d.txt.gz")]


def test_zstd_and_its_early_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    zstandard = pytest.importorskip("zstandard", reason="zstandard (extra data) is not installed")
    compress = zstandard.ZstdCompressor().compress
    whole = compress(jsonl(TEXTS[:30])) + compress(jsonl(TEXTS[30:]))
    (tmp_path / "a.jsonl.zst").write_bytes(whole)
    assert texts_of(tmp_path / "a.jsonl.zst") == TEXTS, "two frames are one file"
    for damaged in (whole[:-9], b"no" + whole):
        (tmp_path / "a.jsonl.zst").write_bytes(damaged)
        code, _, err = endside(
            capsys,
            "data",
            "pack",
            tmp_path / "a.jsonl.zst",
            tmp_path / "out",
            "--tokenizer",
            "bytes",
        )
        assert code == 2 and "a.jsonl.zst is damaged" in err and "get it again" in err
        assert not (tmp_path / "out").exists()


def test_parquet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrow = pytest.importorskip("pyarrow", reason="pyarrow (extra data) is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    path = tmp_path / "a.parquet"
    parquet.write_table(
        arrow.table({"text": [*TEXTS, None, ""], "n": range(62)}), path, row_group_size=20
    )
    tally = Tally()
    found = list(read(find([path]), "text", tally))
    assert [one.text for one in found] == TEXTS
    assert found[20].id == "a.parquet:21"
    assert (tally.documents, tally.bad, tally.empty) == (60, 1, 1)
    assert tally.bytes == path.stat().st_size
    pack = ("data", "pack", path, tmp_path / "out", "--tokenizer", "bytes")
    code, _, err = endside(capsys, *pack, "--text-field", "content")
    assert code == 2 and 'no column "content"' in err and "text, n" in err
    path.write_bytes(path.read_bytes()[:-30])
    code, _, err = endside(capsys, *pack)
    assert code == 2 and "a.parquet is damaged" in err


def test_what_is_not_installed_names_the_extra(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, package in (("a.parquet", "pyarrow"), ("a.jsonl.zst", "zstandard")):
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
        (tmp_path / name).write_bytes(b"x")
        code, _, err = endside(
            capsys, "data", "pack", tmp_path / name, tmp_path / "out", "--tokenizer", "bytes"
        )
        assert code == 2 and f"{package} is not installed" in err and "endside[data]" in err
        (tmp_path / name).unlink()


def test_bad_lines_are_counted_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        b'{"text": "good one"}', b'{"text": 5, "body": "x"}', b"{broken", b"", b'{"text": "  "}',
        b'["text"]', b'{"text": "\xff"}', '{"text": "good two ü"}'.encode(),
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    out = tmp_path / "out"
    code, said, err = endside(
        capsys, "data", "pack", tmp_path / "a.jsonl", tmp_path / "b.txt", out, "--tokenizer",
        "bytes", "--heldout-share", "0",
    )  # fmt: skip
    assert code == 0
    assert "2 documents of 2 files: " in said and "5 bad, 1 empty left out" in said
    for place, fact in (
        ("a.jsonl:2", 'no text under "text": name the field with --text-field (texts: body)'),
        ("a.jsonl:3", "not JSON"),
        ("a.jsonl:6", "no object"),
        ("a.jsonl:7", "not JSON"),
        ("b.txt", "not UTF-8 (byte 0)"),
    ):
        assert any(f"{place}: {fact}" in line for line in err.splitlines()), (place, err)
    (ids,) = open_packed(out).tokens("train")
    assert bytes(ids[ids < 256].astype("uint8")).decode() == "good onegood two ü"


def test_a_long_text_is_cut_at_a_line_and_memory_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "TEXT_BYTES", 50)
    text = "".join(f"line {i} ü\n" for i in range(40)) + "ü" * 70
    (tmp_path / "a.txt").write_text(text)
    tally = Tally()
    found = list(read(find([tmp_path / "a.txt"]), "text", tally))
    assert "".join(one.text for one in found) == text
    assert len({one.id for one in found}) == len(found) > 8
    assert all(len(one.text.encode()) <= 50 for one in found)
    assert all(one.text.endswith("\n") for one in found[:8])
    assert tally.cut == len(found) - 1


def test_the_result_is_the_same_for_any_number_of_processes(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from endside.data import encode

    monkeypatch.setattr(encode, "CHUNK", 400)
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
    for out, processes in (("one", 1), ("two", 2)):
        code, _, err = endside(
            capsys, "data", "pack", tmp_path / "a.jsonl", tmp_path / out, "--tokenizer", tokenizer,
            "--shard-tokens", "500", "--heldout-share", "0.1", "--processes", processes,
        )  # fmt: skip
        assert code == 0, err
    one, two = (open_packed(tmp_path / out) for out in ("one", "two"))
    assert one.identity == two.identity
    assert len(one.index.splits["train"]) > 1
    code, said, _ = endside(capsys, "data", "check", tmp_path / "one")
    assert code == 0 and "whole" in said


def test_a_killed_pack_goes_on_and_gives_the_same(tmp_path: Path) -> None:
    """kill -9 three times, then the same command to its end: the shards of one that never died."""
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS * 300))
    out, work = tmp_path / "out", tmp_path / ".unfinished-out"
    command = [sys.executable, "-m", "endside", "data", "pack", tmp_path / "a.jsonl", out]
    command += ["--tokenizer", "bytes", "--shard-tokens", "20000"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for shards in (5, 30, 60):
        running = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not (work / f"whole/train_{shards:05d}.bin").exists():
            assert time.monotonic() < deadline and running.poll() is None, "it died too late"
            time.sleep(0.002)
        running.send_signal(signal.SIGKILL)
        assert running.wait() == -signal.SIGKILL
        assert not out.exists() and (work / "journal.json").exists(), "it died in the middle"
    saved = json.loads((work / "journal.json").read_bytes())["documents"]
    assert saved > 1000
    last = subprocess.run(command, env=environment, check=True, capture_output=True)
    assert f"going on behind {saved:,} documents" in last.stderr.decode()
    command[command.index(out)] = tmp_path / "one"
    subprocess.run(command, env=environment, check=True, capture_output=True)
    packed = open_packed(out)
    assert packed.verify() and packed.identity == open_packed(tmp_path / "one").identity
    assert sum(shard.documents for s in packed.index.splits.values() for shard in s) == 18000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "one", "out"]


CONFIG = """
steps = 2
seq_len = 16
batch = 2
schedule.warmup = 1
[model]
preset = "tiny"
vocab_size = {vocabulary}
[data]
{data}
"""


@pytest.fixture
def packed(tmp_path: Path, capsys: pytest.CaptureFixture[str], tokenizer: Path) -> Path:
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
    code, _, err = endside(
        capsys, "data", "pack", tmp_path / "a.jsonl", tmp_path / "p", "--tokenizer", tokenizer
    )
    assert code == 0, err
    return tmp_path / "p"


@pytest.mark.parametrize(
    ("data", "vocabulary", "harm", "message"),
    [
        ("shards = '{p}'", 40, "", "use a vocabulary of"),
        ("shards = '{p}'", 320, "token", r"train_00000.bin is damaged"),
        ("shards = '{p}'", 320, "starts", r"train_00000.starts is damaged"),
        ("shards = '{p}'", 320, "short", r"train_00000.bin has"),
        ("shards = '{p}'", 320, "index", "index.json is damaged"),
        ("shards = '{p}'", 320, "type", "index.json is damaged (vocab_size is 'x'"),
        ("shards = '{p}'\ntokenizer = '{other}'", 320, "", "packed with another tokenizer"),
        ("shards = '{p}/none'", 320, "", "no token shards in"),
        ("[[data.mixture]]\nshards = '{p}'\nweight = 0.7", 320, "", "sum to 0.7"),
        ("[[data.mixture]]\nshards = '{p}'\nwieght = 1.0", 320, "",
         "did you mean data.mixture[0].weight"),
    ],
)  # fmt: skip
def test_bad_data_is_one_message_and_code_2(
    data: str, vocabulary: int, harm: str, message: str,
    packed: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    other = packed.parent / "other"
    train_bpe(["quite other words " * 50], 300).save(other)
    shard, starts, index = (
        packed / name for name in ("train_00000.bin", "train_00000.starts", "index.json")
    )
    if harm == "token":
        shard.write_bytes(b"\xff\xff" + shard.read_bytes()[2:])
    elif harm == "starts":
        starts.write_bytes(starts.read_bytes()[:-8] + bytes(8))
    elif harm == "short":
        shard.write_bytes(shard.read_bytes()[:-2])
    elif harm == "index":
        index.write_bytes(index.read_bytes()[:100])
    elif harm == "type":
        index.write_text(json.dumps({**json.loads(index.read_text()), "vocab_size": "x"}))
    config = packed.parent / "run.toml"
    config.write_text(CONFIG.format(data=data.format(p=packed, other=other), vocabulary=vocabulary))
    code, _, err = endside(capsys, "pretrain", config)
    assert code == 2 and message in err, err
    assert err.count("endside: ") == 1 and "Traceback" not in err
    if harm and harm != "index" and harm != "type":
        code, _, err = endside(capsys, "data", "check", packed)
        assert code == 2 and shard.stem in err


@pytest.mark.parametrize(
    ("content", "argv", "message"),
    [
        (b"", (), "the corpus holds no documents"),
        (b"nothing here", (), "the corpus holds no documents"),
        (b'{"text": "x"}', ("--processes", "0"), "--processes is 0"),
        (b'{"text": "x"}', ("--heldout-share", "1.5"), "heldout_share 1.5"),
    ],
)
def test_an_empty_corpus_and_wrong_flags(
    content: bytes, argv: tuple, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    pack = ("data", "pack", tmp_path / "a.jsonl", tmp_path / "out")
    code, _, err = endside(capsys, *pack, "--tokenizer", "bytes", *argv)
    assert code == 2 and message in err and err.count("endside: ") == 1
    assert not (tmp_path / "out").exists()
    for wrong, said in (
        (("data", "pack", tmp_path / "a.jsonl"), "use: endside data pack"),
        (("data", "pakc"), "use: endside data pack"),
        (("data", "pack", tmp_path / "no", tmp_path / "out", "--tokenizer", "bytes"), "no text at"),
        (("data", "check", tmp_path), "no token shards in"),
    ):
        code, _, err = endside(capsys, *wrong)
        assert code == 2 and said in err
