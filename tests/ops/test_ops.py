"""Every row of the OPS table against float64 truth: forward and every gradient.

Rule (style, habit 2): error(fast) <= 2 * error(reference in the same dtype) + 4 eps * max|out|.
Rows that need Triton are walked by tests/triton_interpret, InfLLM's by tests/ops/infllm.
"""

from __future__ import annotations

import pytest
import torch

from endside import native
from endside.ops import OPS, attention, implementation
from endside.ops.attention import sdpa, segments
from endside.ops.attention.packing import Packing, packing
from endside.ops.cross_entropy.reference import IGNORE

DIFFERENTIABLE_ONLY_IN_TORCH = {"native"}


def _inputs(op: str, size: int) -> tuple[list[torch.Tensor], tuple]:
    """Float64 tensors that take a gradient, and the rest of the arguments."""
    make = torch.Generator().manual_seed(size)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=make, dtype=torch.float64)

    if op == "rmsnorm":
        return [normal(3, size) * 5, 1 + 0.3 * normal(size)], (1e-5,)
    if op == "rope":
        angle = normal(2, size, 1, 8)
        return [normal(2, size, 3, 16)], (angle.cos() * 1.1, angle.sin() * 1.1)
    if op == "swiglu":
        return [normal(2, size) * 3, normal(2, size)], ()
    if op == "linear":
        return [normal(3, size), normal(7, size)], ()
    if op == "attention":
        return [normal(2, size, 6, 16), normal(2, size + 5, 2, 16), normal(2, size + 5, 2, 16)], ()
    if op == "cross_entropy":
        targets = torch.randint(0, 11, (2, size), generator=make)
        targets[0, 0] = IGNORE
        return [normal(2, size, 11) * 4], (targets,)
    if op == "head_loss":
        targets = torch.randint(0, 29, (2, size), generator=make)
        targets[0, 0] = IGNORE
        return [normal(2, size, 12) * 4, normal(29, 12)], (targets, 3.0)
    raise AssertionError(f"no inputs are written for {op}: add them")


def _run(op: str, impl: str, dtype: torch.dtype, size: int) -> list[torch.Tensor]:
    """Output and gradients in float64, computed in `dtype`."""
    tensors, rest = _inputs(op, size)
    leaves = [t.to(dtype).requires_grad_(impl not in DIFFERENTIABLE_ONLY_IN_TORCH) for t in tensors]
    rest = tuple(
        r.to(dtype if dtype == torch.float64 else torch.float32)
        if isinstance(r, torch.Tensor) and r.is_floating_point()
        else r
        for r in rest
    )
    out = implementation(op, impl)(*leaves, *rest)
    if impl in DIFFERENTIABLE_ONLY_IN_TORCH:
        return [out.double()]
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    (out.double() * weight).sum().backward()
    return [out.detach().double()] + [leaf.grad.double() for leaf in leaves]


ROWS = [
    (op, impl)
    for op, impls in OPS.items()
    for impl in impls
    # varlen needs a GPU and packed documents: bench/gpu_tests.py
    if op != "infllm" and impl not in ("triton", "varlen")
]


@pytest.mark.parametrize("size", [1, 7, 63, 65, 129])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("op", "impl"), ROWS, ids=[f"{op}-{impl}" for op, impl in ROWS])
def test_row_matches_truth(op: str, impl: str, dtype: torch.dtype, size: int) -> None:
    """Forward and gradients stay within twice the reference's own rounding."""
    if impl == "native":
        if dtype != torch.float32:
            pytest.skip("the native kernel is float32 only")
        if native.load() is None:
            pytest.skip(f"native core: {native.status()}")
    truth = _run(op, "reference", torch.float64, size)
    plain = _run(op, "reference", dtype, size)
    fast = _run(op, impl, dtype, size)
    for want, usual, got in zip(truth, plain, fast, strict=False):
        allowed = 2 * (usual - want).abs().max() + 4 * torch.finfo(dtype).eps * want.abs().max()
        assert (got - want).abs().max() <= allowed, f"{op}/{impl} at {size}: beyond {allowed:.3g}"


def test_attention_keeps_documents_apart() -> None:
    """Changing one packed document leaves the others' outputs alone, in both implementations."""
    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 9, n, 16, generator=make) for n in (4, 2, 2))
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2]])
    for impl in ("reference", "sdpa", "segments"):
        attend = implementation("attention", impl)
        before = attend(q, k, v, documents)
        alone = attend(q[:, 3:7], k[:, 3:7], v[:, 3:7])
        torch.testing.assert_close(before[:, 3:7], alone, rtol=1e-5, atol=1e-6)
        changed = k.clone()
        changed[:, :3] += 1
        assert torch.equal(attend(q, changed, v, documents)[:, 3:], before[:, 3:]), impl
        assert not torch.allclose(attend(q, changed, v)[:, 3:], attend(q, k, v)[:, 3:]), impl


def packed_rows(rows: list[list[int]], *, dtype: torch.dtype = torch.float64) -> tuple:
    """q, k, v that take a gradient, and documents numbered anew in each row."""
    make = torch.Generator().manual_seed(1)
    documents = torch.stack(
        [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in rows]
    )
    leaves = [
        torch.randn(*documents.shape, n, 16, generator=make, dtype=torch.float64).to(dtype)
        for n in (6, 2, 2)
    ]
    return [leaf.requires_grad_() for leaf in leaves], documents


@pytest.mark.parametrize("impl", ["reference", "sdpa", "segments", "auto"])
def test_packed_documents_equal_separate_ones_forward_and_backward(
    impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float64: rows of documents longer and shorter than what shares a call, against each alone."""
    monkeypatch.setattr(segments, "TILE", 16)
    rows = [[1, 5, 40, 3, 3, 3, 9, 16], [80], [17, 1, 1, 1, 60]]
    leaves, documents = packed_rows(rows)
    weight = torch.randn(leaves[0].shape, dtype=torch.float64)
    out = attention.attend(*leaves, documents, impl)
    got = [out, *torch.autograd.grad((out * weight).sum(), leaves)]
    alone = [torch.zeros_like(one) for one in got]
    for row, lengths in enumerate(rows):
        at = 0
        for length in lengths:
            place = (slice(row, row + 1), slice(at, at + length))
            parts = [leaf[place].detach().requires_grad_() for leaf in leaves]
            one = implementation("attention", "reference")(*parts)
            found = [one, *torch.autograd.grad((one * weight[place]).sum(), parts)]
            for whole, piece in zip(alone, found, strict=True):
                whole[place] = piece.detach()
            at += length
    for one, other in zip(got, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_segments_differentiate_as_finite_differences_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of packed attention against float64 finite differences."""
    monkeypatch.setattr(segments, "TILE", 3)
    leaves, documents = packed_rows([[2, 1, 4]])
    small = [leaf[..., :1, :3].detach().requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(lambda *x: segments.attend(*x, documents), small)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_segments_of_real_rows_stay_within_the_references_rounding(dtype: torch.dtype) -> None:
    """The path of a long row, with the tile that is used: error against float64 truth."""
    rows = [[3, 300, 20, 20, 257, 40], [640]]
    results = []
    for kind, impl in ((torch.float64, "reference"), (dtype, "reference"), (dtype, "segments")):
        leaves, documents = packed_rows(rows, dtype=kind)
        out = attention.attend(*leaves, documents, impl)
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
        gradients = torch.autograd.grad((out.double() * weight).sum(), leaves)
        results.append([x.detach().double() for x in (out, *gradients)])
    for want, usual, got in zip(*results, strict=True):
        allowed = 2 * (usual - want).abs().max() + 4 * torch.finfo(dtype).eps * want.abs().max()
        assert (got - want).abs().max() <= allowed


def test_a_packing_knows_its_documents() -> None:
    documents = torch.tensor([[0, 0, 1, 2, 2], [3, 3, 3, 3, -1]])
    packed = Packing(documents)
    assert packed.lengths == [[2, 1, 2], [4, 1]]
    assert packed.bounds.tolist() == [0, 2, 3, 5, 9, 10]
    assert packed.bounds.dtype == torch.int32
    assert packing(packed) is packed


def test_unknown_implementation_is_named() -> None:
    """A wrong name says which ones there are."""
    with pytest.raises(KeyError, match="reference"):
        implementation("rope", "cuda")


def test_a_chunk_in_tiles_equals_one_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cutting the queries of a chunk behind stored keys changes nothing but rounding."""
    make = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(2, n, g, 16, generator=make) for n, g in ((70, 6), (91, 2), (91, 2)))
    monkeypatch.setattr(sdpa, "TILE", 17)
    want = implementation("attention", "reference")(q, k, v)
    torch.testing.assert_close(sdpa.attend(q, k, v), want, rtol=1e-5, atol=2e-6)
