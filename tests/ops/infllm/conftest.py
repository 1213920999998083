"""A configuration small enough that sparsity acts within a thousand tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from endside.ops.infllm import attend_stats
from endside.ops.infllm.config import SparseConfig


@pytest.fixture(params=["4.1-coarse", "4.1-exact", "4.0-coarse", "4.0-exact"])
def tiny(request: pytest.FixtureRequest) -> SparseConfig:
    """Budget 6 blocks = 384 tokens, dense before position 255, in every convention."""
    selection, lse = request.param.split("-")
    config = SparseConfig(window_size=128, topk=4, dense_len=256)
    return replace(config, selection=selection, lse=lse)


@pytest.fixture(scope="session")
def acts() -> Callable[[int, int, SparseConfig], None]:
    """Assert that fewer than half of the available tokens are visible, and print the share."""

    def check(new: int, length: int, sparse: SparseConfig) -> None:
        stats = attend_stats(new, length, sparse)
        print(
            f"mean visible {stats.visible:.0f} of {stats.available:.0f} tokens: {stats.ratio:.2f}"
        )
        assert stats.ratio < 0.5, f"sparsity does not act: {stats}"

    return check


@pytest.fixture(scope="session")
def draw() -> Callable[..., list[torch.Tensor]]:
    """q (rows, new, heads, width) of scale 2, and k, v (rows, length, groups, width)."""

    def make(
        new: int, length: int, *, heads: int = 4, groups: int = 2, width: int = 16, rows: int = 1
    ) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(new * 7919 + length)
        shapes = [(rows, new, heads, width), *[(rows, length, groups, width)] * 2]
        q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
        return [2 * q, k, v]

    return make
