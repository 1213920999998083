"""Batches come in a seeded order that any saved cursor continues, and never from held-out text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from endside.data.document import Document
from endside.data.loader import Loader, LoaderConfig, TokenBatch, Windows
from endside.data.pack import Encoder, PackConfig, Packed, open_packed, pack
from endside.dist import World
from endside.errors import UserError

HELD_OUT = 1 << 20  # a bit of every token of a held-out document


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    """Every token is unique and says where it is from; three training shards."""
    folder = tmp_path_factory.mktemp("loader")
    documents = [Document(f"d{i}", f"{i} {3 + 5 * (i % 4)}", "test") for i in range(120)]
    probe = Encoder(lambda text: [0] * int(text.split()[1]), 1, eos=0, fingerprint="probe")
    pack(documents, folder / "probe", probe, PackConfig(0.2))
    held = open_packed(folder / "probe").index.splits["heldout"][0].documents
    assert held > 10

    counter = iter(range(1, HELD_OUT))

    def encode(text: str) -> list[int]:
        return [next(counter) for _ in range(int(text.split()[1]))]

    pack(documents, folder / "p", Encoder(encode, HELD_OUT, 0, "unique"), PackConfig(0.2, 400))
    result = open_packed(folder / "p")
    assert len(result.tokens("train")) > 2
    return result


def ids(batch: TokenBatch) -> set[int]:
    return set(batch.tokens.flatten().tolist()) - {0}


def epoch_batches(packed: Packed, config: LoaderConfig) -> int:
    return len(Windows(packed, "train", config.seq_len)) // config.batch + 1


def test_windows_hold_the_shard_and_its_documents(packed: Packed) -> None:
    windows = Windows(packed, "train", 16)
    tokens, starts = packed.tokens("train")[0], packed.starts("train")[0]
    got, documents = windows.read(3)
    assert got.tolist() == tokens[48:65].tolist()
    owner = np.searchsorted(starts, np.arange(48, 65), side="right")
    assert documents.tolist() == (owner - owner[0]).tolist()
    assert documents[0] == 0
    assert documents[-1] > 0
    ends = (got[:-1] == 0).nonzero()[0]
    assert np.diff(documents).nonzero()[0].tolist() == ends.tolist(), "a document ends with eos"


def test_an_epoch_holds_every_target_once(packed: Packed) -> None:
    windows = Windows(packed, "train", 16)
    loader = Loader(packed, LoaderConfig(batch=1, seq_len=16, seed=1))
    seen = [next(loader).tokens[0, 1:].tolist() for _ in range(len(windows))]
    flat = [token for row in seen for token in row if token]
    assert len(flat) == len(set(flat))
    dropped = sum((len(shard) - 1) % 16 + 1 for shard in packed.tokens("train"))
    assert sum(map(len, seen)) == sum(map(len, packed.tokens("train"))) - dropped
    assert loader.epochs == 1.0
    second = [next(loader).tokens[0, 1:].tolist() for _ in range(len(windows))]
    assert second != seen
    assert sorted(second) == sorted(seen)


def test_training_never_sees_a_held_out_token(packed: Packed) -> None:
    held = {int(token) for shard in packed.tokens("heldout") for token in shard} - {0}
    config = LoaderConfig(batch=4, seq_len=8, seed=2)
    loader = Loader(packed, config)
    seen = set().union(*(ids(next(loader)) for _ in range(2 * epoch_batches(packed, config))))
    assert len(held) > 50
    assert len(seen) > 500
    assert not seen & held


@settings(max_examples=40, deadline=None)
@given(
    before=st.integers(0, 80), batch=st.integers(1, 7), seq_len=st.integers(1, 40),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_a_restored_loader_continues_the_stream(
    packed: Packed, before: int, batch: int, seq_len: int, seed: int
) -> None:
    config = LoaderConfig(batch, seq_len, seed)
    straight, resumed = Loader(packed, config), Loader(packed, config)
    for _ in range(before):
        next(straight)
    resumed.restore(straight.state())
    for _ in range(12):
        one, other = next(straight), next(resumed)
        assert torch.equal(one.tokens, other.tokens)
        assert torch.equal(one.documents, other.documents)
    assert straight.state() == resumed.state()


@pytest.mark.parametrize("size", [2, 3])
def test_processes_share_the_stream_of_one(packed: Packed, size: int) -> None:
    one = Loader(packed, LoaderConfig(batch=6, seq_len=12, seed=9))
    parts = [
        Loader(packed, LoaderConfig(6 // size, 12, 9), World(rank, size)) for rank in range(size)
    ]
    for _ in range(40):
        rows = torch.cat([next(part).tokens for part in parts])
        assert torch.equal(rows, next(one).tokens)
    assert {str(part.state()) for part in parts} == {str(one.state())}


def test_the_seed_orders_and_the_same_seed_repeats(packed: Packed) -> None:
    def first(seed: int) -> list[int]:
        return next(Loader(packed, LoaderConfig(8, 12, seed))).tokens.flatten().tolist()

    assert first(1) == first(1)
    assert first(1) != first(2)


def test_a_cursor_of_other_data_is_refused(packed: Packed, tmp_path: Path) -> None:
    loader = Loader(packed, LoaderConfig(2, 12, 0))
    for other, part in [
        (LoaderConfig(2, 13, 0), "seq_len 13"),
        (LoaderConfig(2, 12, 1), "seed 1"),
    ]:
        state = Loader(packed, other).state()
        assert not loader.fits(state)
        with pytest.raises(UserError, match=part):
            loader.restore(state)
    with pytest.raises(UserError, match="data abc"):
        loader.restore({**loader.state(), "data": "abc"})
    assert loader.fits(Loader(packed, LoaderConfig(5, 12, 0)).state())


def test_a_split_shorter_than_a_window_is_the_users_error(packed: Packed) -> None:
    with pytest.raises(UserError, match=r"heldout split of .* is shorter than seq_len 9999"):
        Windows(packed, "heldout", 9999)
    with pytest.raises(UserError, match="batch 0"):
        LoaderConfig(batch=0)
