"""Chunks of the cache: counted, shared, copied before they would change under another sequence."""

from __future__ import annotations

import numpy as np
import pytest

from endside.engine.executor import Full
from endside.engine.executors.native_sequences import Sequences


@pytest.fixture
def pool() -> tuple[Sequences, list[tuple[int, int]]]:
    copies: list[tuple[int, int]] = []
    return Sequences(6, copy=lambda source, target: copies.append((source, target))), copies


def test_chunks_are_taken_whole_and_given_back(pool) -> None:
    sequences, _ = pool
    first, second = sequences.open(1), sequences.open(1025)
    assert sequences.room() == 3 * 1024
    assert set(sequences[first].chunks).isdisjoint(sequences[second].chunks)
    with pytest.raises(Full, match="4 chunks"):
        sequences.open(3 * 1024 + 1)
    sequences.close(second)
    assert sequences.room() == 5 * 1024


@pytest.mark.parametrize(("stored", "shared", "copied"), [(1023, 0, 1), (1024, 1, 0), (2000, 1, 1)])
def test_a_fork_shares_full_chunks(pool, stored: int, shared: int, copied: int) -> None:
    sequences, copies = pool
    first = sequences.open(2048)
    sequences[first].stored = stored
    second = sequences.fork(first, 2048)
    common = sequences[first].chunks == sequences[second].chunks
    assert common.sum() == shared and common[:shared].all()
    assert len(copies) == copied
    if copied:
        assert copies[0] == (sequences[first].chunks[shared], sequences[second].chunks[shared])
    sequences.close(first)
    sequences.close(second)
    assert sequences.room() == 6 * 1024


def test_a_shared_chunk_is_copied_before_it_changes(pool) -> None:
    """After a trim into it, and only then; the other sequence keeps its own."""
    sequences, copies = pool
    first = sequences.open(2048)
    sequences[first].stored = 1500
    second = sequences.fork(first, 2048)
    copies.clear()
    before = sequences[first].chunks.copy()
    sequences.own({first: 10, second: 10})
    assert not copies
    sequences[second].stored = 1000
    sequences.own({second: 30})
    assert copies == [(before[0], sequences[second].chunks[0])]
    np.testing.assert_array_equal(sequences[first].chunks, before)
    sequences[first].stored = 1000
    sequences.own({first: 30})
    assert len(copies) == 1, "nobody shares it any more"


def test_no_room_for_a_copy_changes_nothing(pool) -> None:
    sequences, copies = pool
    first = sequences.open(2048)
    sequences[first].stored = 2048
    second = sequences.fork(first, 2048)
    sequences.open(4 * 1024)
    sequences[second].stored = 5
    before = sequences[second].chunks.copy()
    with pytest.raises(Full):
        sequences.own({second: 1})
    np.testing.assert_array_equal(sequences[second].chunks, before)
    assert not copies


def test_more_tokens_than_reserved_are_refused(pool) -> None:
    sequences, _ = pool
    seq = sequences.open(100)
    sequences.own({seq: 100})
    with pytest.raises(AssertionError, match="room for 100"):
        sequences.own({seq: 101})
