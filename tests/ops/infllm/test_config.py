"""Sizes that contradict each other are refused before any work, with the fact and the fix."""

from __future__ import annotations

import pytest

from endside.errors import UserError
from endside.ops.infllm.config import SparseConfig


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"window_size": 100}, "not a multiple of block_size 64: use 64"),
        ({"topk": 1}, "raise topk to at least 2"),
        ({"topk": 3, "init_blocks": 3}, "raise topk to at least 4"),
        ({"kernel_size": 48}, "twice kernel_stride"),
        ({"block_size": 32, "window_size": 128}, "four times kernel_stride"),
        ({"use_nope": True}, "use_nope"),
        ({"dense_len": -2}, "dense_len"),
        ({"selection": "4.2"}, "use '4.1' or '4.0'"),
        ({"lse": "fine"}, "use 'coarse' or 'exact'"),
        ({"compat": "vllm"}, "use 'hf'"),
        ({"init_blocks": 0}, "init_blocks"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_contradictions_are_refused(values: dict, said: str) -> None:
    """Each message names the field and what to write instead."""
    with pytest.raises(UserError, match=said):
        SparseConfig(**values)


def test_released_sizes() -> None:
    """96 blocks, 6144 tokens; complete windows only (infllmv2 §0, §2, §18 A)."""
    released = SparseConfig()
    assert (released.total_blocks, released.budget) == (96, 6144)
    assert (released.fine_count(200), released.coarse_count(200)) == (11, 2)
    assert (released.fine_count(31), released.coarse_count(127)) == (0, 0)


@pytest.mark.parametrize(
    ("dense_len", "compat", "length", "first"),
    [
        (8192, None, 9000, 8191),
        (8192, None, 100, 8191),
        (-1, None, 100, 0),
        (8192, "hf", 8191, 8191),
        (8192, "hf", 8192, 0),
    ],
)
def test_the_switch_is_per_query_unless_asked(
    dense_len: int, compat: str | None, length: int, first: int
) -> None:
    """Position p is sparse iff p + 1 >= dense_len; compat="hf" decides for the whole forward."""
    assert SparseConfig(dense_len=dense_len, compat=compat).first_sparse(length) == first
