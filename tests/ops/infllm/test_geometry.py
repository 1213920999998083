"""Index arithmetic against the worked example of infllmv2 §18 A, and counts against real masks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from endside.ops.infllm import attend_stats, geometry, reference
from endside.ops.infllm.config import SparseConfig

RELEASED = SparseConfig()

# position, visible fine, visible coarse
EXAMPLE_A = [
    (15, 0, 0), (30, 0, 0), (31, 1, 0), (46, 1, 0), (47, 2, 0), (63, 3, 0), (78, 3, 0),
    (79, 4, 0), (126, 6, 0), (127, 7, 1), (130, 7, 1), (191, 11, 2), (199, 11, 2), (206, 11, 2),
]  # fmt: skip


def test_visible_summaries_of_example_a() -> None:
    """The table of §18 A, as ints and as a tensor; at 206 a released kernel shows one fewer."""
    for position, fine, coarse in EXAMPLE_A:
        assert geometry.visible_fine(position, RELEASED) == fine, f"fine at {position}"
        assert geometry.visible_coarse(position, RELEASED) == coarse, f"coarse at {position}"
    positions, fine, coarse = torch.tensor(EXAMPLE_A).unbind(1)
    assert torch.equal(geometry.visible_fine(positions, RELEASED), fine)
    assert torch.equal(geometry.visible_coarse(positions, RELEASED), coarse)


@pytest.mark.parametrize(
    ("length", "fine", "coarse"),
    [(200, 11, 2), (207, 11, 2), (208, 12, 2), (255, 14, 2), (256, 15, 3)],
)
def test_stored_summaries_of_example_a(length: int, fine: int, coarse: int) -> None:
    """N1 and N2 of §18 A, which are what the last position sees."""
    assert (RELEASED.fine_count(length), RELEASED.coarse_count(length)) == (fine, coarse)
    assert geometry.visible_fine(length - 1, RELEASED) == fine
    assert geometry.visible_coarse(length - 1, RELEASED) == coarse
    keys = torch.zeros(1, length, 1, 2)
    k1, k2 = reference.summarise(keys, RELEASED)
    assert (k1.shape[1], k2.shape[1]) == (fine, coarse)


def test_pool_ranges_of_example_a() -> None:
    """B0 {0..3}, B1 {3..7}, B2 {7..10}, B3 {} for 11 fine summaries."""
    assert geometry.block_count(200, RELEASED) == 4
    ranges = [range(*geometry.pool_range(block, 11, RELEASED)) for block in range(4)]
    assert [list(r) for r in ranges] == [[0, 1, 2, 3], [3, 4, 5, 6, 7], [7, 8, 9, 10], []]


def test_released_counts() -> None:
    """34 forced and 62 chosen blocks (4.1), 33 and 63 (4.0): 96 in both."""
    four = replace(RELEASED, selection="4.0")
    assert (geometry.local_blocks(RELEASED), geometry.free_blocks(RELEASED)) == (33, 62)
    assert (geometry.local_blocks(four), geometry.free_blocks(four)) == (32, 63)
    assert RELEASED.total_blocks == four.total_blocks == 96
    assert geometry.first_local(100, RELEASED) == 68
    assert geometry.first_local(100, four) == 69
    assert geometry.first_local(5, RELEASED) == 0


@pytest.mark.parametrize("dense_len", [-1, 256, 600])
@pytest.mark.parametrize("compat", [None, "hf"])
def test_stats_count_the_mask(tiny: SparseConfig, dense_len: int, compat: str | None) -> None:
    """Mean visible tokens equal the true entries of the reference's mask."""
    sparse = replace(tiny, dense_len=dense_len, compat=compat)
    for new, length in ((1, 599), (130, 641), (641, 641)):
        generator = torch.Generator().manual_seed(length)
        q = torch.randn(1, new, 2, 8, generator=generator)
        k = torch.randn(1, length, 2, 8, generator=generator)
        blocks = reference.chosen_blocks(q, k, sparse=sparse)
        positions = torch.arange(length - new, length)
        seen = reference.visible(blocks, positions=positions, length=length, sparse=sparse)
        stats = attend_stats(new, length, sparse)
        assert seen.sum() == 2 * round(stats.visible * new)
        assert stats.available == (positions + 1).double().mean()
