"""Grouped-query attention with rotary positions, dense or block-sparse, cached or not.

The layer projects, rotates and hands over; what a query may see is decided below it
(`ops.attention`, `ops.infllm`), and where keys live is the cache's business.
"""

from __future__ import annotations

import torch
from torch import nn

from endside.model.batch import Batch
from endside.model.cache import Cache
from endside.model.config import ModelConfig
from endside.model.linear import Linear, MakeLinear
from endside.ops import attention, infllm
from endside.ops.attention.packing import Packing
from endside.ops.rope.rotation import rotate


class Attention(nn.Module):
    """One attention layer; `layer` is its index in the cache."""

    def __init__(self, config: ModelConfig, layer: int, make_linear: MakeLinear = Linear) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        width, head = config.hidden_size, config.head_dim
        self.q_proj = make_linear(width, config.num_attention_heads * head)
        self.k_proj = make_linear(width, config.num_key_value_heads * head)
        self.v_proj = make_linear(width, config.num_key_value_heads * head)
        self.o_proj = make_linear(config.num_attention_heads * head, width)

    def forward(
        self,
        x: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        batch: Batch,
        cache: Cache | None,
    ) -> torch.Tensor:
        """x (B, T, C), rope (cos, sin) each (B, T, 1, D/2) -> (B, T, C)."""
        rows, new, _ = x.shape
        q, k, v = (
            project(x).view(rows, new, -1, self.config.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, *rope), rotate(k, *rope)
        if batch.seen is not None:
            assert cache is None and self.config.sparse is None, (
                "`seen` is for dense, uncached rows"
            )
            out = attention.attend_seen(q, k, v, batch.seen)
        elif cache is None:
            out = self._attend(q, k, v, batch.packing)
        else:
            out = self._attend_cached(q, k, v, batch, cache)
        return self.o_proj(out.reshape(rows, new, -1))

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        packing: Packing | None,
    ) -> torch.Tensor:
        sparse = self.config.sparse
        if sparse is None:
            return attention.attend(q, k, v, packing)
        if packing is None:
            return infllm.attend(q, k, v, sparse=sparse)
        if all(infllm.is_dense(length, sparse) for row in packing.lengths for length in set(row)):
            return attention.attend(q, k, v, packing)
        rows = [
            infllm.attend_packed(*one, lengths=lengths, sparse=sparse)
            for *one, lengths in zip(q, k, v, packing.lengths, strict=True)
        ]
        return torch.stack(rows)

    def _attend_cached(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch, cache: Cache
    ) -> torch.Tensor:
        outputs = []
        for row, seq in enumerate(batch.seqs):
            cache.append(self.layer, seq, k[row], v[row])
            keys, values = cache.view(self.layer, seq, k.shape[1])
            one = q[row : row + 1], keys[None], values[None]
            if self.config.sparse is None:
                outputs.append(attention.attend(*one))
            else:
                summaries = tuple(
                    part[None] for part in cache.summaries(self.layer, seq, k.shape[1])
                )
                outputs.append(infllm.attend(*one, sparse=self.config.sparse, summaries=summaries))
        return torch.cat(outputs)
