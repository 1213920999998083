"""The fused selector and the pooling of keys against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from endside.ops.infllm import attend_stats, geometry, reference
from endside.ops.infllm.config import SparseConfig
from endside.ops.infllm.triton.compress import compress
from endside.ops.infllm.triton.layout import Sequences, batch_table, heads_of
from endside.ops.infllm.triton.select import select
from tests.triton_interpret.cases import LARGE, SMALL, small, tensors


def sequences_of(q: Tensor, k: Tensor, sparse: SparseConfig, fine: int, coarse: int) -> Sequences:
    keys = torch.full((q.shape[0],), k.shape[1], dtype=torch.int32)
    table = batch_table(q, keys, (k.shape[1], fine, coarse), sparse)
    return Sequences(table, q.shape[1], k.shape[1])


def chosen(q: Tensor, k: Tensor, sparse: SparseConfig) -> Tensor:
    """All blocks attended to, by the kernel: bool (B, G, T, N)."""
    k1, k2 = reference.summarise(k, sparse)
    sequences = sequences_of(q, k, sparse, k1.shape[1], k2.shape[1])
    heads = heads_of(q, k, sparse, k.shape[1])
    free = select(q, k1, k2, sequences, heads=heads, coarse=sparse.lse == "coarse")
    rows, new = q.shape[:2]
    free = free.view(rows, new, k.shape[2], -1).permute(0, 2, 1, 3)  # (B, G, T, free)
    positions = torch.arange(k.shape[1] - new, k.shape[1])
    own = positions[:, None] // sparse.block_size
    blocks = torch.arange(geometry.block_count(k.shape[1], sparse))
    forced = (blocks < sparse.init_blocks) | (blocks >= geometry.first_local(own, sparse))
    dense = positions[:, None] < heads.first
    mask = ((forced | dense) & (blocks <= own)).expand(*free.shape[:3], -1).clone()
    b, g, t, i = torch.nonzero(free >= 0, as_tuple=True)
    picked = free[b, g, t, i].long()
    assert not mask[b, g, t, picked].any(), "a forced block, or one twice, was chosen by score"
    mask[b, g, t, picked] = True
    listed = free.masked_fill(free < 0, 2**30)
    assert (listed.diff() >= 0).all(), "the list does not ascend with -1 at its end"
    return mask


def expected(q: Tensor, k: Tensor, sparse: SparseConfig) -> Tensor:
    """The same from the reference."""
    blocks = reference.chosen_blocks(q, k, sparse=sparse).long()
    count = geometry.block_count(k.shape[1], sparse)
    mask = torch.zeros(*blocks.shape[:3], count + 1, dtype=torch.bool)
    mask.scatter_(-1, blocks.masked_fill(blocks < 0, count), True)
    return mask[..., :count]


EXACT = [
    ((1, 1, 207, 2, 4, 16), SMALL),
    ((1, 65, 303, 2, 2, 16), small(selection="4.0")),
    ((2, 5, 1293, 1, 16, 16), small(lse="exact", topk=9)),
    ((1, 3, 1100, 1, 8, 64), LARGE),
    ((1, 7, 255, 1, 1, 16), small(init_blocks=2, window_size=16, topk=5, selection="4.0")),
]


@pytest.mark.parametrize("shape,sparse", EXACT, ids=str)
def test_exact_scores_choose_equal_blocks(shape, sparse) -> None:
    """Keys constant inside blocks, few distinct values: scores are exactly equal or far apart."""
    q, k, _ = tensors(shape, torch.float32)
    level = torch.arange(k.shape[1]) // sparse.block_size * 7 % 5
    k = (level / q.shape[-1] ** 0.5)[None, :, None, None].expand_as(k).contiguous()
    q = torch.ones_like(q) * torch.tensor([1.0, 2.0]).repeat(q.shape[2])[: q.shape[2], None]
    ratio = attend_stats(q.shape[1], k.shape[1], sparse).ratio
    print(f"visible / available {ratio:.2f}")
    assert ratio < 0.5, "sparsity does not act"
    assert torch.equal(chosen(q, k, sparse), expected(q, k, sparse)), "other blocks"


def test_equal_scores_take_the_lower_block() -> None:
    q, k, _ = tensors((1, 4, 1600, 1, 4, 16), torch.float32)
    found = chosen(q, torch.zeros_like(k), small(topk=20))
    assert found[0, 0, -1].nonzero().flatten().tolist() == [*range(20 - 1), 97, 98, 99]


def test_a_summary_counts_once_it_is_complete() -> None:
    """With one local block, the last summary of a candidate reaches past some queries."""
    q, k, _ = tensors((1, 4, 324, 1, 4, 16), torch.float32)
    sparse = small(window_size=16, selection="4.0", topk=3)
    q, k = torch.ones_like(q), torch.zeros_like(k)
    k[:, 320:] = 4.0
    found = chosen(q, k, sparse)
    assert found[0, 0, :, 19].tolist() == [False, False, False, True]
    assert torch.equal(found, expected(q, k, sparse)), "other blocks"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lse", ["coarse", "exact"])
def test_random_scores_choose_within_the_rounding_error(dtype, lse) -> None:
    sparse = small(lse=lse)
    q, k, _ = tensors((1, 33, 1311, 2, 4, 16), dtype)
    found, truth = chosen(q, k, sparse), expected(q, k, sparse)
    k1, k2 = (x.double() for x in reference.summarise(k, sparse))
    positions = torch.arange(k.shape[1] - q.shape[1], k.shape[1])
    scores = reference.fine_scores(q.double(), k1, k2, positions=positions, sparse=sparse)
    scores = reference.pool(scores, length=k.shape[1], sparse=sparse)
    forced = truth & found
    worst = scores.masked_fill(~forced, torch.inf).amin(-1, keepdim=True)
    differ = found != truth
    assert differ.float().mean() < 0.001, "choices differ in more than rounding"
    # exp turns the rounding of a logit into a relative error of the score
    gap = ((scores - worst).abs() / scores)[differ]
    assert (gap < 1e-4).all(), "a block far from the threshold was chosen or left out"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keys", [1, 7, 8, 63, 65, 79])
def test_compress(keys, dtype) -> None:
    _, k, _ = tensors((2, 1, keys, 2, 1, 16), dtype)
    fine = keys // SMALL.kernel_stride
    sequences = sequences_of(k[:, :1], k, SMALL, fine, 0)
    found = compress(k, sequences, SMALL.kernel_stride, 4)
    truth = reference.compress(k, SMALL.kernel_size, SMALL.kernel_stride)
    for row in range(2):
        part = found[row * fine : row * fine + truth.shape[1]]
        torch.testing.assert_close(part, truth[row], rtol=torch.finfo(dtype).eps, atol=1e-7)
