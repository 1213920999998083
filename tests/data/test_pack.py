"""Token shards hold every token once, keep the held-out documents out, and appear at once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from endside.data import journal
from endside.data.document import Document
from endside.data.pack import Encoder, PackConfig, byte_encoder, open_packed, pack
from endside.errors import UserError

DOCUMENTS = [Document(f"d{i}", chr(97 + i % 26) * (i % 7 + 1), "test") for i in range(200)]


def texts(folder: Path, split: str) -> list[bytes]:
    """The documents of a split, decoded from the shards by their starts."""
    packed = open_packed(folder)
    found = []
    for ids, starts in zip(packed.tokens(split), packed.starts(split), strict=True):
        ends = [*starts[1:], len(ids)]
        for start, end in zip(starts, ends, strict=True):
            document = ids[int(start) : int(end)]
            assert document[-1] == 256, "every document ends with eos"
            found.append(bytes(document[:-1].astype(np.uint8)))
    return found


def test_every_document_is_on_one_side_once(tmp_path: Path) -> None:
    index = pack(DOCUMENTS, tmp_path / "p", byte_encoder(), PackConfig(0.2, shard_tokens=100))
    train, held = texts(tmp_path / "p", "train"), texts(tmp_path / "p", "heldout")
    assert sorted(train + held) == sorted(document.text.encode() for document in DOCUMENTS)
    assert 20 < len(held) < 60, "a share of 0.2 holds out about 40 of 200"
    assert len(index.splits["train"]) > 3
    assert index.text_bytes == {"train": sum(map(len, train)), "heldout": sum(map(len, held))}
    assert index.dtype == "uint16"
    for shard in index.splits["train"]:
        data = (tmp_path / "p" / f"{shard.name}.bin").read_bytes()
        assert hashlib.sha256(data).hexdigest() == shard.sha256


def test_the_split_depends_on_the_document_and_its_group_alone(tmp_path: Path) -> None:
    pack(DOCUMENTS, tmp_path / "all", byte_encoder(), PackConfig(0.2))
    pack(DOCUMENTS[::-3], tmp_path / "some", byte_encoder(), PackConfig(0.2))
    assert set(texts(tmp_path / "some", "heldout")) <= set(texts(tmp_path / "all", "heldout"))
    grouped = [replace(document, group="one") for document in DOCUMENTS]
    index = pack(grouped, tmp_path / "grouped", byte_encoder(), PackConfig(0.2))
    # One group cannot be divided: it trains, and its last document gives up a tail.
    sides = [sum(shard.documents for shard in shards) for shards in index.splits.values()]
    assert sides == [200, 1]


def test_a_single_text_gives_up_its_tail(tmp_path: Path) -> None:
    text = "".join(map(str, range(2000)))
    pack([Document("only", text, "test")], tmp_path / "p", byte_encoder(), PackConfig(0.1))
    packed = open_packed(tmp_path / "p")
    (train,), (held,) = packed.tokens("train"), packed.tokens("heldout")
    assert len(held) == round(0.1 * (len(text) + 1))
    assert bytes(np.concatenate([train, held])[:-1].astype(np.uint8)).decode() == text


def test_bos_and_wide_ids(tmp_path: Path) -> None:
    encoder = Encoder(lambda text: [70000 + len(text)], 73448, eos=2, fingerprint="x", bos=1)
    index = pack(DOCUMENTS[:3], tmp_path / "p", encoder, PackConfig(0.0))
    (ids,) = open_packed(tmp_path / "p").tokens("train")
    assert ids.tolist() == [1, 70001, 2, 1, 70002, 2, 1, 70003, 2]
    assert (index.dtype, index.tokenizer, index.vocab_size) == ("uint32", "x", 73448)
    assert index.splits["heldout"] == []


def test_a_token_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    encoder = Encoder(lambda text: [9], 9, eos=2, fingerprint="x")
    with pytest.raises(UserError, match="document d0 has token 9, the vocabulary ends at 8"):
        pack(DOCUMENTS, tmp_path / "p", encoder)
    assert list(tmp_path.iterdir()) == []


def test_an_error_or_an_existing_folder_leaves_nothing_new(tmp_path: Path) -> None:
    def broken() -> Iterator[Document]:
        yield DOCUMENTS[0]
        raise UserError("the source ended badly")

    with pytest.raises(UserError, match="ended badly"):
        pack(broken(), tmp_path / "p", byte_encoder())
    assert list(tmp_path.iterdir()) == []
    pack(DOCUMENTS, tmp_path / "p", byte_encoder())
    before = open_packed(tmp_path / "p").identity
    with pytest.raises(UserError, match="exists"):
        pack(DOCUMENTS[:9], tmp_path / "p", byte_encoder())
    assert open_packed(tmp_path / "p").identity == before
    with pytest.raises(UserError, match="holds no documents"):
        pack([], tmp_path / "q", byte_encoder())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        pack(DOCUMENTS, tmp_path / "file" / "p", byte_encoder())


KILLED = """
import os, signal, sys
from pathlib import Path
from endside.data.document import Document
from endside.data.pack import PackConfig, byte_encoder, pack
def documents():
    for i in range(1000):
        yield Document(str(i), "text " * 50, "test")
    os.kill(os.getpid(), signal.SIGKILL)
pack(documents(), Path(sys.argv[1]), byte_encoder(), PackConfig(shard_tokens=2000))
"""


def test_a_killed_pack_is_no_data_set_and_can_be_repeated(tmp_path: Path) -> None:
    root = str(Path(__file__).resolve().parents[2])
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "p")], env={**os.environ, "PYTHONPATH": root}
    )
    assert ended.returncode == -signal.SIGKILL
    assert not (tmp_path / "p").exists()
    assert any(tmp_path.iterdir()), "it died after it had begun to write"
    with pytest.raises(UserError, match="no token shards in"):
        open_packed(tmp_path / "p")
    pack(DOCUMENTS, tmp_path / "p", byte_encoder(), PackConfig(0.2))
    assert len(texts(tmp_path / "p", "train")) > 100
    assert [file.name for file in tmp_path.iterdir()] == ["p"], "the dead writer's part is gone"


class Stop(Exception):
    """What ends a packing in these tests."""


def until(count: int) -> Iterator[Document]:
    yield from DOCUMENTS[:count]
    raise Stop


@pytest.mark.parametrize("shard_tokens", [37, 100, 100_000])
def test_wherever_it_stops_the_result_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_tokens: int
) -> None:
    """Stopped again and again, saved after every document or only when a shard ends."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # the disk's time, not a question here
    config, said = PackConfig(0.2, shard_tokens), []
    pack(DOCUMENTS, tmp_path / "whole", byte_encoder(), config)
    want = open_packed(tmp_path / "whole").identity
    for number, seconds in enumerate((-1.0, 1e9)):
        monkeypatch.setattr(journal, "SAVE_SECONDS", seconds)
        out = tmp_path / f"p{number}"
        for count in (1, 5, 5, 29, 111, 200):
            with pytest.raises(Stop):
                pack(until(count), out, byte_encoder(), config, note=said.append)
        pack(DOCUMENTS, out, byte_encoder(), config, note=said.append)
        assert open_packed(out).verify() and open_packed(out).identity == want
        assert not (tmp_path / f".unfinished-p{number}").exists()
    assert "going on behind 111 documents that are packed already" in said


def test_what_was_left_is_used_for_the_same_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # the disk's time, not a question here
    monkeypatch.setattr(journal, "SAVE_SECONDS", -1.0)
    out, left, said = tmp_path / "p", tmp_path / ".unfinished-p", []
    config = PackConfig(0.2, 300)

    def stop() -> None:
        with pytest.raises(Stop):
            pack(until(150), out, byte_encoder(), config)

    stop()
    with pytest.raises(UserError, match="the texts are not those"):
        pack(DOCUMENTS[1:], out, byte_encoder(), config)
    assert not left.exists(), "what is of no use is gone"
    stop()
    with pytest.raises(UserError, match="the texts are not those"):
        pack(DOCUMENTS[:99], out, byte_encoder(), config)
    stop()
    pack(DOCUMENTS, out, byte_encoder(), PackConfig(0.1, 300), note=said.append)
    out.rename(tmp_path / "other flags")
    stop()
    (left / "whole" / "train_00001.bin").write_bytes(b"torn")
    pack(DOCUMENTS, out, byte_encoder(), config, note=said.append)
    out.rename(tmp_path / "torn")
    stop()
    (left / "journal.json").write_text("{")
    pack(DOCUMENTS, out, byte_encoder(), config, note=said.append)
    assert not said, "each of them begins anew"
    assert open_packed(out).identity == open_packed(tmp_path / "torn").identity
    assert open_packed(out).verify()


def test_a_journal_does_not_outlive_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut short; with other settings cut short before a save; then as at first."""
    out, config = tmp_path / "p", PackConfig(0.2, 100_000)
    pack(DOCUMENTS, tmp_path / "whole", byte_encoder(), config)
    monkeypatch.setattr(journal, "SAVE_SECONDS", -1.0)
    with pytest.raises(Stop):
        pack(until(50), out, byte_encoder(), config)
    monkeypatch.setattr(journal, "SAVE_SECONDS", 1e9)
    left = tmp_path / ".unfinished-p"
    kept = tmp_path / "kept"

    def die() -> Iterator[Document]:
        yield from DOCUMENTS[100:]
        shutil.copytree(left, kept)  # as a kill would leave it
        raise Stop

    with pytest.raises(Stop):
        pack(die(), out, byte_encoder(), PackConfig(0.5, 100_000))
    shutil.rmtree(left, ignore_errors=True)
    kept.rename(left)
    for split in ("train", "heldout"):  # what the dead process had not yet handed to the disk
        for suffix in (".bin", ".starts"):
            (left / "whole" / f"{split}_00000{suffix}").write_bytes(b"\0" * 4096)
    pack(DOCUMENTS, out, byte_encoder(), config)
    assert open_packed(out).identity == open_packed(tmp_path / "whole").identity


def test_two_packings_of_one_folder_do_not_meet(tmp_path: Path) -> None:
    def second() -> Iterator[Document]:
        yield DOCUMENTS[0]
        pack(DOCUMENTS, tmp_path / "p", byte_encoder())

    with pytest.raises(UserError, match="another process is writing"):
        pack(second(), tmp_path / "p", byte_encoder())


def test_damage_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    pack(DOCUMENTS, folder, byte_encoder(), PackConfig(0.1))
    shard = folder / "train_00000.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-2])
    with pytest.raises(UserError, match=r"train_00000\.bin has \d+ bytes instead of"):
        open_packed(folder).tokens("train")
    shard.unlink()
    with pytest.raises(UserError, match=r"train_00000\.bin is missing"):
        open_packed(folder).tokens("train")
    index = folder / "index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps({**content, "format": 99}))
    with pytest.raises(UserError, match="format 99"):
        open_packed(folder)
    index.write_text("{")
    with pytest.raises(UserError, match=r"index\.json is damaged"):
        open_packed(folder)
