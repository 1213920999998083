"""The page pool: whatever is done to a sequence, it equals a fresh one with the same tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from endside.model.cache import PAGE, Cache, CacheFull
from endside.model.presets import preset
from endside.ops.infllm.reference import compress

CONFIG = preset("tiny-sparse")
LAYERS, GROUPS, WIDTH = CONFIG.num_hidden_layers, CONFIG.num_key_value_heads, CONFIG.head_dim
TOKENS = 24 * PAGE


def _rows(ids: list[int], layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values that depend on the token's id alone: (T, G, D) each."""
    base = torch.tensor(ids, dtype=torch.float32)[:, None, None] + 0.1 * layer
    steps = torch.arange(GROUPS * WIDTH, dtype=torch.float32).view(GROUPS, WIDTH)
    return torch.sin(base * 0.7 + steps), torch.cos(base * 0.3 + steps)


def _append(cache: Cache, seq: int, ids: list[int]) -> None:
    for layer in range(LAYERS):
        cache.append(layer, seq, *_rows(ids, layer))
    cache.advance(seq, len(ids))


def _check(cache: Cache, seq: int, ids: list[int]) -> None:
    """Everything readable of `seq` equals what its ids alone say, bit for bit."""
    assert cache.length(seq) == len(ids)
    for layer in range(LAYERS):
        keys, values = _rows(ids, layer)
        held = cache.view(layer, seq, 0)
        assert torch.equal(held[0], keys), f"keys of layer {layer}"
        assert torch.equal(held[1], values), f"values of layer {layer}"
        fine, coarse = cache.summaries(layer, seq, 0)
        assert torch.equal(fine, compress(keys[None], 32, 16)[0]), f"fine of layer {layer}"
        assert torch.equal(coarse, compress(keys[None], 128, 64)[0]), f"coarse of layer {layer}"


def _cache() -> Cache:
    return Cache(CONFIG, tokens=TOKENS, dtype=torch.float32, device="cpu")


OPERATION = st.one_of(
    st.tuples(st.just("append"), st.integers(0, 3), st.integers(1, 150)),
    st.tuples(st.just("trim"), st.integers(0, 3), st.floats(0, 1)),
    st.tuples(st.just("tree"), st.integers(0, 3), st.integers(1, 40)),
    st.tuples(st.just("fork"), st.integers(0, 3), st.integers(0, 100)),
    st.tuples(st.just("close"), st.integers(0, 3), st.just(0)),
    st.tuples(st.just("open"), st.just(0), st.integers(1, 400)),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(OPERATION, min_size=1, max_size=25), st.randoms(use_true_random=False))
def test_any_sequence_of_operations(operations: list, random: object) -> None:
    """Appends, trims, accepted trees, forks, closes: keys and summaries stay those of the ids."""
    cache, known, token = _cache(), {}, 0
    for what, which, amount in operations:
        try:
            if what == "open":
                known[cache.open(amount)] = []
                continue
            if not known:
                continue
            seq = sorted(known)[which % len(known)]
            ids = known[seq]
            if what == "append":
                fresh = list(range(token, token + amount))
                _append(cache, seq, fresh)
                ids += fresh
                token += amount
            elif what == "trim":
                known[seq] = ids[: int(amount * len(ids))]
                cache.trim(seq, len(known[seq]))
            elif what == "tree":
                fresh = list(range(token, token + amount))
                branch = cache.fork(seq, len(ids) + amount)
                try:
                    _append(cache, branch, fresh)
                    kept = random.randint(0, amount)
                    cache.extend(seq, branch, kept)
                    known[seq] = ids + fresh[:kept]
                finally:
                    cache.close(branch)
                token += amount
            elif what == "fork":
                known[cache.fork(seq, len(ids) + amount)] = list(ids)
            elif what == "close":
                cache.close(seq)
                del known[seq]
        except CacheFull:
            continue
        for each, ids in known.items():
            _check(cache, each, ids)
    for seq in list(known):
        cache.close(seq)
    assert cache.room() == cache.capacity, "pages leaked"


def test_a_fork_does_not_see_its_source_change() -> None:
    """Trimming into a shared page and writing there leaves the other sequence alone."""
    cache = _cache()
    first = cache.open(300)
    _append(cache, first, list(range(200)))
    second = cache.fork(first, 300)
    cache.trim(first, 30)
    _append(cache, first, list(range(900, 980)))
    _check(cache, second, list(range(200)))
    _check(cache, first, [*range(30), *range(900, 980)])


def test_consecutive_pages_are_viewed_without_a_copy() -> None:
    """A sequence that was given a run of pages is read through a slice of the pool."""
    cache = _cache()
    seq = cache.open(200)
    _append(cache, seq, list(range(200)))
    pool = cache._keys.untyped_storage().data_ptr()
    assert cache.view(1, seq, 0)[0].untyped_storage().data_ptr() == pool


def test_a_full_pool_says_so_and_keeps_what_it_has() -> None:
    """Neither `open` nor `append` beyond the room changes anything."""
    cache = _cache()
    seq = cache.open(TOKENS - PAGE)
    with pytest.raises(CacheFull, match="2 pages"):
        cache.open(PAGE + 1)
    _append(cache, seq, list(range(100)))
    with pytest.raises(CacheFull, match="room"):
        cache.append(0, seq, *_rows(list(range(TOKENS)), 0))
    _check(cache, seq, list(range(100)))
