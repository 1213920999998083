"""Forward and backward of InfLLM v2 joined for autograd: nothing but q, k, v gets a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from endside.ops.infllm.triton.layout import Heads, Sequences
from endside.ops.infllm.triton.select import select
from endside.ops.infllm.triton.sparse_backward import backward
from endside.ops.infllm.triton.sparse_forward import add_chosen, common


class SparseAttention(torch.autograd.Function):
    """Attention of q (B, T, H, D) over k, v (B, S, G, D); indices (P, G, K) or None (all dense)."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        indices: Tensor | None,
        sequences: Sequences,
        heads: Heads,
    ) -> Tensor:
        out, lse = common(q, k, v, sequences, heads)
        if indices is not None:
            add_chosen(q, k, v, out, lse, indices=indices, sequences=sequences, heads=heads)
        ctx.save_for_backward(q, k, v, out, lse, indices)
        ctx.sequences, ctx.heads = sequences, heads
        return out

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, dout: Tensor
    ) -> tuple[Tensor | None, ...]:
        grads = backward(dout, ctx.saved_tensors, sequences=ctx.sequences, heads=ctx.heads)
        return (*grads, None, None, None)


def choose(
    q: Tensor, summaries: tuple[Tensor, Tensor], sequences: Sequences, *, heads: Heads, coarse: bool
) -> Tensor | None:
    """Chosen blocks (P, G, K), or None where no position is sparse. No gradient."""
    if sequences.keys <= heads.first:
        return None
    with torch.no_grad():
        return select(q, *summaries, sequences, heads=heads, coarse=coarse)
