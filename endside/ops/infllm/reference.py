"""InfLLM v2 in plain PyTorch, equation by equation: the specification of every faster path.

Each query chooses, per key/value head, a fixed number of key blocks, and ordinary causal softmax
attention runs over their union (InfLLM-V2, arXiv 2509.24663; sections are those of infllmv2):

    compress   k1_j = mean(k[16 j : 16 j + 32]), k2_m = mean(k[64 m : 64 m + 128])       (§2, Eq. 4)
    score      s_j  = sum over the heads h of a group of exp(c q_h.k1_j - LSE_h)         (§3, Eq. 6)
               LSE_h = log sum_m exp(c q_h.k2_m)   over k2 ("coarse") or over k1 ("exact")
    pool       S_B  = max of s_j over the summaries that touch block B                   (§4)
    choose     initial and local blocks, then the best S_B up to the budget              (§5)
    attend     softmax(c q.k) v over the chosen blocks, never past the query             (§6)

with c = D^-1/2 and 16, 32, 64, 128 as released. Choosing carries no gradient: q, k and v learn only
through the attended pairs (§7). The switch is per query: position p is sparse iff
p + 1 >= dense_len, whatever forward it came in; a dense query sees its whole past.

Everything is computed in fp32 (float64 for float64 input) and scores are never rounded to the model
dtype, so that block choices do not depend on it. Not done here: saving memory. All scores exist at
once, so this is for tests and for lengths of a few thousand tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from endside.ops.infllm import geometry
from endside.ops.infllm.config import SparseConfig

Summaries = tuple[torch.Tensor, torch.Tensor]


def wide(x: torch.Tensor) -> torch.Tensor:
    """x in the type of the arithmetic: float64 stays, all else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def compress(k: torch.Tensor, size: int, stride: int) -> torch.Tensor:
    """Means of k (B, S, G, D) over windows of `size` = 2 `stride` every `stride` -> (B, N, G, D).

    Only complete windows count. Additions come in one fixed order (neighbouring pairs inside each
    stride, then two strides), so that pooling new windows one by one gives the same bits as pooling
    all of them at once.
    """
    assert size == 2 * stride, f"windows of {size} every {stride} do not overlap by half"
    strides = k.shape[1] // stride
    x = wide(k[:, : strides * stride]).unflatten(1, (strides, stride))
    while x.shape[2] > 1:
        even = x.shape[2] // 2 * 2
        x = torch.cat([x[:, :, 0:even:2] + x[:, :, 1:even:2], x[:, :, even:]], dim=2)
    halves = x[:, :, 0]
    return ((halves[:, :-1] + halves[:, 1:]) / size).to(k.dtype)


def summarise(k: torch.Tensor, sparse: SparseConfig) -> Summaries:
    """Both scales of k (B, S, G, D): k1 (B, N1, G, D) and k2 (B, N2, G, D)."""
    return (
        compress(k, sparse.kernel_size, sparse.kernel_stride),
        compress(k, sparse.coarse_size, sparse.coarse_stride),
    )


def fine_scores(
    q: torch.Tensor,
    k1: torch.Tensor,
    k2: torch.Tensor,
    *,
    positions: torch.Tensor,
    sparse: SparseConfig,
) -> torch.Tensor:
    """Scores of every fine summary -> (B, G, T, N1), 0 where it is not visible.

    q (B, T, H, D), k1 (B, N1, G, D), k2 (B, N2, G, D), positions (T,).
    """
    q, k1, k2 = wide(q), wide(k1), wide(k2)
    grouped = q.unflatten(2, (k1.shape[2], -1)) * q.shape[-1] ** -0.5  # (B, T, G, H / G, D)
    fine = torch.einsum("btghd,bngd->bghtn", grouped, k1)
    fine_seen = _before(geometry.visible_fine(positions, sparse), k1.shape[1])
    if sparse.lse == "exact":
        normaliser = fine.masked_fill(~fine_seen, -torch.inf).logsumexp(-1)
    else:
        coarse = torch.einsum("btghd,bngd->bghtn", grouped, k2)
        coarse_seen = _before(geometry.visible_coarse(positions, sparse), k2.shape[1])
        normaliser = coarse.masked_fill(~coarse_seen, -torch.inf).logsumexp(-1)
    # a query that sees no summary has no normaliser: it scores 0 everywhere
    normaliser = normaliser.masked_fill(normaliser == -torch.inf, torch.inf)
    scores = (fine - normaliser.unsqueeze(-1)).exp()
    return scores.masked_fill(~fine_seen, 0).sum(2)


def _before(counts: torch.Tensor, size: int) -> torch.Tensor:
    """(T, size) bool: column j is before counts[t]."""
    return torch.arange(size, device=counts.device) < counts.unsqueeze(-1)


def pool(scores: torch.Tensor, *, length: int, sparse: SparseConfig) -> torch.Tensor:
    """Best score among the summaries that touch each block: (B, G, T, N1) -> (B, G, T, N).

    A block that no complete summary touches gets -inf; only the last one can be.
    """
    columns = []
    for block in range(geometry.block_count(length, sparse)):
        start, stop = geometry.pool_range(block, scores.shape[-1], sparse)
        empty = scores.new_full(scores.shape[:-1], -torch.inf)
        columns.append(scores[..., start:stop].amax(-1) if start < stop else empty)
    return torch.stack(columns, dim=-1)


def choose(
    block_scores: torch.Tensor, *, positions: torch.Tensor, sparse: SparseConfig
) -> torch.Tensor:
    """Blocks each query attends to: (B, G, T, N) scores -> (B, G, T, K) int32, K = min(total, N).

    Ascending, initial and local blocks included, -1 (empty) last. Equal scores: lower block first.
    """
    count = block_scores.shape[-1]
    blocks = torch.arange(count, device=block_scores.device)
    own = (positions // sparse.block_size).unsqueeze(-1)  # (T, 1)
    initial = (blocks < sparse.init_blocks).expand(own.shape[0], count)
    local = (blocks >= geometry.first_local(own, sparse)) & (blocks <= own)
    if sparse.selection == "4.1":
        # one list holds everything: forced blocks come first, then scores
        ranked, slots = block_scores.masked_fill(initial | local, torch.inf), sparse.total_blocks
        taken = _best(ranked, slots) & (blocks <= own)
    else:
        # the list holds initial and chosen blocks; the window is added afterwards
        ranked = block_scores.masked_fill(initial, torch.inf).masked_fill(local, -torch.inf)
        taken = _best(ranked, sparse.topk) & (blocks < own) | local
    kept = torch.where(taken, blocks, count).sort(-1).values[..., : sparse.total_blocks]
    return kept.masked_fill(kept == count, -1).int()


def _best(scores: torch.Tensor, slots: int) -> torch.Tensor:
    """Bool mask of the `slots` highest scores of the last axis, the lower index first on ties."""
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., :slots]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, True)


def visible(
    blocks: torch.Tensor, *, positions: torch.Tensor, length: int, sparse: SparseConfig
) -> torch.Tensor:
    """Keys each query attends to: chosen blocks (B, G, T, K) -> bool (B, G, T, S)."""
    count = geometry.block_count(length, sparse)
    # empty slots are written to one column past the end, which is cut off
    slots = blocks.long().masked_fill(blocks < 0, count)
    chosen = torch.zeros(*blocks.shape[:-1], count + 1, dtype=torch.bool, device=blocks.device)
    chosen = chosen.scatter(-1, slots, True)[..., :count]
    keys = chosen.repeat_interleave(sparse.block_size, dim=-1)[..., :length]
    dense = (positions < sparse.first_sparse(length)).unsqueeze(-1)
    causal = torch.arange(length, device=blocks.device) <= positions.unsqueeze(-1)
    return (keys | dense) & causal


def chosen_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    sparse: SparseConfig,
    summaries: Summaries | None = None,
) -> torch.Tensor:
    """Score, pool and choose for the last T of S keys -> (B, G, T, K) int32."""
    length = k.shape[1]
    positions = torch.arange(length - q.shape[1], length, device=q.device)
    with torch.no_grad():
        k1, k2 = summarise(k, sparse) if summaries is None else summaries
        k1, k2 = k1[:, : sparse.fine_count(length)], k2[:, : sparse.coarse_count(length)]
        scores = fine_scores(q, k1, k2, positions=positions, sparse=sparse)
        return choose(
            pool(scores, length=length, sparse=sparse), positions=positions, sparse=sparse
        )


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
    length, groups = k.shape[1], k.shape[2]
    positions = torch.arange(length - q.shape[1], length, device=q.device)
    blocks = chosen_blocks(q, k, sparse=sparse, summaries=summaries)
    seen = visible(blocks, positions=positions, length=length, sparse=sparse)
    grouped = wide(q).unflatten(2, (groups, -1))  # (B, T, G, H / G, D)
    logits = torch.einsum("btghd,bsgd->bghts", grouped, wide(k)) * q.shape[-1] ** -0.5
    weights = logits.masked_fill(~seen.unsqueeze(2), -torch.inf).softmax(-1)
    out = torch.einsum("bghts,bsgd->btghd", weights, wide(v))
    return out.flatten(2, 3).to(q.dtype)


def ragged(
    attend_rows: Callable[..., torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    sparse: SparseConfig,
    summaries: Summaries | None,
    lengths: Sequence[int],
) -> torch.Tensor:
    """Run `attend_rows` once per row, each cut to its own number of keys -> (B, T, H, D)."""
    rows = []
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        own = None if summaries is None else (summaries[0][one], summaries[1][one])
        rows.append(
            attend_rows(q[one], k[one, :length], v[one, :length], sparse=sparse, summaries=own)
        )
    return torch.cat(rows)
