"""Rows by length of document: nothing is cut that fits, shares hold, any world continues."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from endside.data.bands import Band, Bands
from endside.data.document import Document
from endside.data.loader import PADDING, LoaderConfig, Source
from endside.data.pack import Encoder, PackConfig, Packed, open_packed, pack
from endside.data.source import make_reader
from endside.dist import World
from endside.errors import UserError

BANDS = (Band(16, 0.25), Band(32, 0.25), Band(64, 0.5))
EOS = 1 << 20
# Ids with eos, from two to far more than the longest band holds.
LENGTHS = [*range(2, 80), 17, 17, 33, 33, 65, 66, 129, 130, 200, 300]


def write(folder: Path, lengths: list[int], first: int = 0) -> Packed:
    """Documents whose ids are all different, in shards of about 500 tokens."""
    counter = iter(range(first, EOS))
    encode = lambda text: [next(counter) for _ in range(int(text) - 1)]
    documents = [Document(f"d{i}", str(length), "test") for i, length in enumerate(lengths)]
    pack(documents, folder, Encoder(encode, EOS + 1, EOS, "unique"), PackConfig(0.0, 500))
    return open_packed(folder)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    return write(tmp_path_factory.mktemp("bands") / "p", LENGTHS)


def reader(packed: Packed | list[Source], world: World | None = None, seed: int = 3) -> Bands:
    return Bands(packed, BANDS, tokens=128, seed=seed, world=world)


def documents(batch: object) -> list[list[int]]:
    """The ids of every document of every row, without padding."""
    found = []
    for tokens, owner in zip(batch.tokens, batch.documents, strict=True):
        for number in owner.unique().tolist():
            if number != PADDING:
                found.append(tokens[owner == number].tolist())
    return found


def epoch(packed: Packed) -> list[list[int]]:
    """Every document that is read until each band was read through at least once."""
    bands, found = reader(packed), []
    while min(bands.state()["epochs"].values()) < 1:
        found += documents(next(bands))
    return found


def test_a_document_is_cut_only_where_no_band_holds_it(packed: Packed) -> None:
    longest = BANDS[-1].length
    whole = Counter()
    for ids, starts in zip(packed.tokens("train"), packed.starts("train"), strict=True):
        bounds = [*starts.tolist(), len(ids)]
        for start, stop in pairwise(bounds):
            text = tuple(ids[start:stop].tolist())
            if len(text) <= longest + 1:
                whole[text] += 1
            else:
                for at in range(0, len(text) - 1, longest):
                    whole[text[at : at + longest + 1]] += 1
    assert any(len(text) == longest + 1 and text[-1] != EOS for text in whole), "some are cut"
    assert {tuple(text) for text in epoch(packed)} == set(whole)


def test_every_pair_of_neighbours_is_a_target(packed: Packed) -> None:
    """Cut documents overlap by one token, so no prediction is lost at a cut."""
    pairs = {pair for text in epoch(packed) for pair in pairwise(text)}
    assert len(pairs) == sum(len(ids) for ids in packed.tokens("train")) - len(LENGTHS)


def test_rows_of_a_batch_are_of_one_band_and_cost_the_same(packed: Packed) -> None:
    bands, spent = reader(packed), Counter()
    for _ in range(200):
        batch = next(bands)
        rows, width = batch.tokens.shape
        length = 128 // rows
        assert width <= length + 1
        assert (batch.documents[:, 0] == 0).all()
        assert ((batch.documents != PADDING).sum(1) == width).any(), "cut to the longest row"
        spent[length] += rows * length
        for text in documents(batch):
            assert len(text) <= length + 1
        shorter = {16: 0, 32: 17, 64: 33}[length]
        assert max(map(len, documents(batch))) > shorter
    assert {length: count / sum(spent.values()) for length, count in spent.items()} == {
        16: 0.25, 32: 0.25, 64: 0.5,
    }  # fmt: skip
    assert all(0 <= share < 0.4 for share in bands.padding)


@pytest.mark.parametrize("size", [2])
def test_processes_share_the_stream_and_continue_each_other(packed: Packed, size: int) -> None:
    one = reader(packed)
    for _ in range(7):
        next(one)
    parts = [reader(packed, World(rank, size)) for rank in range(size)]
    for part in parts:
        part.restore(one.state())
    for _ in range(30):
        whole = documents(next(one))
        assert [text for part in parts for text in documents(next(part))] == whole
    assert {str(part.state()) for part in parts} == {str(one.state())}
    resumed = reader(packed)
    resumed.restore(parts[0].state())
    assert torch.equal(next(resumed).tokens, next(one).tokens)


def test_seeds_order_and_other_cursors_are_refused(packed: Packed) -> None:
    first = [documents(next(reader(packed, seed=seed))) for seed in (3, 3, 4)]
    assert first[0] == first[1] != first[2]
    other = Bands(packed, BANDS[:1] + (Band(64, 0.75),), tokens=128, seed=3)
    assert not other.fits(reader(packed).state())
    with pytest.raises(UserError, match=r"read data with bands 16:0\.25,32:0\.25,64:0\.5"):
        other.restore(reader(packed).state())


def test_sources_mix_within_a_band(packed: Packed, tmp_path: Path) -> None:
    short = write(tmp_path / "short", [10] * 40, first=EOS // 2)
    bands = reader([Source(packed, 0.5), Source(short, 0.5)])
    rows = Counter()
    for _ in range(120):
        batch = next(bands)
        mine = (batch.tokens[:, 0] >= EOS // 2).sum().item()
        rows[128 // len(batch.tokens)] += mine
    # The second source has no long documents, and half of the rows of short ones.
    assert rows[32] == rows[64] == 0
    assert rows[16] == 30 * 8 / 2


def test_what_cannot_be_read_is_the_users_error(packed: Packed, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="do not divide among 3 processes"):
        reader(packed, World(0, 3))
    with pytest.raises(UserError, match="no document of the training split has 33 to 64 tokens"):
        reader(write(tmp_path / "short", [5, 9, 30]))
    with pytest.raises(UserError, match="bands go up to 64 tokens and seq_len is 32"):
        make_reader(packed, BANDS, LoaderConfig(4, 32))
    made = make_reader(packed, BANDS, LoaderConfig(2, 64, 3))
    assert torch.equal(next(made).tokens, next(reader(packed)).tokens)
