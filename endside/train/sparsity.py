"""How much of the past block-sparse attention looks at while it trains, logged as `visible`.

A run that says "sparse" and whose documents are shorter than `dense_len`, or than the budget, is
dense; the share of keys seen tells. 1 means that sparsity does not act.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from endside.data.loader import PADDING, TokenBatch
from endside.ops.infllm.config import SparseConfig
from endside.ops.infllm.geometry import attend_stats
from endside.train.losses import Loss, LossFn


def visible_logged(loss_fn: LossFn, sparse: SparseConfig | None) -> LossFn:
    """`loss_fn`, whose parts also tell the visible share; itself where attention is dense."""
    if sparse is None:
        return loss_fn
    known: dict[int, float] = {}

    def logged(model: nn.Module, batch: TokenBatch) -> Loss:
        loss = loss_fn(model, batch)
        share = visible_share(batch.documents[:, :-1], sparse, known)
        visible = torch.tensor(share, device=loss.targets.device)
        return replace(loss, parts={**loss.parts, "visible": visible})

    return logged


def visible_share(
    documents: torch.Tensor, sparse: SparseConfig, known: dict[int, float] | None = None
) -> float:
    """Keys seen over keys there are, of documents (B, T); known: seen by documents of a length."""
    known = {} if known is None else known
    seen = there = 0.0
    for row in documents.cpu():
        owners, lengths = torch.unique_consecutive(row, return_counts=True)
        for length in lengths[owners != PADDING].tolist():
            if length not in known:
                known[length] = attend_stats(length, length, sparse).visible * length
            seen += known[length]
            there += length * (length + 1) / 2
    return seen / max(there, 1.0)
