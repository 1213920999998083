"""Sources in a mixture keep their shares and orders, and any world continues a cursor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from endside import config as configuration
from endside.data.document import Document
from endside.data.loader import Loader, LoaderConfig, Source
from endside.data.order import Order, Shares
from endside.data.pack import PackConfig, Packed, byte_encoder, open_packed, pack
from endside.data.source import DataConfig, MixturePart, open_sources
from endside.dist import World
from endside.errors import UserError


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Packed]:
    """Sources of the letters a, b and c; the last is small."""
    folder = tmp_path_factory.mktemp("mixture")
    for letter, count in (("a", 60), ("b", 60), ("c", 5)):
        documents = [Document(f"{letter}{i}", letter * (20 + i), "test") for i in range(count)]
        pack(documents, folder / letter, byte_encoder(), PackConfig(0.1))
    return [open_packed(folder / letter) for letter in "abc"]


def sources(three: list[Packed], *weights: float) -> list[Source]:
    return [Source(packed, weight) for packed, weight in zip(three, weights, strict=False)]


def letters(batch: object) -> str:
    """Which source each row is from."""
    return "".join(chr(int(row[row != 256][0])) for row in batch.tokens)


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.integers(1, 100), min_size=2, max_size=6),
    sizes=st.integers(1, 9),
    steps=st.integers(1, 400),
)
def test_shares_stay_beside_their_weights(weights: list[int], sizes: int, steps: int) -> None:
    sizes_of = [1 + (sizes * i) % 7 for i in range(len(weights))]
    shares = Shares([weight / sum(weights) for weight in weights], sizes_of)
    for _ in range(steps):
        shares.next()
        given_ = [count * size for count, size in zip(shares.chosen, sizes_of, strict=True)]
        for had, weight in zip(given_, weights, strict=True):
            off = had - sum(given_) * weight / sum(weights)
            assert abs(off) <= len(weights) * max(sizes_of), "a source drifts from its share"
    assert sum(shares.chosen) == steps


def test_every_source_is_read_in_its_share_and_reports_its_epochs(three: list[Packed]) -> None:
    loader = Loader(sources(three, 0.5, 0.3, 0.2), LoaderConfig(10, 12, 4))
    rows = "".join(letters(next(loader)) for _ in range(20))
    assert {letter: rows.count(letter) for letter in "abc"} == {"a": 100, "b": 60, "c": 40}
    assert rows[:10] != "a" * 5 + "b" * 3 + "c" * 2, "sources interleave"
    epochs = loader.state()["epochs"]
    assert [Path(name).name for name in epochs] == ["a", "b", "c"]
    windows = sum((len(shard) - 1) // 12 for shard in three[2].tokens("train"))
    assert epochs[three[2].folder.as_posix()] == pytest.approx(40 / windows, abs=1e-5)
    assert loader.epochs == max(epochs.values()) > 1


def test_an_order_visits_everything_once_per_epoch() -> None:
    order = Order(30, [7])
    first, second = ([order.at(place) for place in range(at, at + 30)] for at in (0, 30))
    assert sorted(first) == sorted(second) == list(range(30))
    assert first != second
    assert Order(30, [7]).at(17) == first[17]
    assert [Order(30, [8]).at(place) for place in range(30)] != first


def test_the_place_in_the_list_changes_no_order(three: list[Packed]) -> None:
    def rows_of_b(*order: int) -> list[list[int]]:
        parts = [Source(three[i], 0.5) for i in order]
        loader = Loader(parts, LoaderConfig(4, 12, 1))
        rows = torch.cat([next(loader).tokens for _ in range(6)])
        return [row.tolist() for row in rows if 98 in row.tolist()]

    assert rows_of_b(0, 1) == rows_of_b(1, 0) == rows_of_b(2, 1)


@settings(max_examples=15, deadline=None)
@given(before=st.integers(0, 30), seed=st.integers(0, 99))
def test_a_mixture_resumes_at_another_world_size(
    three: list[Packed], before: int, seed: int
) -> None:
    parts = sources(three, 0.6, 0.3, 0.1)
    one = Loader(parts, LoaderConfig(6, 12, seed))
    pair = [Loader(parts, LoaderConfig(3, 12, seed), World(rank, 2)) for rank in range(2)]
    for _ in range(before):
        next(one)
    for loader in pair:
        loader.restore(one.state())
    for _ in range(5):
        both = torch.cat([next(loader).tokens for loader in pair])
        assert torch.equal(both, next(one).tokens)
    resumed = Loader(parts, LoaderConfig(6, 12, seed))
    resumed.restore(pair[1].state())
    assert torch.equal(next(resumed).tokens, next(one).tokens)


def test_a_cursor_of_another_mixture_is_refused(three: list[Packed]) -> None:
    config = LoaderConfig(2, 12, 0)
    two, all_ = sources(three, 0.5, 0.5), sources(three, 0.5, 0.3, 0.2)
    state = Loader(two, config).state()
    assert Loader(two[::-1], config).fits(state)
    assert not Loader(all_, config).fits(state)
    assert not Loader(three[0], config).fits(state)
    with pytest.raises(UserError, match="this run has"):
        Loader(all_, config).restore(state)


def test_the_mixture_is_an_array_of_tables(three: list[Packed], tmp_path: Path) -> None:
    text = "".join(
        f'[[mixture]]\nshards = "{packed.folder}"\nweight = {weight}\n'
        for packed, weight in zip(three, (0.7, 0.3), strict=False)
    )
    (tmp_path / "data.toml").write_text(text)
    config = configuration.load(tmp_path / "data.toml", DataConfig)
    assert config.mixture == tuple(
        MixturePart(str(packed.folder), weight)
        for packed, weight in zip(three, (0.7, 0.3), strict=False)
    )
    (tmp_path / "again.toml").write_text(configuration.dump(config))
    assert configuration.load(tmp_path / "again.toml", DataConfig) == config
    assert [source.weight for source in open_sources(config, 257)] == [0.7, 0.3]


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ("[[mixture]]\nshards='a'\nweigth=1.0", r"unknown key mixture\[0\]\.weigth .*weight"),
        ("[[mixture]]\nshards='a'\nweight=0.6", r"sum to 0\.6 \(0\.6\): make them sum to 1"),
        ("[[mixture]]\nshards='a'\nweight=-1.0", r"weight of a is -1\.0"),
        ("shards='x'\n[[mixture]]\nshards='a'\nweight=1.0", "either shards or"),
        ("corpus='x'", "either shards or"),
        ("corpus='x'\n[[mixture]]\nshards='a'\nweight=1.0", "a mixture has none"),
        ("shards='x'\n[[bands]]\nlength=8\nshare=0.5", "shares of data.bands sum to 0.5"),
        ("shards='x'\n[[bands]]\nlength=8\nshare=2.0", "length 8 and share 2.0"),
        (
            "shards='x'\n[[bands]]\nlength=8\nshare=0.5\n[[bands]]\nlength=4\nshare=0.5",
            "make them ascend",
        ),
    ],
)
def test_what_is_wrong_in_it_is_named(tables: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "data.toml").write_text(tables)
    with pytest.raises(UserError, match=message):
        configuration.load(tmp_path / "data.toml", DataConfig)


def test_sources_must_differ_and_share_a_tokenizer(three: list[Packed], tmp_path: Path) -> None:
    a = str(three[0].folder)
    twice = DataConfig(mixture=(MixturePart(a, 0.5), MixturePart(a, 0.5)))
    with pytest.raises(UserError, match="hold the same tokens"):
        open_sources(twice, 257)
    from dataclasses import replace

    other = replace(byte_encoder(), fingerprint="another")
    pack([Document("d", "text " * 99, "test")], tmp_path / "o", other)
    mixed = DataConfig(mixture=(MixturePart(a, 0.5), MixturePart(str(tmp_path / "o"), 0.5)))
    with pytest.raises(UserError, match="packed with different tokenizers"):
        open_sources(mixed, 257)
