"""Correctness of the GPU kernels on the device itself: what the interpreter cannot show.

Each function of TESTS checks one thing against `reference.py` and raises AssertionError where it
fails. Only torch and triton are needed: `gpu_check.py` runs them with the machine's own Python.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from endside.ops.attention import reference as dense_reference
from endside.ops.attention import segments, varlen
from endside.ops.infllm import attend_stats, reference
from endside.ops.infllm import triton as fast
from endside.ops.infllm.config import SparseConfig
from endside.quant import fp8

RELEASED = SparseConfig()
SMALL = SparseConfig(window_size=128, topk=4, dense_len=-1)  # budget 384 tokens
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# (B, T, S, G, group, D), configuration, dtype
SHAPES = [
    ((1, 129, 129, 2, 16, 128), SMALL, BF16),
    ((2, 65, 1055, 2, 16, 128), SMALL, BF16),
    ((1, 1000, 1000, 2, 16, 128), replace(SMALL, dense_len=600), FP16),
    ((1, 63, 2047, 2, 8, 64), replace(SMALL, selection="4.0", lse="exact"), BF16),
    ((1, 200, 1300, 2, 4, 64), SMALL, FP16),
    ((1, 200, 1300, 2, 1, 64), SMALL, BF16),
    ((1, 100, 900, 1, 16, 64), SMALL, FP32),
    ((1, 128, 16384, 2, 16, 128), RELEASED, BF16),
]


def draw(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Random q (B, T, H, D), k and v (B, S, G, D) on the device."""
    rows, new, keys, kv, group, width = shape
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device="cuda").to(dtype)

    q = 1.5 * normal(rows, new, kv * group, width)
    return q, normal(rows, keys, kv, width), normal(rows, keys, kv, width)


def gradients(
    attend, q: Tensor, k: Tensor, v: Tensor, weight: Tensor, **rest: object
) -> list[Tensor]:
    """Output and gradients of sum(attend(...) * weight)."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out = attend(q, k, v, **rest)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), (q, k, v))]


def close(name: str, fast_one: Tensor, slow: Tensor, truth: Tensor) -> None:
    """error(fast) <= 2 error(reference in the same dtype) + 4 eps max|truth|."""
    assert torch.isfinite(fast_one).all(), f"{name}: not finite"
    allowed = 2 * (slow.double() - truth).abs().max()
    allowed += 4 * torch.finfo(fast_one.dtype).eps * truth.abs().max()
    error = (fast_one.double() - truth).abs().max()
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def forward_and_gradients() -> str:
    """Output, dq, dk, dv: group sizes 1 to 16, widths 64 and 128, all types and conventions."""
    for shape, sparse, dtype in SHAPES:
        q, k, v = draw(shape, dtype)
        weight = torch.randn_like(q)
        summaries = reference.summarise(k, sparse)
        found = gradients(fast.attend, q, k, v, weight, sparse=sparse, summaries=summaries)
        slow = gradients(reference.attend, q, k, v, weight, sparse=sparse, summaries=summaries)
        wide = tuple(x.double() for x in summaries)
        inputs = [x.double() for x in (q, k, v, weight)]
        truth = gradients(reference.attend, *inputs, sparse=sparse, summaries=wide)
        for name, one, two, three in zip(("out", "dq", "dk", "dv"), found, slow, truth):
            close(f"{shape} {dtype} {name}", one, two, three)
    shape = SHAPES[1][0]
    ratio = attend_stats(shape[1], shape[2], SMALL).ratio
    assert ratio < 0.5, f"visible / available is {ratio:.2f}: sparsity does not act"
    return f"{len(SHAPES)} shapes"


def chosen_blocks() -> str:
    """Scores equal or far apart choose exactly the reference's blocks, as the output shows."""
    for selection in ("4.1", "4.0"):
        sparse = replace(RELEASED, selection=selection)
        q, k, _ = draw((1, 64, 20000, 2, 16, 128), FP32)
        level = torch.arange(k.shape[1], device="cuda") // 64 * 7 % 5
        k = (level / q.shape[-1] ** 0.5)[None, :, None, None].expand_as(k).contiguous()
        # v tells the blocks apart, q tells nothing about them
        v = torch.randn_like(k)
        found = fast.attend(torch.ones_like(q), k, v, sparse=sparse)
        truth = reference.attend(torch.ones_like(q), k, v, sparse=sparse)
        error = (found - truth).abs().max()
        assert error < 1e-4, f"{selection}: other blocks were chosen, error {error:.3g}"
    return "both conventions"


def dense_below_the_budget() -> str:
    """Below 6,144 tokens the released configuration is dense attention."""
    q, k, v = draw((1, 6000, 6000, 2, 16, 128), BF16)
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))
    truth = torch.nn.functional.scaled_dot_product_attention(
        query, key.repeat_interleave(16, 1), value.repeat_interleave(16, 1), is_causal=True
    ).transpose(1, 2)
    error = (fast.attend(q, k, v, sparse=replace(RELEASED, dense_len=-1)) - truth).abs().max()
    assert error < 0.04, f"error {error:.3g}"
    return "6,000 tokens"


def packed_documents() -> str:
    """Packed documents equal separate runs, forward and gradients."""
    lengths = [1, 700, 63, 1300, 65]
    q, k, v = (x[0] for x in draw((1, sum(lengths), sum(lengths), 2, 16, 64), BF16))
    weight = torch.randn_like(q)

    def packed(q, k, v):
        return fast.attend_packed(q, k, v, lengths=lengths, sparse=SMALL)

    def alone(q, k, v):
        parts = [x.split(lengths) for x in (q, k, v)]
        return torch.cat([fast.attend(*(x[None] for x in p), sparse=SMALL)[0] for p in zip(*parts)])

    for one, two in zip(gradients(packed, q, k, v, weight), gradients(alone, q, k, v, weight)):
        error = (one.double() - two.double()).abs().max() / two.double().abs().max()
        assert error < 0.02, f"relative error {error:.3g}"
    return f"{len(lengths)} documents"


def packed_dense() -> str:
    """Dense attention inside packed documents, both ways: as close to the truth as the mask is."""
    shapes = (((2, 8, 64), BF16), ((2, 16, 128), BF16), ((4, 1, 64), FP16))
    for (groups, group, width), dtype in shapes:
        q, k, v = draw((2, 900, 900, groups, group, width), dtype)
        weight = torch.randn_like(q)
        documents = torch.stack(
            [torch.arange(len(row)).repeat_interleave(torch.tensor(row))
             for row in ([1, 500, 63, 300, 36], [900])]
        ).cuda()  # fmt: skip
        truth = gradients(
            dense_reference.attend, q.double(), k.double(), v.double(), weight, documents=documents
        )
        slow = gradients(dense_reference.attend, q, k, v, weight, documents=documents)
        for impl in (varlen, segments):
            found = gradients(impl.attend, q, k, v, weight, documents=documents)
            for name, *one in zip(("out", "dq", "dk", "dv"), found, slow, truth):
                close(f"{impl.__name__} {name} {dtype}", *one)
    return "varlen and segments"


def backward_repeats() -> str:
    """Two backward passes give the same bits."""
    q, k, v = draw((1, 3000, 3000, 2, 16, 128), BF16)
    weight = torch.randn_like(q)
    first, second = (gradients(fast.attend, q, k, v, weight, sparse=SMALL) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second)), "gradients differ between runs"
    return "bit for bit"


def no_host_synchronisation() -> str:
    """Neither direction asks the device for a value."""
    q, k, v = draw((1, 1500, 1500, 2, 16, 128), BF16)
    weight = torch.randn_like(q)
    gradients(fast.attend, q, k, v, weight, sparse=SMALL)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(fast.attend, q, k, v, weight, sparse=SMALL)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "forward and backward"


def captured_decode() -> str:
    """A captured decode step follows lengths that change between replays."""
    q, k, v = draw((2, 1, 20000, 2, 16, 128), BF16)
    sparse = RELEASED
    summaries = reference.summarise(k, sparse)
    lengths = torch.tensor([9000, 12000], dtype=torch.int32, device="cuda")

    def step() -> Tensor:
        with torch.no_grad():
            return fast.attend(q, k, v, sparse=sparse, summaries=summaries, lengths=lengths)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for now in ([9000, 12000], [5000, 20000], [8191, 8192], [100, 19999]):
        lengths.copy_(torch.tensor(now, dtype=torch.int32))
        graph.replay()
        truth = reference.attend(q, k, v, sparse=sparse, summaries=summaries, lengths=now)
        error = (out - truth).abs().max()
        assert error < 0.02, f"lengths {now}: error {error:.3g}"
    return "4 replays"


def fp8_products() -> str:
    """FP8 of training: the device's block-scaled product is the emulation, or is not used."""
    product, how = fp8.product_for(torch.device("cuda"))
    if "emulated" in how:
        return how
    make = torch.Generator(device="cuda").manual_seed(0)
    for rows, inner, outer in ((5, 100, 90), (300, 1000, 700)):
        x = torch.randn(rows, inner, generator=make, device="cuda")
        weight = torch.randn(outer, inner, generator=make, device="cuda")
        want = fp8.emulated(fp8.quantize(x, 1), fp8.quantize(weight, fp8.TILE))
        error = float((product(x, weight).float() - want).abs().max() / want.abs().max())
        # the result is rounded to bfloat16
        assert error < 2**-8, f"{rows} x {inner} x {outer}: off by {error:.2g} of the largest"
    return how


TESTS = (
    forward_and_gradients,
    chosen_blocks,
    dense_below_the_budget,
    packed_documents,
    packed_dense,
    backward_repeats,
    no_host_synchronisation,
    captured_decode,
    fp8_products,
)
