"""InfLLM v2 on a GPU: compress, choose and attend in Triton, with the signatures of `reference.py`.

    layout.py           the table of sequences and the tiles all kernels share
    compress.py         means of keys                         select.py    the fused selector
    sparse_forward.py   common blocks, then chosen ones       decode.py    split over blocks
    sparse_backward.py  dq by query, dk and dv by key block   autograd.py  both joined

No step asks the device for a value, so a call can be captured in a graph; `lengths` may then be a
device tensor that changes between replays.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from endside.errors import UserError
from endside.ops.infllm import geometry
from endside.ops.infllm.config import SparseConfig
from endside.ops.infllm.triton import decode as split
from endside.ops.infllm.triton.autograd import SparseAttention, choose
from endside.ops.infllm.triton.compress import compress
from endside.ops.infllm.triton.layout import (
    Heads,
    Sequences,
    addressable,
    batch_table,
    heads_of,
    packed_table,
    row_stride,
    to_device,
)

__all__ = ["attend", "attend_packed"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    sparse: SparseConfig,
    summaries: tuple[Tensor, Tensor] | None = None,
    lengths: Sequence[int] | Tensor | None = None,
) -> Tensor:
    """Attention of T new tokens over S keys: q (B, T, H, D), k, v (B, S, G, D) -> (B, T, H, D).

    Query t stands at position lengths[row] - T + t. `summaries` are (k1, k2) of all keys, pooled
    from k when not given. `lengths`: real keys per row, all S when not given; an int32 tensor on
    the device is never read by the host.
    """
    known = None if isinstance(lengths, Tensor) else lengths
    geometry.check(q, k, v, sparse=sparse, summaries=summaries, lengths=known)
    heads = _heads(q, k, sparse)
    (q,) = addressable(q) if _flat(q) else (q.contiguous(),)
    k, v = addressable(k, v)
    rows = row_stride(k)
    if _training(q, k, v):
        # Gradients are laid out like contiguous keys.
        k, v = k.contiguous(), v.contiguous()
        rows = row_stride(k)
    stride = sparse.kernel_stride
    scales = (k.shape[1] // stride, k.shape[1] // (4 * stride))
    if summaries is not None:
        summaries = tuple(addressable(x)[0] for x in summaries)
        scales = tuple(row_stride(x) for x in summaries)
    table = batch_table(q, _key_counts(lengths, k), (rows, *scales), sparse)
    sequences = Sequences(table, q.shape[1], k.shape[1])
    return _run(q, k, v, summaries, sequences, heads=heads, sparse=sparse)


def attend_packed(
    q: Tensor, k: Tensor, v: Tensor, *, lengths: Sequence[int], sparse: SparseConfig
) -> Tensor:
    """Attention inside each of several packed documents: q (P, H, D), k, v (P, G, D) -> (P, H, D).

    Document i holds the next lengths[i] tokens; its positions start at 0.
    """
    if not (q.shape[0] == k.shape[0] == v.shape[0] == sum(lengths)) or min(lengths, default=0) < 1:
        raise UserError(
            f"attend: documents of {list(lengths)} tokens do not fill {q.shape[0]} queries, "
            f"{k.shape[0]} keys and {v.shape[0]} values: the lengths must be positive and sum to "
            "each"
        )
    q, k, v = q[None], k[None], v[None]
    geometry.check(q, k, v, sparse=sparse, summaries=None, lengths=None)
    longest = max(lengths)
    heads = heads_of(q, k, sparse, longest)
    q, k, v = (x.contiguous() for x in (q, k, v))
    sequences = Sequences(packed_table(lengths, sparse, q.device), longest, longest)
    return _run(q, k, v, None, sequences, heads=heads, sparse=sparse)[0]


def _heads(q: Tensor, k: Tensor, sparse: SparseConfig) -> Heads:
    if q.dtype not in DTYPES:
        raise UserError(
            f"attend: q is {q.dtype}: the Triton kernels take float32, float16 or bfloat16"
        )
    return heads_of(q, k, sparse, k.shape[1])


def _training(*tensors: Tensor) -> bool:
    """Whether a gradient will be asked for."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _flat(q: Tensor) -> bool:
    """Whether rows of all sequences of q (B, T, H, D) follow one another."""
    return q.shape[0] == 1 or q.stride(0) == q.shape[1] * q.stride(1)


def _key_counts(lengths: Sequence[int] | Tensor | None, k: Tensor) -> Tensor:
    """Keys of each row of k (B, S, G, D), on its device: (B,) int32."""
    if lengths is None:
        return torch.full((k.shape[0],), k.shape[1], dtype=torch.int32, device=k.device)
    if isinstance(lengths, Tensor):
        return lengths.to(torch.int32)
    return to_device(list(lengths), k.device)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    summaries: tuple[Tensor, Tensor] | None,
    sequences: Sequences,
    *,
    heads: Heads,
    sparse: SparseConfig,
) -> Tensor:
    """Pool if needed, choose, attend."""
    indices = None
    if sequences.keys > heads.first:
        with torch.no_grad():
            if summaries is None:
                fine = compress(k, sequences, sparse.kernel_stride, 4)
                summaries = fine, compress(k, sequences, sparse.coarse_stride, 5)
        indices = choose(q, summaries, sequences, heads=heads, coarse=sparse.lse == "coarse")
    if not _training(q, k, v) and sequences.count == q.shape[0] and q.shape[1] <= split.TOKENS:
        return split.decode(q, k, v, indices, sequences=sequences, heads=heads)
    return SparseAttention.apply(q, k, v, indices, sequences, heads)
