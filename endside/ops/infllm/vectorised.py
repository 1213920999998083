"""InfLLM v2 on the CPU with whole-tensor operations and bounded memory; the truth is reference.py.

Queries below the budget, or below the dense length, go through dense attention: there both are the
same. The others are taken in chunks. Per chunk, summaries are scored in tiles laid out as
(summary, head, query), so that summing heads and pooling summaries to blocks are additions and
maxima of whole rows; the chosen blocks then go to `blockwise.py`. Only summaries older than the
window are scored, since younger blocks are forced anyway (all of them where lse is "exact").

The best blocks are found by their threshold: everything above the k-th highest score, then the
lowest-numbered blocks that equal it. That is the tie rule of the reference without sorting.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from endside.ops.attention import sdpa as dense_attention
from endside.ops.infllm import geometry
from endside.ops.infllm.blockwise import TEMPORARY, BlockAttention, Chunk, arrange, attend_one
from endside.ops.infllm.config import SparseConfig
from endside.ops.infllm.reference import Summaries, ragged, summarise, wide

CHUNK = 512  # queries that share one pass over their chosen blocks


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    sparse: SparseConfig,
    summaries: Summaries | None = None,
    lengths: Sequence[int] | None = None,
) -> torch.Tensor:
    """Attention of T new tokens over S keys: q (B, T, H, D), k, v (B, S, G, D) -> (B, T, H, D).

    Query t stands at position S - T + t. `summaries` are (k1, k2) of all keys, pooled from k when
    not given; `lengths` gives each row's number of real keys when rows are padded at the end.
    """
    geometry.check(q, k, v, sparse=sparse, summaries=summaries, lengths=lengths)
    if lengths is not None:
        return ragged(attend, q, k, v, sparse=sparse, summaries=summaries, lengths=lengths)
    new, length = q.shape[1], k.shape[1]
    dense = min(max(geometry.first_chosen(length, sparse) - (length - new), 0), new)
    parts = []
    if dense:
        past = length - new + dense
        parts.append(dense_attention.attend(q[:, :dense], k[:, :past], v[:, :past]))
    if dense < new:
        parts.append(_attend_sparse(q[:, dense:], k, v, sparse=sparse, summaries=summaries))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _attend_sparse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    sparse: SparseConfig,
    summaries: Summaries | None,
) -> torch.Tensor:
    """`attend` for queries that all stand at or past the budget."""
    rows, new, _, width = q.shape
    groups = k.shape[2]
    # (B, T, H, D) -> (Z, T, I, D): one z per row and key head
    folded = wide(q).unflatten(2, (groups, -1)).transpose(1, 2).contiguous().flatten(0, 1)
    folded = folded * width**-0.5
    with torch.no_grad():
        scales = summarise(k, sparse) if summaries is None else summaries
        k1, k2 = (wide(x).transpose(1, 2).flatten(0, 1) for x in scales)
    if new == 1:
        taken = choose(folded.detach(), k1, k2, last=k.shape[1], sparse=sparse)
        out = attend_one(folded, k, v, taken, sparse)
    else:
        chunks = _chunks(folded.detach(), k1, k2, length=k.shape[1], sparse=sparse)
        out = BlockAttention.apply(folded, k, v, chunks, sparse)
    return out.unflatten(0, (rows, groups)).transpose(1, 2).reshape(q.shape).to(q.dtype)


def _chunks(
    q: torch.Tensor, k1: torch.Tensor, k2: torch.Tensor, *, length: int, sparse: SparseConfig
) -> list[Chunk]:
    """Choose blocks for q (Z, T, I, D), the last T of `length` positions, CHUNK at a time."""
    new, chunks = q.shape[1], []
    for start in range(0, new, CHUNK):
        stop = min(start + CHUNK, new)
        taken = choose(q[:, start:stop], k1, k2, last=length - new + stop, sparse=sparse)
        blocks = geometry.block_count(length, sparse)
        chunks.append(Chunk(start, stop, arrange(taken, group=q.shape[2], blocks=blocks)))
    return chunks


def choose(
    q: torch.Tensor, k1: torch.Tensor, k2: torch.Tensor, *, last: int, sparse: SparseConfig
) -> torch.Tensor:
    """Blocks before the window that queries attend to: initial and best ones -> (Z, T, N) bool.

    q (Z, T, I, D) scaled, at the positions up to `last` - 1; k1 (Z, N1, D), k2 (Z, N2, D). N covers
    the blocks before the last query's window.
    """
    new, group = q.shape[1:3]
    positions = torch.arange(last - new, last)
    local = geometry.first_local(positions // sparse.block_size, sparse)  # (T,)
    count = int(local[-1])
    free = geometry.free_blocks(sparse)
    blocks = torch.arange(count)
    taken = (blocks < sparse.init_blocks).expand(q.shape[0], new, count).clone()
    if not free:
        return taken
    fine = geometry.visible_fine(last - 1, sparse)
    tile = max(1, TEMPORARY // (q.shape[0] * fine * group))
    for start in range(0, new, tile):
        part = slice(start, min(start + tile, new))
        scores = _block_scores(q[:, part], k1, k2, positions=positions[part], sparse=sparse)
        free_to_choose = (blocks >= sparse.init_blocks) & (blocks < local[part].unsqueeze(1))
        padded = F.pad(scores.transpose(1, 2), (0, count - scores.shape[1]))
        taken[:, part] |= best(padded.masked_fill(~free_to_choose, -torch.inf), free)
    return taken


def _block_scores(
    q: torch.Tensor,
    k1: torch.Tensor,
    k2: torch.Tensor,
    *,
    positions: torch.Tensor,
    sparse: SparseConfig,
) -> torch.Tensor:
    """Pooled scores (Z, N, T) of blocks before the last query's window; q (Z, T, I, D) scaled."""
    z, new, group, width = q.shape
    last = int(positions[-1])
    count = geometry.first_local(last // sparse.block_size, sparse)
    seen = geometry.visible_fine(positions, sparse)
    # (Z, D, I T): heads outside, queries inside
    columns = q.permute(0, 3, 2, 1).reshape(z, width, group * new)
    needed = int(seen[-1]) if sparse.lse == "exact" else min(4 * count, int(seen[-1]))
    scores = torch.bmm(k1[:, :needed], columns).view(z, needed, group, new)
    _hide(scores, seen)
    if sparse.lse == "exact":
        normaliser = scores.logsumexp(1, keepdim=True)
    else:
        coarse_seen = geometry.visible_coarse(positions, sparse)
        coarse = torch.bmm(k2[:, : int(coarse_seen[-1])], columns).view(z, -1, group, new)
        normaliser = _hide(coarse, coarse_seen).logsumexp(1, keepdim=True)
    summed = scores.sub_(normaliser).exp_().sum(2)  # (Z, needed, T)
    return _pool(summed[:, : 4 * count])


def _hide(scores: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Set scores (Z, N, I, T) of summaries at or past seen (T,) to -inf, in place."""
    start = min(int(seen[0]), scores.shape[1])
    tail = torch.arange(start, scores.shape[1])
    scores[:, start:].masked_fill_((tail.unsqueeze(1) >= seen).unsqueeze(1), -torch.inf)
    return scores


def _pool(scores: torch.Tensor) -> torch.Tensor:
    """Maximum over the summaries 4 B - 1 .. 4 B + 3 of each block: (Z, N1, T) -> (Z, N, T)."""
    inside = F.pad(scores, (0, 0, 0, -scores.shape[1] % 4)).unflatten(1, (-1, 4)).amax(2)
    before = scores[:, 3 : 4 * inside.shape[1] - 4 : 4]
    inside[:, 1:] = torch.maximum(inside[:, 1:], before)
    return inside


def best(scores: torch.Tensor, slots: int) -> torch.Tensor:
    """Bool mask of the `slots` highest scores of the last axis, the lower index first on ties."""
    threshold = scores.topk(slots, sorted=False).values.amin(-1, keepdim=True)
    kept = scores >= threshold
    crowded = kept.sum(-1) > slots
    if crowded.any():
        equal = scores[crowded] == threshold[crowded]
        above = kept[crowded] & ~equal
        room = slots - above.sum(-1, keepdim=True)
        kept[crowded] = above | (equal & (equal.cumsum(-1) <= room))
    return kept
