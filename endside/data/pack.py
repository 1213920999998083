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

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from endside.atomic import atomic_folder
from endside.data.document import Document
from endside.errors import UserError

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
    documents: Iterable[Document], folder: Path, encoder: Encoder, config: PackConfig | None = None
) -> PackedIndex:
    """Write the shards of `documents` to `folder`, which must not exist yet."""
    config = config or PackConfig()
    if folder.exists():
        raise UserError(f"{folder} exists: remove it, or pack into another folder")
    with atomic_folder(folder) as part:
        writers = {split: _Writer(part, split, encoder, config) for split in ("train", "heldout")}
        for document in documents:
            held = _hash_share(document.split_key) < config.heldout_share
            writers["heldout" if held else "train"].add(document)
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


@dataclass
class _Writer:
    """The open shard of one split."""

    folder: Path
    split: str
    encoder: Encoder
    config: PackConfig
    closed: list[Shard] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    ids: list[np.ndarray] = field(default_factory=list)
    length: int = 0  # tokens in the open shard
    tokens: int = 0  # in all shards
    text_bytes: int = 0

    def add(self, document: Document) -> None:
        bos = [] if self.encoder.bos is None else [self.encoder.bos]
        ids = np.array(
            [*bos, *self.encoder.encode(document.text), self.encoder.eos], dtype=np.int64
        )
        if ids.min() < 0 or ids.max() >= self.encoder.vocab_size:
            raise UserError(
                f"document {document.id} has token {ids.max()}, the vocabulary ends at "
                f"{self.encoder.vocab_size - 1}: pack with the tokenizer the model was made for"
            )
        self.text_bytes += len(document.text.encode("utf-8"))
        self.take(ids)

    def take(self, ids: np.ndarray) -> None:
        self.starts.append(self.length)
        self.ids.append(ids.astype(_dtype(self.encoder)))
        self.length += len(ids)
        self.tokens += len(ids)
        if self.length >= self.config.shard_tokens:
            self._write()

    def give_tail(self, share: float) -> np.ndarray:
        """Remove and return the last `share` of the last document, one token at least."""
        if not self.ids:
            raise UserError(
                f"pack.shard_tokens {self.config.shard_tokens} is too small to hold out a tail: "
                "raise it"
            )
        whole = self.ids[-1]
        wanted = max(1, round(share * self.length))
        cut = len(whole) - min(wanted, len(whole) - 1)
        self.ids[-1] = whole[:cut]
        self.length -= len(whole) - cut
        self.tokens -= len(whole) - cut
        return whole[cut:]

    def close(self) -> list[Shard]:
        if self.ids:
            self._write()
        return self.closed

    def _write(self) -> None:
        name = f"{self.split}_{len(self.closed):05d}"
        data = np.concatenate(self.ids)
        data.tofile(self.folder / f"{name}.bin")
        np.array(self.starts, dtype=np.uint64).tofile(self.folder / f"{name}.starts")
        digest = hashlib.sha256(data.tobytes()).hexdigest()
        self.closed.append(Shard(name, len(data), len(self.starts), digest))
        self.starts, self.ids, self.length = [], [], 0


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
        data = json.loads(raw)
        splits = {
            name: [Shard(**shard) for shard in shards] for name, shards in data["splits"].items()
        }
        index = PackedIndex(**{**data, "splits": splits})
    except FileNotFoundError:
        raise UserError(
            f"no token shards in {folder} ({INDEX} is missing): pack a corpus into it first"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): pack the corpus again") from error
    if index.format != FORMAT:
        raise UserError(
            f"{path} has format {index.format}, this version reads {FORMAT}: pack the corpus again"
        )
    return Packed(Path(folder), index, hashlib.sha256(raw).hexdigest())
