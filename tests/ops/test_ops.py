"""Every row of the OPS table against float64 truth: forward and every gradient.

Rule (style, habit 2): error(fast) <= 2 * error(reference in the same dtype) + 4 eps * max|out|.
Rows that need Triton are walked by tests/triton_interpret, InfLLM's by tests/ops/infllm.
"""

from __future__ import annotations

import sys

import pytest
import torch

from endside import native
from endside.ops import OPS, attention, implementation, passes
from endside.ops.attention import sdpa, segments
from endside.ops.attention.packing import Packing, packing
from endside.ops.cross_entropy.reference import IGNORE

DIFFERENTIABLE_ONLY_IN_TORCH = {("rmsnorm", "native")}
NEEDS_CORE = {"native", "tiles"}
FLOAT32_ONLY = {("rmsnorm", "native"), ("add_norm", "native"), ("linear", "tiles")}


pytestmark = pytest.mark.usefixtures("every_product_in_tiles")


def _inputs(op: str, size: int) -> tuple[list[torch.Tensor], tuple]:
    """Float64 tensors that take a gradient, and the rest of the arguments."""
    make = torch.Generator().manual_seed(size)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=make, dtype=torch.float64)

    if op == "rmsnorm":
        return [normal(3, size) * 5, 1 + 0.3 * normal(size)], (1e-5,)
    if op == "add_norm":
        return [normal(37, size), normal(37, size), 1 + 0.3 * normal(size)], (0.7, 1e-5)
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
    leaves = [
        t.to(dtype).requires_grad_((op, impl) not in DIFFERENTIABLE_ONLY_IN_TORCH) for t in tensors
    ]
    rest = tuple(
        r.to(dtype if dtype == torch.float64 else torch.float32)
        if isinstance(r, torch.Tensor) and r.is_floating_point()
        else r
        for r in rest
    )
    out = implementation(op, impl)(*leaves, *rest)
    if (op, impl) in DIFFERENTIABLE_ONLY_IN_TORCH:
        return [out.double()]
    outs = out if isinstance(out, tuple) else (out,)
    return _with_gradients(outs, leaves)


def _with_gradients(outs: tuple[torch.Tensor, ...], leaves: list) -> list[torch.Tensor]:
    """Outputs, and the gradients of a fixed mixture of all that is in them, in float64."""
    total = sum(
        (one.double() * torch.linspace(-1, 1 + i, one.numel()).double().view(one.shape)).sum()
        for i, one in enumerate(outs)
    )
    gradients = torch.autograd.grad(total, leaves)
    return [x.detach().double() for x in (*outs, *gradients)]


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
    if (op, impl) in FLOAT32_ONLY and dtype != torch.float32:
        pytest.skip("the native kernel is float32 only")
    need_kernel(op, impl)
    truth = _run(op, "reference", torch.float64, size)
    plain = _run(op, "reference", dtype, size)
    fast = _run(op, impl, dtype, size)
    for want, usual, got in zip(truth, plain, fast, strict=False):
        allowed = 2 * (usual - want).abs().max() + 4 * torch.finfo(dtype).eps * want.abs().max()
        assert (got - want).abs().max() <= allowed, f"{op}/{impl} at {size}: beyond {allowed:.3g}"


def need_kernel(op: str, impl: str) -> None:
    """Skip where this machine has no such row of the table."""
    if impl in NEEDS_CORE:
        need_core()
    if (op, impl) == ("linear", "tiles") and not passes.has_tiles():
        pytest.skip("this processor has no matrix tiles")


def need_core() -> None:
    """Skip where the package has none."""
    if native.load() is None:
        pytest.skip(f"native core: {native.status()}")


@pytest.mark.parametrize("isa", native.available_isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_passes_of_a_step_on_every_instruction_set(
    isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Odd widths, so that rows end inside a vector; the head's loss through the core too."""
    monkeypatch.setattr(passes, "ISA", isa)
    for op, impl in (("swiglu", "fused"), ("rope", "native"), ("head_loss", "fused")):
        test_row_matches_truth(op, impl, dtype, 37)
    if dtype == torch.float32:
        test_row_matches_truth("add_norm", "native", dtype, 37)
    within_rounding([[3, 30, 41], [74]], dtype, "tiles")


@pytest.mark.parametrize("branch", [False, True])
def test_a_narrow_norm_beside_a_wide_stream(branch: bool) -> None:
    """As under autocast: x float32, branch and norm bfloat16, against float64 truth."""
    need_core()
    results = []
    for kind, impl in ((torch.float64, "reference"), (None, "reference"), (None, "native")):
        make = torch.Generator().manual_seed(3)
        x, b, w = (torch.randn(*s, generator=make).double() for s in ((37, 70), (37, 70), (70,)))
        b = b.bfloat16()  # the same start for all
        leaves = [x.to(kind or torch.float32), b.to(kind or b.dtype), w.to(kind or torch.float32)]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        given = [leaves[0], leaves[1] if branch else None, leaves[2]]
        dtype = kind or torch.bfloat16
        outs = implementation("add_norm", impl)(*given, 0.7, 1e-5, dtype)
        assert kind or (outs[0].dtype, outs[1].dtype) == (torch.float32, torch.bfloat16)
        results.append(_with_gradients(outs, [leaf for leaf in given if leaf is not None]))
    for want, usual, got in zip(*results, strict=True):
        allowed = 2 * (usual - want).abs().max() + 4e-7 * want.abs().max()
        assert (got - want).abs().max() <= allowed


def test_bits_of_a_step_do_not_depend_on_the_number_of_threads() -> None:
    """The weight's gradient is summed in parts of a fixed size."""
    need_core()
    found, threads = [], torch.get_num_threads()
    for number in (1, 2):
        torch.set_num_threads(number)
        found.append(_run("add_norm", "native", torch.float32, 129))
    torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_a_logit_that_is_no_number_shows_in_the_loss() -> None:
    """So that training stops; and a target outside of the logits is refused."""
    need_core()
    (hidden, weight), (targets, _) = _inputs("head_loss", 5)
    leaves = [hidden.float().requires_grad_(), weight.float().requires_grad_()]
    assert implementation("head_loss", "fused")(*leaves, targets).isfinite()
    for bad in (float("nan"), float("inf")):
        broken = leaves[0].detach().clone()
        broken[1, 2, 3] = bad
        broken.requires_grad_()
        assert not implementation("head_loss", "fused")(broken, leaves[1], targets).isfinite()
    with pytest.raises(IndexError, match="29"):
        implementation("head_loss", "fused")(*leaves, targets.clamp(min=29))


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


@pytest.mark.parametrize("impl", ["segments", "tiles"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_packed_rows_stay_within_the_references_rounding(dtype: torch.dtype, impl: str) -> None:
    """The path of a long row, with the tile that is used: error against float64 truth."""
    if impl in NEEDS_CORE:
        need_core()
    within_rounding([[3, 300, 20, 20, 257, 40], [640]], dtype, impl)


def within_rounding(rows: list[list[int]], dtype: torch.dtype, impl: str) -> None:
    """Outputs and gradients of packed rows have at most twice the reference's error."""
    results = []
    for kind, one in ((torch.float64, "reference"), (dtype, "reference"), (dtype, impl)):
        leaves, documents = packed_rows(rows, dtype=kind)
        out = attention.attend(*leaves, documents, one)
        results.append(_with_gradients((out,), leaves))
    for want, usual, got in zip(*results, strict=True):
        allowed = 2 * (usual - want).abs().max() + 4 * torch.finfo(dtype).eps * want.abs().max()
        assert (got - want).abs().max() <= allowed


def test_tiles_hold_every_query_once_and_all_that_it_sees(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Short neighbours share a tile, long documents have several; none is cut otherwise."""
    monkeypatch.setattr(sys.modules[Packing.__module__], "TILE", 8)
    rows = [[3, 4, 2, 20, 8, 7], [44], [1] * 44]
    documents = torch.stack(
        [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in rows]
    )
    found = Packing(documents).tiles
    sizes = [[t.stop - t.start for t in found if t.row == row] for row in range(3)]
    assert sizes == [[7, 2, 8, 8, 4, 8, 7], [8] * 5 + [4], [8] * 5 + [4]]
    for row, owners in enumerate(documents):
        at = 0
        for tile in (t for t in found if t.row == row):
            assert tile.start == at
            for i in range(tile.start, tile.stop):
                first, end = (int(x[i - at]) + tile.begin for x in (tile.first, tile.end))
                assert end == i + 1 <= tile.stop and owners[first] == owners[i]
                assert first >= tile.begin and (first == 0 or owners[first - 1] != owners[i])
            at = tile.stop
        assert at == 44


def test_a_packing_knows_its_documents() -> None:
    documents = torch.tensor([[0, 0, 1, 2, 2], [3, 3, 3, 3, -1]])
    packed = Packing(documents)
    assert packed.lengths == [[2, 1, 2], [4, 1]]
    assert packed.bounds.tolist() == [0, 2, 3, 5, 9, 10]
    assert packed.bounds.dtype == torch.int32
    assert packing(packed) is packed


@pytest.mark.parametrize(
    ("dtype", "rows", "way"),
    [
        (torch.bfloat16, [[256, 256], [100, 412]], "tiles"),
        (torch.bfloat16, [[256, 256], [512]], "segments"),
        (torch.float32, [[256, 256], [100, 412]], "segments"),
        (torch.float64, [[512]], "segments"),
    ],
)
def test_training_attends_the_way_that_was_measured_as_fastest(
    dtype: torch.dtype, rows: list[list[int]], way: str
) -> None:
    """Tiles for short documents in bfloat16 where a gradient is taken, and what is chosen runs."""
    need_core()
    leaves, documents = packed_rows(rows, dtype=dtype)
    assert attention.way(*leaves, documents) == way
    out = attention.attend(*leaves, documents)
    assert torch.equal(out, attention.attend(*leaves, documents, way))
    with torch.no_grad():
        assert attention.way(*leaves, documents) == "segments"


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
