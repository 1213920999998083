"""Causal attention of packed documents as plain products of matrices, for training on a CPU.

Same meaning as reference.py. A tile of queries and the keys that it can see are two products with a
softmax between, five backward; the core does what is between them in one pass. PyTorch's fused
kernel spares the scores their way through memory, which on a CPU is only the cache, and multiplies
in small blocks, which leave matrix units idle.

    S = q k^T    P = softmax(S / sqrt(D))    o = P v
    dv = P^T do    dP = do v^T    dS = P (dP - rowsum(o do)) / sqrt(D)    dq = dS k    dk = dS^T q

Kept for the backward pass are q, k, v, o and one number a query and head. Scores and dP are float32
in bfloat16 too: their differences are what the gradient is made of.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from endside.ops.attention import sdpa
from endside.ops.attention.packing import Packing, Tile, packing
from endside.ops.passes import address, narrow, run


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    documents: torch.Tensor | Packing | None = None,
) -> torch.Tensor:
    """q (B, T, H, D), k and v (B, S, G, D), rotated and unscaled -> (B, T, H, D).

    Queries behind stored keys are no training and go to sdpa.py.
    """
    if q.shape[1] != k.shape[1]:
        return sdpa.attend(q, k, v, None if documents is None else packing(documents).documents)
    if documents is None:
        documents = torch.zeros(q.shape[:2], dtype=torch.int64)
    return _Attend.apply(q, k, v, packing(documents).tiles)


class _Attend(torch.autograd.Function):
    """q (B, T, H, D), k and v (B, T, G, D) -> (B, T, H, D)."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tiles: list[Tile]
    ) -> torch.Tensor:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        logs = []
        with torch.autocast("cpu", enabled=False):
            for tile in tiles:
                states, keys, values = _grouped(q, k, v, tile)
                scores = torch.bmm(states.float(), keys.float().mT)
                weights = torch.empty_like(scores, dtype=q.dtype)
                lse = scores.new_empty(scores.shape[:2])
                places = [address(t) for t in (scores, tile.first, tile.end, weights, lse)]
                run("softmax_forward", *places, *_sizes(q, scores, tile), narrow(weights))
                _set(out, torch.bmm(weights, values), tile)
                logs.append(lse)
        ctx.save_for_backward(q, k, v, out, *logs)
        ctx.tiles = tiles
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, *logs = ctx.saved_tensors
        to_q = torch.empty_like(q, memory_format=torch.contiguous_format)
        to_k, to_v = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (k, v))
        for tile, lse in zip(ctx.tiles, logs, strict=True):
            states, keys, values = _grouped(q, k, v, tile)
            above = _folded(dout, tile, k.shape[2])
            mean = (above.float() * _folded(out, tile, k.shape[2])).sum(-1)
            scores = torch.bmm(states.float(), keys.float().mT)
            to_weights = torch.bmm(above.float(), values.float().mT)
            weights, to_scores = (torch.empty_like(scores, dtype=q.dtype) for _ in range(2))
            places = (scores, to_weights, lse, mean, tile.first, tile.end, weights, to_scores)
            sizes = _sizes(q, scores, tile)
            run("softmax_backward", *(address(t) for t in places), *sizes, narrow(weights))
            _set(to_q, torch.bmm(to_scores, keys), tile)
            span = slice(tile.begin, tile.stop)
            to_k[tile.row, span] += torch.bmm(to_scores.mT, states).transpose(0, 1)
            to_v[tile.row, span] += torch.bmm(weights.mT, above).transpose(0, 1)
        return to_q, to_k, to_v, None


def _folded(x: torch.Tensor, tile: Tile, groups: int) -> torch.Tensor:
    """x (B, T, H, D) -> the tile's queries (G, H / G n, D), heads of a group one after another."""
    part = x[tile.row, tile.start : tile.stop].transpose(0, 1)
    return part.reshape(groups, -1, x.shape[3])


def _grouped(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tile: Tile
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries (G, H / G n, D), keys and values (G, s, D) of a tile."""
    seen = [x[tile.row, tile.begin : tile.stop].transpose(0, 1) for x in (k, v)]
    return _folded(q, tile, k.shape[2]), seen[0], seen[1]


def _set(out: torch.Tensor, part: torch.Tensor, tile: Tile) -> None:
    """Put (G, H / G n, D) back into (B, T, H, D)."""
    heads, width = out.shape[2:]
    out[tile.row, tile.start : tile.stop] = part.view(heads, -1, width).transpose(0, 1)


def _sizes(q: torch.Tensor, scores: torch.Tensor, tile: Tile) -> tuple[int, int, int, float]:
    """H, n, s and the scale."""
    return q.shape[2], tile.stop - tile.start, scores.shape[2], q.shape[3] ** -0.5
