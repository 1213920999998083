"""Documents become token shards on disk: flat arrays of ids, mapped into memory when read.

    folder/index.json         tokenizer, vocabulary, dtype, and per split the list of shards
    folder/train_00000.bin    ids, end to end: [bos] ids eos [bos] ids eos ...
    folder/train_00000.starts uint64: where each document starts in the shard
    folder/heldout_00000.bin  the documents that training never sees

A document is held out iff the hash of its group falls in the first `heldout_share` of all hashes:
the same document lands on the same side in every corpus and on every machine, in any order. A
corpus too small for that gives up the tail of its last training shard instead. The folder appears
at once, so a killed `pack` leaves nothing behind that could be mistaken for data; each shard's
sha256 is in the index, whose own hash is the identity of the data.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

import numpy as np

from endside.atomic import atomic_folder
from endside.config import build
from endside.data.document import Document
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
) -> PackedIndex:
    """Write the shards of `documents` to `folder`, which must not exist yet.

    encode(documents) -> each document in order and its ids, in another way than one by one here.
    """
    config = config or PackConfig()
    if folder.exists():
        raise UserError(f"{folder} exists: remove it, or pack into another folder")
    with atomic_folder(folder) as part:
        writers = {split: _Writer(part, split, encoder, config) for split in ("train", "heldout")}
        with contextlib.ExitStack() as files:
            for writer in writers.values():
                files.callback(writer.drop)
            for document, ids in (encode or encoder.each)(documents):
                held = _hash_share(document.split_key) < config.heldout_share
                writers["heldout" if held else "train"].add(document, ids)
            index = _finish(writers, encoder, config)
        (part / INDEX).write_text(json.dumps(asdict(index), indent=1), encoding="utf-8")
    return index


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
    """The open shard of one split: on the disk, but for its last document."""

    def __init__(self, folder: Path, split: str, encoder: Encoder, config: PackConfig) -> None:
        self.folder, self.split, self.encoder, self.config = folder, split, encoder, config
        self.closed: list[Shard] = []
        self.tokens = 0  # in all shards
        self.text_bytes = 0
        self._file: BinaryIO | None = None
        self._begin()

    def _begin(self) -> None:
        self._starts, self._length, self._last = array("Q"), 0, np.empty(0, _dtype(self.encoder))
        self._digest = hashlib.sha256()

    def add(self, document: Document, encoded: Sequence[int]) -> None:
        bos = [] if self.encoder.bos is None else [self.encoder.bos]
        ids = np.array([*bos, *encoded, self.encoder.eos], dtype=np.int64)
        if ids.min() < 0 or ids.max() >= self.encoder.vocab_size:
            raise UserError(
                f"document {document.id} has token {ids.max()}, the vocabulary ends at "
                f"{self.encoder.vocab_size - 1}: pack with the tokenizer the model was made for"
            )
        self.text_bytes += len(document.text.encode("utf-8"))
        self.take(ids)

    def take(self, ids: np.ndarray) -> None:
        self._write_last()
        self._starts.append(self._length)
        self._last = ids.astype(_dtype(self.encoder))
        self._length += len(ids)
        self.tokens += len(ids)
        if self._length >= self.config.shard_tokens:
            self._close_shard()

    def give_tail(self, share: float) -> np.ndarray:
        """Remove and return the last `share` of the last document, one token at least."""
        if not len(self._last):
            raise UserError(
                f"pack.shard_tokens {self.config.shard_tokens} is too small to hold out a tail: "
                "raise it"
            )
        whole = self._last
        wanted = max(1, round(share * self._length))
        cut = len(whole) - min(wanted, len(whole) - 1)
        self._last = whole[:cut]
        self._length -= len(whole) - cut
        self.tokens -= len(whole) - cut
        return whole[cut:]

    def close(self) -> list[Shard]:
        if self._length:
            self._close_shard()
        return self.closed

    def drop(self) -> None:
        """Close the file of a shard that will not be."""
        if self._file is not None:
            self._file.close()

    @property
    def _name(self) -> str:
        return f"{self.split}_{len(self.closed):05d}"

    def _write_last(self) -> None:
        if not len(self._last):
            return
        if self._file is None:
            self._file = open(self.folder / f"{self._name}.bin", "wb")  # noqa: SIM115 (see drop)
        data = self._last.tobytes()
        self._digest.update(data)
        self._file.write(data)

    def _close_shard(self) -> None:
        self._write_last()
        assert self._file is not None, "a shard that is closed has a document"
        self._file.close()
        self._file = None
        starts = self._starts.tobytes()
        (self.folder / f"{self._name}.starts").write_bytes(starts)
        self.closed.append(
            Shard(
                self._name, self._length, len(self._starts), self._digest.hexdigest(),
                hashlib.sha256(starts).hexdigest(),
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
