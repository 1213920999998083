"""Documents become token shards on disk: flat arrays of ids, mapped into memory when read.

    folder/index.json         tokenizer, vocabulary, dtype, and per split the list of shards
    folder/train_00000.bin    ids, end to end: [bos] ids eos [bos] ids eos ...
    folder/train_00000.starts uint64: where each document starts in the shard
    folder/heldout_00000.bin  the documents that training never sees

A document is held out iff the hash of its group falls in the first `heldout_share` of all hashes:
the same document lands on the same side in every corpus and on every machine, in any order. A
corpus too small for that gives up the tail of its last training shard instead. The folder appears
at once, so a killed `pack` leaves nothing behind that could be mistaken for data, and goes on where
it was when it is called again (`journal.py`); each shard's sha256 is in the index, whose own hash
is the identity of the data.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np

from endside.atomic import resumable_folder
from endside.config import build
from endside.data.document import Document
from endside.data.journal import JOURNAL, Journal
from endside.errors import UserError
from endside.shards import digest

if TYPE_CHECKING:
    from endside.tokenizer import Tokenizer

FORMAT = 1
INDEX = "index.json"
Split = Literal["train", "heldout"]


@dataclass(frozen=True)
class PackConfig:
    """How documents are divided."""

    heldout_share: float = 0.02  # of documents
    shard_tokens: int = 1 << 27  # a shard is closed by the document that reaches it

    def __post_init__(self) -> None:
        if not 0 <= self.heldout_share < 1 or self.shard_tokens < 1:
            raise UserError(
                f"pack.heldout_share {self.heldout_share} must be in [0, 1) and shard_tokens "
                f"{self.shard_tokens} at least 1"
            )


@dataclass(frozen=True)
class Encoder:
    """What packing needs of a tokenizer."""

    encode: Callable[[str], Sequence[int]]
    vocab_size: int
    eos: int  # ends every document
    fingerprint: str  # identity of the tokenizer
    bos: int | None = None  # starts every document

    @property
    def asked(self) -> dict[str, Any]:
        """What the ids depend on, the texts aside."""
        return {
            "tokenizer": self.fingerprint, "vocab_size": self.vocab_size, "eos": self.eos,
            "bos": self.bos,
        }  # fmt: skip

    def each(self, documents: Iterable[Document]) -> Iterator[tuple[Document, Sequence[int]]]:
        """Each document and its ids."""
        for document in documents:
            yield document, self.encode(document.text)


Encode = Callable[[Iterable[Document]], Iterable[tuple[Document, Sequence[int]]]]


def byte_encoder() -> Encoder:
    """UTF-8 bytes as ids 0..255 and 256 as the end: a tokenizer for runs that have none."""
    return Encoder(lambda text: text.encode("utf-8"), vocab_size=257, eos=256, fingerprint="bytes")


def tokenizer_encoder(tokenizer: Tokenizer) -> Encoder:
    """A tokenizer for packing: BOS where it wants one, its first end-of-sequence id at the end."""
    if not tokenizer.eos_ids:
        raise UserError("the tokenizer has no end-of-sequence token: name one in its config")
    return Encoder(
        lambda text: tokenizer.encode(text, bos=False),
        vocab_size=tokenizer.vocab_size,
        eos=tokenizer.eos_ids[0],
        fingerprint=tokenizer.fingerprint,
        bos=tokenizer.bos_id if tokenizer.add_bos else None,
    )


@dataclass(frozen=True)
class Shard:
    """One pair of files."""

    name: str  # without suffix
    tokens: int
    documents: int
    sha256: str  # of the .bin
    starts_sha256: str = ""  # of the .starts; empty in folders that older versions packed


@dataclass(frozen=True)
class PackedIndex:
    """What index.json holds."""

    format: int
    tokenizer: str
    vocab_size: int
    eos: int
    bos: int | None
    dtype: Literal["uint16", "uint32"]
    text_bytes: dict[str, int]  # UTF-8 bytes of each split's text, for bits per byte
    splits: dict[str, list[Shard]]


def pack(
    documents: Iterable[Document],
    folder: Path,
    encoder: Encoder,
    config: PackConfig | None = None,
    *,
    encode: Encode | None = None,
    note: Callable[[str], object] = lambda _: None,
) -> PackedIndex:
    """Write the shards of `documents` to `folder`, which must not exist yet.

    What an earlier call with the same texts and settings did before it was cut short is kept.
    encode(documents) -> each document in order and its ids, in another way than one by one here.
    note(text): told where it goes on.
    """
    config = config or PackConfig()
    if folder.exists():
        raise UserError(f"{folder} exists: remove it, or pack into another folder")
    with resumable_folder(folder) as work:
        journal = Journal(work, {"format": FORMAT, **asdict(config), **encoder.asked})
        with contextlib.ExitStack() as files:
            writers, saved = _writers(work / "whole", encoder, config, journal.read())
            for writer in writers.values():
                files.callback(writer.drop)
            if saved:
                note(f"going on behind {saved['documents']:,} documents that are packed already")
                documents = journal.skip(documents, saved)
            else:
                journal.forget()
            for document, ids in (encode or encoder.each)(documents):
                held = _hash_share(document.split_key) < config.heldout_share
                closed = writers["heldout" if held else "train"].add(document, ids)
                journal.add(document)
                if closed or journal.due():
                    journal.save({split: writer.save() for split, writer in writers.items()})
            index = _finish(writers, encoder, config)
        (work / "whole" / INDEX).write_text(json.dumps(asdict(index), indent=1), encoding="utf-8")
    return index


def _writers(
    part: Path, encoder: Encoder, config: PackConfig, saved: dict[str, Any] | None
) -> tuple[dict[str, _Writer], dict[str, Any] | None]:
    """Writers that go on where `saved` says, and that; or new ones and None."""
    writers = {split: _Writer(part, split, encoder, config) for split in ("train", "heldout")}
    if saved and all(writers[split].restore(saved["files"][split]) for split in writers):
        kept = {name for writer in writers.values() for name in writer.files()}
        for file in part.iterdir():
            if file.name not in kept:
                file.unlink()
        return writers, saved
    for writer in writers.values():
        writer.drop()
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    return {split: _Writer(part, split, encoder, config) for split in writers}, None


def _hash_share(key: str) -> float:
    """Where a key falls in [0, 1), evenly and for ever."""
    digest = hashlib.sha256(key.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _finish(writers: dict[str, _Writer], encoder: Encoder, config: PackConfig) -> PackedIndex:
    train, heldout = writers["train"], writers["heldout"]
    if not train.tokens and not heldout.tokens:
        raise UserError("the corpus holds no documents: give text to pack")
    if config.heldout_share and not heldout.tokens:
        heldout.take(train.give_tail(config.heldout_share))
    return PackedIndex(
        format=FORMAT, tokenizer=encoder.fingerprint, vocab_size=encoder.vocab_size,
        eos=encoder.eos, bos=encoder.bos, dtype=_dtype(encoder).name,
        text_bytes={split: writer.text_bytes for split, writer in writers.items()},
        splits={split: writer.close() for split, writer in writers.items()},
    )  # fmt: skip


def _dtype(encoder: Encoder) -> np.dtype:
    return np.dtype(np.uint16 if encoder.vocab_size <= 1 << 16 else np.uint32)


class _Writer:
    """The shards of one split, the last of them open."""

    def __init__(self, folder: Path, split: str, encoder: Encoder, config: PackConfig) -> None:
        self.folder, self.split, self.encoder, self.config = folder, split, encoder, config
        self.closed: list[Shard] = []
        self.tokens = 0  # in all shards
        self.text_bytes = 0
        self._dtype = _dtype(encoder)
        self._file: BinaryIO | None = None
        self._begin()

    def _begin(self) -> None:
        self._starts, self._length, self._noted = array("Q"), 0, 0

    def add(self, document: Document, encoded: Sequence[int]) -> bool:
        """Append one document; whether that closed a shard."""
        bos = [] if self.encoder.bos is None else [self.encoder.bos]
        ids = np.array([*bos, *encoded, self.encoder.eos], dtype=np.int64)
        if ids.min() < 0 or ids.max() >= self.encoder.vocab_size:
            raise UserError(
                f"document {document.id} has token {ids.max()}, the vocabulary ends at "
                f"{self.encoder.vocab_size - 1}: pack with the tokenizer the model was made for"
            )
        self.text_bytes += len(document.text.encode("utf-8"))
        return self.take(ids)

    def take(self, ids: np.ndarray) -> bool:
        if self._file is None:
            self._file = open(self._path(".bin"), "w+b")  # noqa: SIM115 (see drop)
        self._file.write(ids.astype(self._dtype).tobytes())
        self._starts.append(self._length)
        self._length += len(ids)
        self.tokens += len(ids)
        full = self._length >= self.config.shard_tokens
        if full:
            self._close_shard()
        return full

    def give_tail(self, share: float) -> np.ndarray:
        """Remove and return the last `share` of the last document, one token at least."""
        if self._file is None:
            raise UserError(
                f"pack.shard_tokens {self.config.shard_tokens} is too small to hold out a tail: "
                "raise it"
            )
        last = self._length - self._starts[-1]
        count = min(max(1, round(share * self._length)), last - 1)
        self._length -= count
        self.tokens -= count
        self._file.seek(self._length * self._dtype.itemsize)
        tail = np.frombuffer(self._file.read(), self._dtype)
        self._file.truncate(self._length * self._dtype.itemsize)
        self._file.seek(0, os.SEEK_END)
        return tail

    def close(self) -> list[Shard]:
        if self._length:
            self._close_shard()
        return self.closed

    def drop(self) -> None:
        """Close the file of a shard that will not be."""
        if self._file is not None:
            self._file.close()

    def save(self) -> dict[str, Any]:
        """Put all on the disk; what `restore` needs to go on behind it."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            with self._path(".starts").open("ab") as file:
                file.write(self._starts[self._noted :].tobytes())
                file.flush()
                os.fsync(file.fileno())
            self._noted = len(self._starts)
        return {
            "closed": [asdict(shard) for shard in self.closed], "tokens": self.tokens,
            "text_bytes": self.text_bytes, "length": self._length, "documents": self._noted,
        }  # fmt: skip

    def restore(self, saved: dict[str, Any]) -> bool:
        """Go on behind what was saved; False where the files are not there."""
        self.closed = [build(Shard, shard, source=JOURNAL) for shard in saved["closed"]]
        width = self._dtype.itemsize
        counts = [(shard.name, shard.tokens, shard.documents) for shard in self.closed]
        counts += [(self._name, saved["length"], saved["documents"])] if saved["length"] else []
        for name, tokens, documents in counts:
            for suffix, size in ((".bin", tokens * width), (".starts", 8 * documents)):
                path = self.folder / f"{name}{suffix}"
                if not path.is_file() or path.stat().st_size < size:
                    return False
                os.truncate(path, size)
        self.tokens, self.text_bytes = saved["tokens"], saved["text_bytes"]
        if saved["length"]:
            self._file = open(self._path(".bin"), "r+b")  # noqa: SIM115 (see drop)
            self._file.seek(0, os.SEEK_END)
            self._starts = array("Q", self._path(".starts").read_bytes())
            self._length, self._noted = saved["length"], saved["documents"]
        return True

    def files(self) -> list[str]:
        """Names of the files that hold what was taken."""
        names = [shard.name for shard in self.closed] + ([self._name] if self._length else [])
        return [name + suffix for name in names for suffix in (".bin", ".starts")]

    @property
    def _name(self) -> str:
        return f"{self.split}_{len(self.closed):05d}"

    def _path(self, suffix: str) -> Path:
        return self.folder / f"{self._name}{suffix}"

    def _close_shard(self) -> None:
        assert self._file is not None, "a shard that is closed has a document"
        self._file.close()
        self._file = None
        self._path(".starts").write_bytes(self._starts.tobytes())
        self.closed.append(
            Shard(
                self._name, self._length, len(self._starts), digest(self._path(".bin")),
                digest(self._path(".starts")),
            )
        )  # fmt: skip
        self._begin()


@dataclass(frozen=True)
class OpenShard:
    """One shard, mapped into memory."""

    path: Path
    tokens: np.ndarray
    starts: np.ndarray  # uint64, ascending from 0
    vocab_size: int

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids start .. stop and the document of each, numbered from 0; both int64."""
        ids = self.tokens[start:stop].astype(np.int64)
        if ids.max() >= self.vocab_size:
            raise UserError(
                f"{self.path} has token {ids.max()} between {start} and {stop}, its vocabulary "
                f"ends at {self.vocab_size - 1}: the file is damaged, pack the corpus again"
            )
        positions = np.arange(start, stop, dtype=np.uint64)
        owner = np.searchsorted(self.starts, positions, side="right").astype(np.int64)
        return ids, owner - owner[0]

    def bounds(self) -> np.ndarray:
        """Where documents begin, and where the last one ends: int64, one more than documents."""
        return np.append(self.starts, len(self.tokens)).astype(np.int64)


@dataclass(frozen=True)
class Packed:
    """An opened folder of shards."""

    folder: Path
    index: PackedIndex
    identity: str  # sha256 of index.json, hence of every token

    def tokens(self, split: Split) -> list[np.ndarray]:
        """The ids of each shard of a split, memory-mapped, read-only."""
        return [
            self._map(shard, ".bin", self.index.dtype, shard.tokens)
            for shard in self.index.splits[split]
        ]

    def starts(self, split: Split) -> list[np.ndarray]:
        """The document starts of each shard, ascending from 0."""
        return [
            self._map(shard, ".starts", "uint64", shard.documents)
            for shard in self.index.splits[split]
        ]

    def shards(self, split: Split) -> list[OpenShard]:
        """The shards of a split; UserError where a file is not what the index says."""
        opened = []
        parts = zip(self.index.splits[split], self.tokens(split), self.starts(split), strict=True)
        for shard, tokens, starts in parts:
            path = self.folder / f"{shard.name}.bin"
            one = OpenShard(path, tokens, starts, self.index.vocab_size)
            bounds = one.bounds()
            if bounds[0] != 0 or (np.diff(bounds) <= 0).any():
                raise UserError(
                    f"{path.with_suffix('.starts')} is damaged (its documents do not follow each "
                    "other): pack the corpus again"
                )
            opened.append(one)
        return opened

    def verify(self, at_most: float = float("inf")) -> bool:
        """Compare the sha256 of all files, unless they have more than `at_most` bytes.

        Says whether it looked; UserError names the file that differs.
        """
        wanted = [
            (self.folder / (shard.name + suffix), sha256)
            for shards in self.index.splits.values()
            for shard in shards
            for suffix, sha256 in ((".bin", shard.sha256), (".starts", shard.starts_sha256))
            if sha256
        ]
        for split in self.index.splits:
            self.tokens(split), self.starts(split)  # the sizes
        if sum(path.stat().st_size for path, _ in wanted) > at_most:
            return False
        for path, sha256 in wanted:
            if digest(path) != sha256:
                raise UserError(
                    f"{path} is damaged (its sha256 is not the one in {INDEX}): pack the corpus "
                    "again"
                )
        return True

    def _map(self, shard: Shard, suffix: str, dtype: str, count: int) -> np.ndarray:
        path = self.folder / (shard.name + suffix)
        expected = count * np.dtype(dtype).itemsize
        size = path.stat().st_size if path.is_file() else -1
        if size != expected:
            state = "is missing" if size < 0 else f"has {size} bytes instead of {expected}"
            raise UserError(f"{path} {state}: pack the corpus again")
        return np.memmap(path, dtype=dtype, mode="r", shape=(count,))


def open_packed(folder: str | Path) -> Packed:
    """Read the index of a packed folder; raises UserError where there is none."""
    path = Path(folder) / INDEX
    try:
        raw = path.read_bytes()
        index = build(PackedIndex, json.loads(raw), source=INDEX)
    except FileNotFoundError:
        raise UserError(
            f"no token shards in {folder} ({INDEX} is missing): pack a corpus into it first"
        ) from None
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}): pack the corpus again") from error
    if not {"train", "heldout"} <= index.splits.keys():
        raise UserError(f"{path} is damaged (it lacks a split): pack the corpus again")
    if index.format != FORMAT:
        raise UserError(
            f"{path} has format {index.format}, this version reads {FORMAT}: pack the corpus again"
        )
    return Packed(Path(folder), index, hashlib.sha256(raw).hexdigest())
