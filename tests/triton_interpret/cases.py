"""Inputs, truth and tolerance shared by the kernel tests."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from endside.ops.infllm import reference
from endside.ops.infllm.config import SparseConfig

# Budget 96 tokens: sparsity acts on a few hundred tokens, which the interpreter can walk.
SMALL = SparseConfig(
    kernel_size=8,
    kernel_stride=4,
    block_size=16,
    window_size=32,
    topk=4,
    dense_len=-1,
)
# The released block size, budget 384 tokens.
LARGE = SparseConfig(window_size=128, topk=4, dense_len=-1)


def small(**changes: object) -> SparseConfig:
    """SMALL with some fields changed."""
    return replace(SMALL, **changes)


def tensors(
    shape: tuple[int, int, int, int, int, int], dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Random q (B, T, H, D), k and v (B, S, G, D) for (B, T, S, G, group, D)."""
    rows, new, keys, kv, group, width = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    q = 1.5 * draw(rows, new, kv * group, width)
    return q, draw(rows, keys, kv, width), draw(rows, keys, kv, width)


def close(fast: Tensor, slow: Tensor, truth: Tensor) -> None:
    """error(fast) <= 2 error(slow) + 4 eps max|truth|, both against float64."""
    assert torch.isfinite(fast).all(), "not finite"
    allowed = 2 * (slow.double() - truth).abs().max()
    allowed += 4 * torch.finfo(fast.dtype).eps * truth.abs().max()
    error = (fast.double() - truth).abs().max()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def gradients(
    attend, q: Tensor, k: Tensor, v: Tensor, weight: Tensor, **rest: object
) -> list[Tensor]:
    """Output and gradients to q, k, v of sum(attend(...) * weight)."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out = attend(q, k, v, **rest)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), (q, k, v))]


def compare(fast, q: Tensor, k: Tensor, v: Tensor, *, sparse: SparseConfig) -> None:
    """`fast` against the reference, forward and gradients; the truth uses the same summaries."""
    weight = torch.randn(q.shape, generator=torch.Generator().manual_seed(9)).to(q.dtype)
    summaries = reference.summarise(k, sparse)
    found = gradients(fast, q, k, v, weight, sparse=sparse)
    slow = gradients(reference.attend, q, k, v, weight, sparse=sparse, summaries=summaries)
    wide = tuple(x.double() for x in summaries)
    inputs = [x.double() for x in (q, k, v, weight)]
    truth = gradients(reference.attend, *inputs, sparse=sparse, summaries=wide)
    for one, two, three in zip(found, slow, truth):
        close(one, two, three)
