"""InfLLM v2: compress, score, choose, attend. `reference.py` is the place to read first.

    config.py      sizes and conventions
    geometry.py    which summaries and blocks a position sees
    reference.py   the truth, plain PyTorch
    vectorised.py  the CPU path: choice, dense part; blockwise.py its block-sparse part
    triton/        the GPU path

Nothing is imported before it is used: the configuration is read where no tensor library is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING

from endside.errors import UserError
from endside.ops.infllm.geometry import AttendStats, attend_stats, is_dense

if TYPE_CHECKING:
    import torch

    from endside.ops.infllm.config import SparseConfig

__all__ = ["AttendStats", "attend", "attend_packed", "attend_stats", "compress", "is_dense"]

IMPLEMENTATIONS = ("reference", "vectorised", "triton")


def compress(k: torch.Tensor, size: int, stride: int) -> torch.Tensor:
    """Means of k (B, S, G, D) over complete windows of `size` every `stride` -> (B, N, G, D)."""
    from endside.ops.infllm.reference import compress

    return compress(k, size, stride)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    sparse: SparseConfig,
    summaries: tuple[torch.Tensor, torch.Tensor] | None = None,
    lengths: Sequence[int] | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """Attention of T new tokens over S keys: q (B, T, H, D), k, v (B, S, G, D) -> (B, T, H, D).

    Query t stands at position S - T + t and is sparse from `sparse.dense_len` on. `summaries` are
    (k1 (B, N1, G, D), k2 (B, N2, G, D)) of all keys, pooled from k when not given. `lengths` gives
    each row's real keys when k is padded at the end. `impl` None: triton on CUDA, else vectorised.
    """
    name = impl or ("triton" if q.is_cuda else "vectorised")
    if name not in IMPLEMENTATIONS:
        raise UserError(
            f"attend: impl {name!r} does not exist: use one of {', '.join(IMPLEMENTATIONS)}"
        )
    import torch

    run = import_module(f"endside.ops.infllm.{name}").attend
    # The operation chooses its own numbers: autocast would round the sums inside it.
    with torch.autocast(q.device.type, enabled=False):
        return run(q, k, v, sparse=sparse, summaries=summaries, lengths=lengths)


def attend_packed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    lengths: Sequence[int],
    sparse: SparseConfig,
    impl: str | None = None,
) -> torch.Tensor:
    """Attention inside each of several documents packed in one row: q (P, H, D), k, v (P, G, D).

    Document i holds the next lengths[i] tokens; its positions start at 0, and neither its keys nor
    its summaries reach into another. Returns (P, H, D).
    """
    import torch

    if not (q.shape[0] == k.shape[0] == v.shape[0] == sum(lengths)) or min(lengths, default=0) < 1:
        raise UserError(
            f"attend: documents of {list(lengths)} tokens do not fill a row of {q.shape[0]} "
            f"queries, {k.shape[0]} keys and {v.shape[0]} values: "
            "the lengths must be positive and sum to each"
        )
    if (impl or ("triton" if q.is_cuda else "")) == "triton":
        from endside.ops.infllm import triton

        return triton.attend_packed(q, k, v, lengths=lengths, sparse=sparse)
    out, start = [], 0
    for length in lengths:
        part = slice(start, start + length)
        document = (x[part].unsqueeze(0) for x in (q, k, v))
        out.append(attend(*document, sparse=sparse, impl=impl).squeeze(0))
        start += length
    return torch.cat(out)
