"""`endside data pack|check`: text to token shards.

    endside data pack SRC... OUT --tokenizer DIR     .txt .md .jsonl .parquet, also .zst and .gz
    endside data check DIR...                        compare shards with their checksums

SRC are files and folders. The result appears in OUT whole or not at all, and depends on nothing but
the texts, the tokenizer and the flags: not on the number of processes, nor on how often it was cut
short: the same command goes on where it was. Lines that cannot be used
are counted and named; the rest is packed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from endside.errors import UserError
from endside.verbs import parse

if TYPE_CHECKING:
    from endside.data.document import Document
    from endside.data.files import Tally, TextFile

USE = "use: endside data pack SRC... OUT --tokenizer DIR (or bytes), or endside data check DIR..."


@dataclass(frozen=True)
class Pack:
    """Text to token shards with an index."""

    paths: Positional[tuple[str, ...]]
    """Files and folders of text, and last the folder to write."""
    tokenizer: str = ""
    """Folder of the tokenizer: the model's. "bytes" takes UTF-8 bytes as they are."""
    text_field: str = "text"
    """Field of .jsonl and column of .parquet that holds the text."""
    heldout_share: float = 0.02
    """Share of the documents that training never sees."""
    shard_tokens: int = 1 << 27
    """Tokens of a shard, about."""
    processes: int = 1
    """Processes that encode."""


@dataclass(frozen=True)
class Check:
    """Compare shards with the checksums of their index."""

    folders: Positional[tuple[str, ...]]
    """Folders of shards."""


def main(argv: list[str]) -> None:
    """The verb's own verbs."""
    verbs = {"pack": (Pack, pack), "check": (Check, check)}
    if not argv or argv[0] not in verbs:
        if argv and argv[0] in ("-h", "--help"):
            print(__doc__)
            return
        raise UserError(f"data {argv[0] if argv else ''}: {USE}")
    flags, run = verbs[argv[0]]
    run(parse(flags, argv[1:], f"data {argv[0]}"))


def pack(flags: Pack) -> None:
    """Write the shards, and say what is in them."""
    from endside.data import files
    from endside.data.encode import in_processes
    from endside.data.pack import PackConfig, byte_encoder, tokenizer_encoder
    from endside.data.pack import pack as write
    from endside.log import Progress
    from endside.tokenizer import Tokenizer

    if len(flags.paths) < 2 or not flags.tokenizer:
        raise UserError(f"data pack needs text, a folder to write and --tokenizer: {USE}")
    if flags.processes < 1:
        raise UserError(f"--processes is {flags.processes}: give at least 1")
    sources, out = [Path(path) for path in flags.paths[:-1]], Path(flags.paths[-1])
    plain = flags.tokenizer == "bytes"
    encoder = byte_encoder() if plain else tokenizer_encoder(Tokenizer.load(flags.tokenizer))
    found, tally = files.find(sources), files.Tally()
    documents = _shown(files.read(found, flags.text_field, tally), found, tally)
    encode = None
    if flags.processes > 1 and not plain:
        encode = in_processes(Path(flags.tokenizer), flags.processes)
    config = PackConfig(flags.heldout_share, flags.shard_tokens)
    try:
        index = write(documents, out, encoder, config, encode=encode, note=Progress().note)
    finally:
        _report_bad(tally)
    tokens = {
        split: sum(shard.tokens for shard in shards) for split, shards in index.splits.items()
    }
    print(
        f"{tally.documents:,} documents of {len(found):,} files: {tokens['train']:,} tokens to "
        f"train on, {tokens['heldout']:,} held out -> {out}"
    )
    left_out = f"{tally.bad:,} bad, {tally.empty:,} empty left out; {tally.cut:,} long texts cut"
    print(left_out)


def _shown(
    documents: Iterator[Document], found: Sequence[TextFile], tally: Tally
) -> Iterator[Document]:
    """The same documents, with a live line of how far they are."""
    from endside.log import Progress, duration

    progress = Progress()
    total = max(1, sum(file.path.stat().st_size for file in found))
    begun = time.monotonic()
    for document in documents:
        yield document
        if tally.documents % 64 == 0:
            share = min(1.0, tally.bytes / total)
            spent = time.monotonic() - begun
            left = duration(spent / share - spent) if share else "?"
            progress.update(
                f"packing {share:.1%} of {total / 1e6:,.1f} MB  {tally.documents:,} documents  "
                f"{tally.bad:,} bad  {left} left"
            )
    progress.close()


def _report_bad(tally: Tally) -> None:
    for note in tally.notes:
        print(f"left out {note}", file=sys.stderr)
    if tally.bad > len(tally.notes):
        print(f"left out {tally.bad - len(tally.notes):,} more", file=sys.stderr)


def check(flags: Check) -> None:
    """Say which shards are whole; UserError at the first that is not."""
    from endside.data.pack import open_packed

    if not flags.folders:
        raise UserError(f"data check needs a folder: {USE}")
    for folder in flags.folders:
        packed = open_packed(folder)
        packed.verify()
        for split in ("train", "heldout"):
            shards = packed.shards(split)
            print(f"{folder} {split}: {len(shards)} shards, {sum(len(s.tokens) for s in shards):,} "
                  "tokens, whole")  # fmt: skip
