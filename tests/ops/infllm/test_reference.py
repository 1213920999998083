"""The reference against the worked examples B and C of infllmv2 §18, and its properties."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from endside.ops.infllm import reference
from endside.ops.infllm.config import SparseConfig

Draw = Callable[..., list[torch.Tensor]]
ALWAYS = SparseConfig(dense_len=-1)

# position, lse, sum over coarse (and exact) normaliser, scores, pooled scores: §18 B
EXAMPLE_B = [
    (130, 0.992188, 3.059992, 7.9074,
     [0.47237, 0.60653, 0.77880, 1, 1.28403, 1.64872, 2.11700, 0, 0, 0, 0],
     [1.0, 2.117, 0, -torch.inf]),
    (199, 2.305449, 4.184816, 6.5494,
     [0.12704, 0.16312, 0.20945, 0.26894, 0.34533, 0.44341, 0.56935, 0.73106, 0.93870, 1.20531,
      1.54765],
     [0.26894, 0.73106, 1.54765, -torch.inf]),
]  # fmt: skip


@pytest.mark.parametrize(("position", "coarse", "exact", "total", "scores", "pooled"), EXAMPLE_B)
def test_scores_of_example_b(
    position: int, coarse: float, exact: float, total: float, scores: list, pooled: list
) -> None:
    """One head of width 1, key t = t / 64, 200 keys."""
    keys = (torch.arange(200, dtype=torch.float64) / 64).view(1, 200, 1, 1)
    k1, k2 = reference.summarise(keys, ALWAYS)
    assert torch.allclose(k1.flatten(), (16 * torch.arange(11) + 15.5).double() / 64)
    assert torch.allclose(k2.flatten(), (64 * torch.arange(2) + 63.5).double() / 64)
    query, positions = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.tensor([position])
    got = reference.fine_scores(query, k1, k2, positions=positions, sparse=ALWAYS)
    torch.testing.assert_close(got.flatten(), torch.tensor(scores).double(), atol=6e-6, rtol=0)
    assert got.sum().item() == pytest.approx(total, abs=6e-5)
    torch.testing.assert_close(
        reference.pool(got, length=200, sparse=ALWAYS).flatten(),
        torch.tensor(pooled).double(),
        atol=6e-6,
        rtol=0,
    )
    by_fine = reference.fine_scores(
        query, k1, k2, positions=positions, sparse=replace(ALWAYS, lse="exact")
    )
    assert by_fine.sum().item() == pytest.approx(1, abs=1e-12), "exact scores are a probability"
    shift = (got[..., 0] / by_fine[..., 0]).log().item()
    assert shift == pytest.approx(exact - coarse, abs=2e-6)


@pytest.mark.parametrize(
    ("selection", "attended"), [("4.0", [0, 5, 6, 7, 9, 10]), ("4.1", [0, 6, 7, 8, 9, 10])]
)
def test_choice_of_example_c(selection: str, attended: list[int]) -> None:
    """704 keys, query 650, window of 2 blocks, topk 4: the conventions differ in one block."""
    sparse = SparseConfig(window_size=128, topk=4, dense_len=-1, selection=selection)
    scores = torch.zeros(1, 1, 1, 43)
    scores[..., :39] = 2 * torch.arange(39) % 61
    pooled = reference.pool(scores, length=704, sparse=sparse)
    assert pooled.flatten().tolist() == [6, 14, 22, 30, 38, 46, 54, 60, 9, 15, 0]
    blocks = reference.choose(pooled, positions=torch.tensor([650]), sparse=sparse)
    assert blocks.dtype == torch.int32
    assert blocks.flatten().tolist() == attended


def test_equal_scores_take_the_lower_block(tiny: SparseConfig) -> None:
    """Without any preference the free places go to the first blocks, and -1 fills the rest."""
    pooled = torch.zeros(1, 1, 3, 16)
    blocks = reference.choose(pooled, positions=torch.tensor([1000, 200, 5]), sparse=tiny)
    after = {"4.1": [0, 1, 2, 13, 14, 15], "4.0": [0, 1, 2, 3, 14, 15]}[tiny.selection]
    assert blocks[0, 0].tolist() == [after, [0, 1, 2, 3, -1, -1], [0, -1, -1, -1, -1, -1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(1, 699), max_size=6))
def test_pooling_new_windows_gives_the_same_bits(dtype: torch.dtype, cuts: list[int]) -> None:
    """E4: summaries pooled as keys arrive equal those of all keys at once, bit for bit."""
    keys = torch.randn(2, 700, 2, 8, generator=torch.Generator().manual_seed(3)).to(dtype)
    for size, stride in ((32, 16), (128, 64)):
        stored = reference.compress(keys[:, :0], size, stride)
        for length in [*sorted(cuts), 700]:
            tail = keys[:, stored.shape[1] * stride : length]
            stored = torch.cat([stored, reference.compress(tail, size, stride)], dim=1)
        at_once = reference.compress(keys, size, stride)
        assert stored.dtype == dtype
        assert torch.equal(stored, at_once)
    want = keys[:, 64:192].double().mean(1)
    assert (at_once[:, 1] - want).abs().max() <= torch.finfo(dtype).eps * want.abs().max()


def test_permuting_the_heads_of_a_group_keeps_the_choice(tiny: SparseConfig, draw: Draw) -> None:
    """E2: a group chooses by a sum over its heads; exchanging heads between groups changes it."""
    q, k, _ = draw(65, 900, heads=8, groups=2)
    blocks = reference.chosen_blocks(q, k, sparse=tiny)
    order = torch.tensor([2, 0, 3, 1, 7, 4, 6, 5])
    assert torch.equal(reference.chosen_blocks(q[:, :, order], k, sparse=tiny), blocks)
    across = torch.tensor([4, 1, 2, 3, 0, 5, 6, 7])
    assert not torch.equal(reference.chosen_blocks(q[:, :, across], k, sparse=tiny), blocks)


@pytest.mark.parametrize("lse", ["coarse", "exact"])
def test_normaliser_choice_acts(draw: Draw, lse: str) -> None:
    """Coarse and exact normalisers weigh peaked heads differently, so some choices differ."""
    q, k, _ = draw(65, 900, heads=8, groups=2)
    one, other = (
        reference.chosen_blocks(q * 3, k, sparse=SparseConfig(window_size=128, topk=4, lse=name))
        for name in (lse, {"coarse": "exact", "exact": "coarse"}[lse])
    )
    differ = (one != other).any(-1).double().mean()
    assert 0 < differ < 0.5, f"{differ:.2f} of the choices differ"


@pytest.mark.parametrize("dense_len", [599, 600, 601])
def test_switch_is_per_query_or_per_forward(draw: Draw, dense_len: int) -> None:
    """Position p is sparse iff p + 1 >= dense_len; with compat "hf" the forward decides for all."""
    q, k, v = draw(130, 650)
    sparse = SparseConfig(window_size=128, topk=4, dense_len=dense_len)
    always, never = replace(sparse, dense_len=-1), replace(sparse, dense_len=10_000)
    got, all_sparse, all_dense = (
        reference.attend(q, k, v, sparse=s) for s in (sparse, always, never)
    )
    split = dense_len - 1 - 520
    assert torch.equal(got[:, :split], all_dense[:, :split])
    assert torch.equal(got[:, split:], all_sparse[:, split:])
    assert not torch.allclose(all_dense, all_sparse)
    per_forward = replace(sparse, compat="hf")
    assert torch.equal(reference.attend(q, k, v, sparse=per_forward), all_sparse)
    last = dense_len - 1
    short = (q[:, : last - 520], k[:, :last], v[:, :last])
    dense = reference.attend(*short, sparse=per_forward)
    assert torch.equal(dense, reference.attend(*short, sparse=never))
