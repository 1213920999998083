"""Properties every implementation must have, run on the reference and on the CPU path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from endside.errors import UserError
from endside.ops.infllm import attend, attend_packed, compress, reference
from endside.ops.infllm.config import SparseConfig

Draw = Callable[..., list[torch.Tensor]]
Acts = Callable[[int, int, SparseConfig], None]
EXACT = dict(rtol=1e-9, atol=1e-10)


@pytest.fixture(params=["reference", "vectorised"])
def impl(request: pytest.FixtureRequest) -> str:
    """Name of an implementation that runs anywhere."""
    return request.param


def _dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of the last positions, by PyTorch itself."""
    seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(*heads_first, attn_mask=seen, enable_gqa=True)
    return out.transpose(1, 2)


def test_below_the_budget_sparse_is_dense(tiny: SparseConfig, draw: Draw, impl: str) -> None:
    """E1: the first position that differs from dense attention is the budget itself."""
    q, k, v = draw(600, 600, rows=2)
    got = attend(q, k, v, sparse=replace(tiny, dense_len=-1), impl=impl)
    want = _dense(q, k, v)
    torch.testing.assert_close(got[:, : tiny.budget], want[:, : tiny.budget], **EXACT)
    assert (got - want).abs().amax((0, 2, 3))[tiny.budget :].min() > 1e-6


def test_released_sizes_are_dense_below_6144() -> None:
    """E1 with the released sizes: 6144 is the first position whose choice is not everything."""
    q, k, v = (
        torch.randn(1, 6145, 1, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)
    )
    sparse = SparseConfig(dense_len=-1)
    got = attend(q[:, -2:], k, v, sparse=sparse, impl="reference")
    want = _dense(q[:, -2:], k, v)
    torch.testing.assert_close(got[:, 0], want[:, 0], rtol=1e-5, atol=1e-6)
    assert (got[:, 1] - want[:, 1]).abs().max() > 1e-5


def test_unchosen_keys_do_not_matter(tiny: SparseConfig, draw: Draw, impl: str, acts: Acts) -> None:
    """E3: with summaries held fixed, keys and values of blocks nobody chose may be anything."""
    q, k, v = draw(3, 1200)
    acts(3, 1200, tiny)
    summaries = reference.summarise(k, tiny)
    blocks = reference.chosen_blocks(q, k, sparse=tiny)
    unchosen = [b for b in range(19) if not (blocks == b).any()]
    assert unchosen, "every block was chosen: nothing is tested"
    before = attend(q, k, v, sparse=tiny, summaries=summaries, impl=impl)
    k, v = k.clone(), v.clone()
    for block in unchosen:
        k[:, block * 64 : block * 64 + 64] = 50
        v[:, block * 64 : block * 64 + 64] = torch.nan
    if impl == "reference":
        v.nan_to_num_(1e6)  # 0 * NaN: the reference multiplies what it masks
    assert torch.equal(attend(q, k, v, sparse=tiny, summaries=summaries, impl=impl), before)
    chosen = int(blocks[0, 0, 0, 1])
    v[:, chosen * 64 : chosen * 64 + 64] += 1
    after = attend(q, k, v, sparse=tiny, summaries=summaries, impl=impl)
    assert not torch.allclose(after, before)


def test_unchosen_keys_get_no_gradient(tiny: SparseConfig, draw: Draw, impl: str) -> None:
    """E5: dK and dV are exactly 0 outside the chosen blocks and not 0 anywhere inside."""
    q, k, v = (x.requires_grad_() for x in draw(3, 1200, groups=1))
    attend(q, k, v, sparse=tiny, impl=impl).square().sum().backward()
    blocks = reference.chosen_blocks(q, k, sparse=tiny)
    positions = torch.arange(1197, 1200)
    seen = reference.visible(blocks, positions=positions, length=1200, sparse=tiny).any(2)[0, 0]
    assert not seen.all()
    for grad in (k.grad, v.grad):
        assert torch.equal(grad[0, :, 0].abs().amax(-1) > 0, seen)


@pytest.mark.parametrize("group", [1, 8])
def test_decoding_equals_one_shot(
    tiny: SparseConfig, draw: Draw, impl: str, acts: Acts, group: int
) -> None:
    """E4: token by token, with summaries pooled as windows fill up, like everything at once."""
    first, length = 740, 834
    q, k, v = draw(length, length, heads=2 * group)
    acts(length - first, length, tiny)
    at_once = attend(q, k, v, sparse=tiny, impl=impl)[:, first:]
    sizes = ((tiny.kernel_size, tiny.kernel_stride), (tiny.coarse_size, tiny.coarse_stride))
    stored = [compress(k[:, :first], *size) for size in sizes]
    for end in range(first + 1, length + 1):
        for i, (size, stride) in enumerate(sizes):
            tail = k[:, stored[i].shape[1] * stride : end]
            stored[i] = torch.cat([stored[i], compress(tail, size, stride)], dim=1)
        one = (q[:, end - 1 : end], k[:, :end], v[:, :end])
        got = attend(*one, sparse=tiny, summaries=tuple(stored), impl=impl)
        torch.testing.assert_close(got[:, 0], at_once[:, end - 1 - first], **EXACT)
    for summary, whole in zip(stored, reference.summarise(k, tiny), strict=True):
        assert torch.equal(summary, whole)


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(cuts=st.lists(st.integers(1, 639), max_size=5), dense_len=st.sampled_from([-1, 256, 450]))
def test_chunking_never_changes_a_token(
    tiny: SparseConfig, draw: Draw, impl: str, cuts: list[int], dense_len: int
) -> None:
    """Any split of a prompt gives what one forward gives, across the dense to sparse switch."""
    sparse = replace(tiny, dense_len=dense_len)
    q, k, v = draw(640, 640, heads=2, width=8)
    whole = attend(q, k, v, sparse=sparse, impl=impl)
    edges = sorted({0, *cuts, 640})
    for start, stop in pairwise(edges):
        part = attend(q[:, start:stop], k[:, :stop], v[:, :stop], sparse=sparse, impl=impl)
        torch.testing.assert_close(part, whole[:, start:stop], **EXACT)


def test_packed_documents_equal_separate_runs(tiny: SparseConfig, draw: Draw, impl: str) -> None:
    """E6: positions, windows and blocks start anew in every document."""
    lengths = [577, 1, 65, 700]
    q, k, v = (x[0] for x in draw(sum(lengths), sum(lengths), heads=2, width=8))
    got = attend_packed(q, k, v, lengths=lengths, sparse=tiny, impl=impl)
    start = 0
    for length in lengths:
        alone = [x[None, start : start + length] for x in (q, k, v)]
        torch.testing.assert_close(
            got[start : start + length], reference.attend(*alone, sparse=tiny)[0], **EXACT
        )
        start += length


def test_padded_rows_equal_separate_runs(tiny: SparseConfig, draw: Draw, impl: str) -> None:
    """Rows of different lengths in one call: each is as if it were alone, padding unread."""
    lengths = [900, 64, 513]
    q, k, v = draw(3, 900, rows=3)
    summaries = [s.clone() for s in reference.summarise(k, tiny)]
    for row, length in enumerate(lengths):
        k[row, length:], v[row, length:] = torch.nan, torch.nan
        summaries[0][row, tiny.fine_count(length) :] = torch.nan
        summaries[1][row, tiny.coarse_count(length) :] = torch.nan
    got = attend(q, k, v, sparse=tiny, summaries=tuple(summaries), lengths=lengths, impl=impl)
    for row, length in enumerate(lengths):
        alone = (q[row : row + 1], k[row : row + 1, :length], v[row : row + 1, :length])
        torch.testing.assert_close(got[row], reference.attend(*alone, sparse=tiny)[0], **EXACT)


@pytest.mark.parametrize(
    ("shapes", "fact"),
    [
        (dict(heads=3), "3 query heads are not a multiple of 2 key heads"),
        (dict(new=601), "601 new tokens for 600 keys"),
        (dict(new=0), "0 new tokens"),
        (dict(key_width=8), "differ in rows or head width"),
        (dict(value_length=599), "differ in shape"),
        (dict(lengths=[600, 700]), "lengths"),
        (dict(lengths=[600, 2]), "new tokens for 2 keys"),
        (dict(fine=10), "do not cover keys"),
    ],
)
def test_shapes_that_cannot_work_are_refused(shapes: dict, fact: str, impl: str) -> None:
    """Before any work, and with a message that names the fact."""
    new, heads = shapes.get("new", 5), shapes.get("heads", 4)
    q = torch.zeros(2, new, heads, 16)
    k = torch.zeros(2, 600, 2, shapes.get("key_width", 16))
    v = torch.zeros(2, shapes.get("value_length", 600), 2, shapes.get("key_width", 16))
    summaries = (torch.zeros(2, shapes.get("fine", 36), 2, 16), torch.zeros(2, 8, 2, 16))
    with pytest.raises(UserError, match=fact):
        attend(
            q,
            k,
            v,
            sparse=SparseConfig(),
            summaries=summaries,
            lengths=shapes.get("lengths"),
            impl=impl,
        )


def test_other_bad_input_is_refused(impl: str) -> None:
    """Missing axes, mixed types, wrong document lengths, an unknown implementation."""
    q, sparse = torch.zeros(1, 8, 2, 16), SparseConfig()
    with pytest.raises(UserError, match="4 axes"):
        attend(q[0], q, q, sparse=sparse, impl=impl)
    with pytest.raises(UserError, match="one floating type"):
        attend(q, q.double(), q, sparse=sparse, impl=impl)
    for lengths in ([3, 4], [8, 0], []):
        with pytest.raises(UserError, match="do not fill a row of 8 queries"):
            attend_packed(q[0], q[0], q[0], lengths=lengths, sparse=sparse, impl=impl)
    with pytest.raises(UserError, match="impl 'fast' does not exist"):
        attend(q, q, q, sparse=sparse, impl="fast")
