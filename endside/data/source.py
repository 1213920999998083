"""Which tokens a stage reads: the configuration, and the shards it names.

    [data]                                     [[data.mixture]]          one table for each source
    shards = "tokens"    # one source          shards = "tokens/web"
                                               weight = 0.7              # share of the rows

A stage takes one `DataConfig` as its `[data]`. `open_sources` finds the shards, packs them first
where a corpus is named, and refuses those that are damaged or that the model or the tokenizer was
not made for. Shards up to 1 GiB are compared with their checksums each time they are opened; larger
ones by `endside data check`, and a token outside the vocabulary is noticed wherever it is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from endside.data import corpus
from endside.data.bands import Band, Bands, check_bands
from endside.data.loader import Loader, LoaderConfig, Source, Windows
from endside.data.pack import (
    Encoder,
    PackConfig,
    Packed,
    byte_encoder,
    open_packed,
    pack,
    tokenizer_encoder,
)
from endside.dist import World
from endside.errors import UserError
from endside.log import Progress
from endside.tokenizer import Tokenizer

VERIFIED_BYTES = 1 << 30  # read through at a start in about a second


@dataclass(frozen=True)
class MixturePart:
    """One source of several."""

    shards: str  # folder of `pack`
    weight: float  # share of the rows; those of all sources sum to 1

    def __post_init__(self) -> None:
        if not 0 < self.weight <= 1:
            raise UserError(
                f"the weight of {self.shards} is {self.weight}: give a share above 0, up to 1"
            )


@dataclass(frozen=True)
class DataConfig:
    """Which tokens. With `corpus`, missing shards are packed first."""

    shards: str = ""  # folder of `pack`; empty: the sources of `mixture`
    corpus: str = ""  # "python" (its library) or a folder of text; empty: the shards must exist
    tokenizer: str = ""  # folder of the tokenizer; empty: bytes where `corpus` is packed, else any
    pack: PackConfig = field(default_factory=PackConfig)
    mixture: tuple[MixturePart, ...] = ()  # several sources instead of `shards`
    bands: tuple[Band, ...] = ()  # rows by length of document; empty: windows of one length

    def __post_init__(self) -> None:
        if bool(self.shards) == bool(self.mixture):
            raise UserError("data needs either shards or [[data.mixture]] tables: give one of them")
        if self.corpus and self.mixture:
            raise UserError(
                "data.corpus is packed into data.shards, and a mixture has none: pack each source "
                "with `endside data pack`"
            )
        total = sum(part.weight for part in self.mixture)
        if self.mixture and abs(total - 1) > 1e-6:
            given = " + ".join(str(part.weight) for part in self.mixture)
            raise UserError(
                f"the weights of data.mixture sum to {total:.6g} ({given}): make them sum to 1"
            )
        if self.bands:
            check_bands(self.bands)


def open_data(config: DataConfig, vocab_size: int, progress: Progress | None = None) -> Packed:
    """The token shards of a configuration with one source; see `open_sources`."""
    assert config.shards, "a mixture is opened by open_sources"
    folder = Path(config.shards)
    encoder = _encoder(config)
    if config.corpus and not folder.exists():
        if progress is not None:
            progress.note(f"packing {config.corpus} into {folder}")
        python = config.corpus == "python"
        documents = corpus.standard_library() if python else corpus.read(config.corpus)
        pack(documents, folder, encoder or byte_encoder(), config.pack)
    return _open(folder, config, encoder, vocab_size)


def open_sources(
    config: DataConfig, vocab_size: int, progress: Progress | None = None
) -> Packed | list[Source]:
    """What `Loader` and `Bands` read: the shards, or the sources of a mixture.

    vocab_size: of the model that will read them.
    """
    if not config.mixture:
        return open_data(config, vocab_size, progress)
    encoder = _encoder(config)
    sources = [
        Source(_open(Path(part.shards), config, encoder, vocab_size), part.weight)
        for part in config.mixture
    ]
    for number, source in enumerate(sources):
        for other in sources[:number]:
            if source.packed.identity == other.packed.identity:
                raise UserError(
                    f"{other.name} and {source.name} in data.mixture hold the same tokens: name "
                    "them once, with the sum of their weights"
                )
            if source.packed.index.tokenizer != other.packed.index.tokenizer:
                raise UserError(
                    f"{other.name} and {source.name} in data.mixture were packed with different "
                    "tokenizers: pack both with the model's"
                )
    return sources


def make_reader(
    data: Packed | Sequence[Source],
    bands: Sequence[Band],
    config: LoaderConfig,
    world: World | None = None,
) -> Loader | Bands:
    """The batches of a stage: windows of `seq_len`, or rows by `bands` of about as many tokens."""
    if not bands:
        return Loader(data, config, world)
    if bands[-1].length > config.seq_len:
        raise UserError(
            f"data.bands go up to {bands[-1].length} tokens and seq_len is {config.seq_len}: "
            "lengthen seq_len or leave those bands out"
        )
    tokens = config.batch * config.seq_len * (world or World()).size
    return Bands(data, bands, tokens=tokens, seed=config.seed, world=world)


def heldout_windows(data: Packed | Sequence[Source], seq_len: int) -> Windows:
    """The windows of the held-out text, of all sources together."""
    packed = data if isinstance(data, Packed) else [source.packed for source in data]
    return Windows(packed, "heldout", seq_len)


def _encoder(config: DataConfig) -> Encoder | None:
    return tokenizer_encoder(Tokenizer.load(config.tokenizer)) if config.tokenizer else None


def _open(folder: Path, config: DataConfig, encoder: Encoder | None, vocab_size: int) -> Packed:
    packed = open_packed(folder)
    if encoder is not None and packed.index.tokenizer != encoder.fingerprint:
        raise UserError(
            f"the shards in {folder} were packed with another tokenizer than "
            f"{config.tokenizer}: give that one, or another folder for the shards"
        )
    if packed.index.vocab_size > vocab_size:
        raise UserError(
            f"the shards in {folder} use a vocabulary of {packed.index.vocab_size}, the model has "
            f"{vocab_size}: raise model.vocab_size or pack with the model's tokenizer"
        )
    packed.verify(VERIFIED_BYTES)
    return packed
