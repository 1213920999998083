"""Causal attention inside each of the documents packed in a row, without a mask of the whole row.

Same meaning as reference.py. A document of n tokens costs n^2 instead of its part of T^2: rows are
split where documents begin, each is attended on its own through PyTorch's fused causal kernel, and
short neighbours share one call and one mask of at most TILE tokens, so that many small documents
are not many calls. Rows that short are one call together. On CUDA in half precision varlen.py does
all of it in one launch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from endside.ops.attention import sdpa
from endside.ops.attention.packing import Packing, packing
from endside.ops.attention.reference import mask

TILE = 256  # tokens up to which neighbours share a call (bench/packed_attention.py)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    documents: torch.Tensor | Packing | None = None,
) -> torch.Tensor:
    """q (B, T, H, D), k and v (B, S, G, D), rotated and unscaled -> (B, T, H, D)."""
    if documents is None:
        return sdpa.attend(q, k, v)
    packed = packing(documents)
    new = q.shape[1]
    if new != k.shape[1] or new <= TILE:
        return sdpa.attend(q, k, v, packed.documents)
    if all(len(row) == 1 for row in packed.lengths):
        return sdpa.attend(q, k, v)
    groups = [group for row in packed.lengths for group in _neighbours(row)]
    sizes = [sum(group) for group in groups]
    pieces = [x.flatten(0, 1).split(sizes) for x in (q, k, v)]  # each (n, H or G, D)
    owners = packed.documents.flatten().split(sizes)
    out = [
        _attend_group(*heads, owner=None if len(group) == 1 else owner)
        for group, owner, *heads in zip(groups, owners, *pieces, strict=True)
    ]
    return torch.cat(out).view(q.shape)


def _neighbours(lengths: list[int]) -> list[list[int]]:
    """The documents of a row in groups of up to TILE tokens; longer ones stand alone."""
    groups: list[list[int]] = []
    for length in lengths:
        if groups and sum(groups[-1]) + length <= TILE:
            groups[-1].append(length)
        else:
            groups.append([length])
    return groups


def _attend_group(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, owner: torch.Tensor | None
) -> torch.Tensor:
    """q (n, H, D), k and v (n, G, D) of one document, or of the several that `owner` numbers."""
    heads = [x[None].transpose(1, 2) for x in (q, k, v)]
    if owner is None:
        out = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
    else:
        seen = mask(len(q), len(q), owner[None], q.device)
        out = F.scaled_dot_product_attention(*heads, attn_mask=seen, enable_gqa=True)
    return out.transpose(1, 2)[0]
