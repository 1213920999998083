"""The CPU path against the reference: output, gradients and chosen blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from endside.ops.attention import sdpa
from endside.ops.infllm import blockwise, geometry, reference, vectorised
from endside.ops.infllm.config import SparseConfig

Draw = Callable[..., list[torch.Tensor]]
Acts = Callable[[int, int, SparseConfig], None]

TINY = SparseConfig(window_size=128, topk=4, dense_len=256)


def _run(attend: Callable, inputs: list[torch.Tensor], sparse: SparseConfig) -> list[torch.Tensor]:
    """Output and the gradients of q, k and v, in float64."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = attend(*leaves, sparse=sparse)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    (out.double() * weight).sum().backward()
    return [out.detach().double()] + [leaf.grad.double() for leaf in leaves]


def _same(inputs: list[torch.Tensor], sparse: SparseConfig) -> None:
    """Both implementations agree in float64, forward and every gradient."""
    want, got = (_run(a, inputs, sparse) for a in (reference.attend, vectorised.attend))
    for name, x, y in zip(("out", "dq", "dk", "dv"), want, got, strict=True):
        assert (x - y).abs().max() <= 1e-11 * max(1, x.abs().max()), f"{name} differs"


@pytest.mark.parametrize("new", [1, 63, 65, 129])
@pytest.mark.parametrize("length", [255, 256, 257, 384, 385, 700])
def test_sizes(tiny: SparseConfig, draw: Draw, new: int, length: int) -> None:
    """Odd sizes around the dense length (256), the budget (384) and beyond."""
    _same(draw(new, length), tiny)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("group", [1, 4, 8, 16])
def test_heads(draw: Draw, acts: Acts, group: int, width: int) -> None:
    """Every group size of the family, both head widths."""
    acts(33, 900, TINY)
    _same(draw(33, 900, heads=2 * group, width=width), TINY)


@pytest.mark.parametrize("window", [64, 192])
@pytest.mark.parametrize(("initial", "topk"), [(1, 2), (2, 3), (2, 5)])
def test_budgets(tiny: SparseConfig, draw: Draw, window: int, initial: int, topk: int) -> None:
    """One-block windows, several initial blocks, and lists that leave nothing to choose."""
    sparse = replace(tiny, window_size=window, init_blocks=initial, topk=topk, dense_len=-1)
    _same(draw(300, 700, rows=2), sparse)


def test_whole_sequences(tiny: SparseConfig, draw: Draw) -> None:
    """Rows from position 0, as in training: dense, then sparse, in one call."""
    _same(draw(641, 641, rows=2), tiny)
    _same(draw(641, 641, rows=2), replace(tiny, compat="hf", dense_len=100))


def test_small_portions_change_nothing(
    tiny: SparseConfig, draw: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks, score tiles and product portions only bound memory."""
    monkeypatch.setattr(vectorised, "CHUNK", 100)
    monkeypatch.setattr(sdpa, "TILE", 31)
    monkeypatch.setattr(vectorised, "TEMPORARY", 2048)
    monkeypatch.setattr(blockwise, "TEMPORARY", 4096)
    monkeypatch.setattr(blockwise, "PRODUCT_ROWS", 6)
    _same(draw(500, 800), tiny)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_rounding(tiny: SparseConfig, draw: Draw, acts: Acts, dtype: torch.dtype) -> None:
    """Error at most twice that of the reference in the same type, against float64 truth."""
    acts(300, 1100, tiny)
    inputs = [x.to(dtype) for x in draw(300, 1100)]
    # summaries are stored in the model's type: the truth starts from the same ones
    summaries = reference.summarise(inputs[1], tiny)

    def run(attend: Callable, kind: torch.dtype) -> list[torch.Tensor]:
        scales = tuple(s.to(kind) for s in summaries)
        bound = lambda *qkv, sparse: attend(*qkv, sparse=sparse, summaries=scales)
        return _run(bound, [x.to(kind) for x in inputs], tiny)

    truth = run(reference.attend, torch.float64)
    for want, usual, got in zip(
        truth, run(reference.attend, dtype), run(vectorised.attend, dtype), strict=True
    ):
        allowed = 2 * (usual - want).abs().max() + 4 * torch.finfo(dtype).eps * want.abs().max()
        assert (got - want).abs().max() <= allowed


def _fast_blocks(q: torch.Tensor, k: torch.Tensor, sparse: SparseConfig) -> list[list[set[int]]]:
    """Blocks the fast selector adds to the window, per key head and query of one row."""
    folded = q[0].unflatten(1, (k.shape[2], -1)).transpose(0, 1) * q.shape[-1] ** -0.5
    k1, k2 = (s[0].transpose(0, 1) for s in reference.summarise(k, sparse))
    taken = vectorised.choose(folded, k1, k2, last=k.shape[1], sparse=sparse)
    return [[set(row.nonzero().flatten().tolist()) for row in head] for head in taken]


def _reference_blocks(
    q: torch.Tensor, k: torch.Tensor, sparse: SparseConfig
) -> list[list[set[int]]]:
    """The same from the reference."""
    chosen = reference.chosen_blocks(q, k, sparse=sparse)[0]
    first = k.shape[1] - q.shape[1]
    return [
        [
            {b for b in row if b < geometry.first_local((first + t) // sparse.block_size, sparse)}
            for t, row in enumerate(head)
        ]
        for head in chosen.tolist()
    ]


def test_choices_on_planted_scores(tiny: SparseConfig, acts: Acts) -> None:
    """Blocks whose keys stand out are the ones chosen, in fp32 as in the reference."""
    acts(65, 1281, tiny)
    generator = torch.Generator().manual_seed(5)
    direction = torch.randn(2, 16, generator=generator)
    level = torch.zeros(21)
    level[[3, 8, 13]] = torch.tensor([4.0, 7.0, 5.5])
    # raised only inside: the summary shared with a neighbour stays lower than a block's own
    inside = torch.ones(64).index_fill(0, torch.tensor([*range(16), *range(48, 64)]), 0.1)
    strength = (level.unsqueeze(1) * inside).flatten()[:1281]
    k = strength.view(1, -1, 1, 1) * direction / direction.norm(dim=-1, keepdim=True)
    q = direction.repeat_interleave(4, dim=0).expand(1, 65, 8, 16) * 2
    got = _fast_blocks(q, k, tiny)
    assert got == _reference_blocks(q, k, tiny)
    wanted = {0, 8, 13} | ({3} if tiny.selection == "4.0" else set())
    assert all(row == wanted for head in got for row in head)


def test_choices_on_equal_scores(tiny: SparseConfig) -> None:
    """Queries without preference take the lowest blocks, as the reference does."""
    q, k = torch.zeros(1, 65, 4, 16), torch.ones(1, 1281, 2, 16)
    got = _fast_blocks(q, k, tiny)
    assert got == _reference_blocks(q, k, tiny)
    wanted = set(range(3 if tiny.selection == "4.1" else 4))
    assert all(row == wanted for head in got for row in head)


def test_choices_on_random_scores(tiny: SparseConfig, draw: Draw) -> None:
    """In fp32 a choice may differ only between scores that rounding cannot tell apart."""
    q, k, _ = (x.float() for x in draw(129, 1281, heads=8))
    truth = reference.fine_scores(
        q.double(),
        *(s.double() for s in reference.summarise(k, tiny)),
        positions=torch.arange(1152, 1281),
        sparse=tiny,
    )
    pooled = reference.pool(truth, length=1281, sparse=tiny)[0]
    for z, (fast, plain) in enumerate(
        zip(_fast_blocks(q, k, tiny), _reference_blocks(q, k, tiny), strict=True)
    ):
        for t, (one, other) in enumerate(zip(fast, plain, strict=True)):
            scores = pooled[z, t]
            for extra, missing in zip(sorted(one - other), sorted(other - one), strict=True):
                assert scores[extra].item() == pytest.approx(scores[missing].item(), rel=1e-5)


def test_long_context_stays_within_memory() -> None:
    """64 queries over 40,000 keys: no temporary grows with queries times keys."""
    sparse = SparseConfig(dense_len=-1)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, t, h, 16, generator=generator)
        for t, h in ((64, 8), (40_000, 1), (40_000, 1))
    )
    with torch.profiler.profile(profile_memory=True, record_shapes=False) as profile:
        vectorised.attend(q, k, v, sparse=sparse, summaries=reference.summarise(k, sparse))
    largest = max(event.cpu_memory_usage for event in profile.events())
    print(f"largest allocation {largest / 2**20:.1f} MiB")
    # scores of all pairs would take 64 * 8 * 40,000 * 4 bytes = 78 MiB
    assert largest <= 16 * 2**20
