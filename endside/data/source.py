"""Which tokens a stage reads: the configuration, and the shards it names.

A stage takes one `DataConfig` as its `[data]`. `open_data` finds the shards, packs them first where
a corpus is named, and refuses those that the model or the tokenizer was not made for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from endside.data import corpus
from endside.data.pack import (
    Encoder,
    PackConfig,
    Packed,
    byte_encoder,
    open_packed,
    pack,
    tokenizer_encoder,
)
from endside.errors import UserError
from endside.log import Progress
from endside.tokenizer import Tokenizer


@dataclass(frozen=True)
class DataConfig:
    """Which tokens. With `corpus`, missing shards are packed first."""

    shards: str  # folder of `pack`
    corpus: str = ""  # "python" (its library) or a folder of text; empty: the shards must exist
    tokenizer: str = ""  # folder of the tokenizer; empty: bytes where `corpus` is packed, else any
    pack: PackConfig = field(default_factory=PackConfig)


def open_data(config: DataConfig, vocab_size: int, progress: Progress | None = None) -> Packed:
    """The token shards, packed first where `config.corpus` says from what.

    vocab_size: of the model that will read them.
    """
    folder = Path(config.shards)
    encoder = None
    if config.tokenizer:
        encoder = tokenizer_encoder(Tokenizer.load(config.tokenizer))
    if config.corpus and not folder.exists():
        if progress is not None:
            progress.note(f"packing {config.corpus} into {folder}")
        python = config.corpus == "python"
        documents = corpus.standard_library() if python else corpus.read(config.corpus)
        pack(documents, folder, encoder or byte_encoder(), config.pack)
    packed = open_packed(folder)
    _check(packed, config, encoder, vocab_size)
    return packed


def _check(packed: Packed, config: DataConfig, encoder: Encoder | None, vocab_size: int) -> None:
    if encoder is not None and packed.index.tokenizer != encoder.fingerprint:
        raise UserError(
            f"the shards in {packed.folder} were packed with another tokenizer than "
            f"{config.tokenizer}: give that one, or another folder for the shards"
        )
    if packed.index.vocab_size > vocab_size:
        raise UserError(
            f"the shards in {packed.folder} use a vocabulary of {packed.index.vocab_size}, the "
            f"model has {vocab_size}: raise model.vocab_size or pack with the model's tokenizer"
        )
