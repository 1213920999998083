"""Block-sparse attention, forward, in Triton: a dense pass and a pass over the chosen blocks.

The initial and the local blocks (34 of 96) are the same for every query of a block, so the first
kernel runs them as dense attention over wide tiles of tokens x heads; queries before the switch
simply have a local range that starts at block 0. It leaves its output and its log2-sum-exp2.

The chosen blocks (62 of 96) differ from token to token. A tile of 64 rows, four tokens of the
published models, walks the *union* of its tokens' choices, each block with a bit per token that
tells who chose it. The rows are cheap, since a smaller tile would leave the matrix unit half empty,
and neighbours that agree share the reading of the keys, which is what limits this pass. The state
of the online softmax starts from the dense pass,

    m = LSE, l = 1, acc = out,

which is merging by log-sum-exp; the result replaces the output in place.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from endside.ops.infllm.triton.layout import (
    LOG2E,
    Heads,
    Sequences,
    load_keys,
    load_rows,
    precision,
    sequence,
    tile_rows,
)

LOWEST = tl.constexpr(-1.0e30)
NONE = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _attend_block(acc, top, total, scores, values, PRECISION: tl.constexpr):
    """One step of the online softmax with the scores of a block, in units of log2."""
    high = tl.maximum(top, tl.max(scores, 1))
    p = tl.exp2(scores - high[:, None])
    keep = tl.exp2(top - high)
    total = total * keep + tl.sum(p, 1)
    acc = tl.dot(p.to(values.dtype), values, acc * keep[:, None], input_precision=PRECISION)
    return acc, high, total


@triton.jit
def _common_forward(q, k, v, out, lse, table, scale, q_t, q_h, k_t, k_h, v_t, v_h, H,
                    GROUP: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
                    BLOCK: tl.constexpr, D: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr,
                    PRECISION: tl.constexpr):  # fmt: skip
    g = tl.program_id(1)
    shift, past, keys, k_row, first = sequence(table, tl.program_id(2))
    # Late tiles of dense queries take longest: they start first.
    start = (past // TOKENS + tl.num_programs(0) - 1 - tl.program_id(0)) * TOKENS
    if start >= keys:
        return
    _, position, head, real = tile_rows(start, past, keys, g, TOKENS, GROUP, HEADS)
    d = tl.arange(0, D)
    n = tl.arange(0, BLOCK)
    row = (shift + position).to(tl.int64)
    queries = load_rows(q, row, head, real, q_t, q_h, D)
    acc = tl.zeros([TOKENS * HEADS, D], tl.float32)
    top = tl.full([TOKENS * HEADS], LOWEST, tl.float32)
    total = tl.zeros([TOKENS * HEADS], tl.float32)

    own = start // BLOCK
    dense = position < first
    # Blocks some rows do not see: the initial ones, and, in a tile with both kinds of rows, all
    # before the window.
    local = tl.where(start + TOKENS > first, own - LOCAL + 1, 0)
    partial = tl.where(start + TOKENS > first, tl.where(start < first, local, INIT), 0)
    for block in range(0, partial):
        kb = load_keys(k, k_row + block * BLOCK, BLOCK, k_t, g * k_h, BLOCK, D, False)
        s = tl.dot(queries, tl.trans(kb), input_precision=PRECISION) * scale
        s = tl.where((dense | (block < INIT))[:, None], s, LOWEST * 2)
        vb = load_keys(v, k_row + block * BLOCK, BLOCK, v_t, g * v_h, BLOCK, D, False)
        acc, top, total = _attend_block(acc, top, total, s, vb, PRECISION)
    for block in range(local, own):
        kb = load_keys(k, k_row + block * BLOCK, BLOCK, k_t, g * k_h, BLOCK, D, False)
        s = tl.dot(queries, tl.trans(kb), input_precision=PRECISION) * scale
        vb = load_keys(v, k_row + block * BLOCK, BLOCK, v_t, g * v_h, BLOCK, D, False)
        acc, top, total = _attend_block(acc, top, total, s, vb, PRECISION)
    kb = load_keys(k, k_row + own * BLOCK, keys - own * BLOCK, k_t, g * k_h, BLOCK, D, True)
    s = tl.dot(queries, tl.trans(kb), input_precision=PRECISION) * scale
    s = tl.where((own * BLOCK + n)[None, :] <= position[:, None], s, LOWEST * 2)
    vb = load_keys(v, k_row + own * BLOCK, keys - own * BLOCK, v_t, g * v_h, BLOCK, D, True)
    acc, top, total = _attend_block(acc, top, total, s, vb, PRECISION)

    to = (row * H + head)[:, None] * D + d[None, :]
    tl.store(out + to, (acc / total[:, None]).to(out.dtype.element_ty), mask=real[:, None])
    tl.store(lse + row * H + head, top + tl.log2(total), mask=real)


@triton.jit
def _union(
    indices, union, counts, table, G, FREE: tl.constexpr, KEEP: tl.constexpr, TOKENS: tl.constexpr
):
    """Sorted union of a tile's chosen blocks: block * 2^TOKENS + (who chose it), and its size."""
    g = tl.program_id(1)
    shift, past, keys, _, first = sequence(table, tl.program_id(2))
    start = (past // TOKENS + tl.program_id(0)) * TOKENS
    tile = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)) * G + g
    size: tl.constexpr = TOKENS * KEEP
    if (start >= keys) | (start + TOKENS <= first):
        tl.store(counts + tile, 0)
        return
    entry = tl.arange(0, size)
    token = entry // KEEP
    position = start + token
    slot = entry % KEEP
    real = (position >= past) & (position < keys) & (slot < FREE)
    block = tl.load(
        indices + ((shift + position).to(tl.int64) * G + g) * FREE + slot, mask=real, other=-1
    )
    key = tl.sort(tl.where(block < 0, NONE, block * TOKENS + token))
    block = key // TOKENS
    before = tl.gather(key, tl.maximum(entry - 1, 0), 0) // TOKENS
    leads = (key != NONE) & ((entry == 0) | (before != block))
    bits = 1 << (key % TOKENS)
    for i in tl.static_range(1, TOKENS):
        other = tl.gather(key, tl.minimum(entry + i, size - 1), 0)
        same = (other // TOKENS == block) & (entry + i < size)
        bits |= tl.where(same, 1 << (other % TOKENS), 0)
    at = tl.cumsum(leads.to(tl.int32), 0) - 1
    # Only leading entries are stored; the shift of the others, which may overflow, is never read.
    packed = tl.where(leads, block, 0) * (1 << TOKENS) + bits
    tl.store(union + tile.to(tl.int64) * size + at, packed, mask=leads)
    tl.store(counts + tile, tl.sum(leads.to(tl.int32), 0))


@triton.jit
def _chosen_forward(q, k, v, out, lse, union, counts, table, scale, q_t, q_h, k_t, k_h, v_t, v_h,
                    H, GROUP: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
                    BLOCK: tl.constexpr, D: tl.constexpr, KEEP: tl.constexpr,
                    PRECISION: tl.constexpr):  # fmt: skip
    g = tl.program_id(1)
    tile = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)) * tl.num_programs(1) + g
    count = tl.load(counts + tile)
    if count == 0:
        return
    shift, past, keys, k_row, _ = sequence(table, tl.program_id(2))
    start = (past // TOKENS + tl.program_id(0)) * TOKENS
    token, position, head, real = tile_rows(start, past, keys, g, TOKENS, GROUP, HEADS)
    d = tl.arange(0, D)
    row = (shift + position).to(tl.int64)
    queries = load_rows(q, row, head, real, q_t, q_h, D)
    to = (row * H + head)[:, None] * D + d[None, :]
    acc = tl.load(out + to, mask=real[:, None], other=0.0).to(tl.float32)
    top = tl.load(lse + row * H + head, mask=real, other=0.0)
    total = tl.full([TOKENS * HEADS], 1.0, tl.float32)
    entries = union + tile.to(tl.int64) * (TOKENS * KEEP)
    for i in range(0, count):
        entry = tl.load(entries + i)
        at = k_row + (entry >> TOKENS) * BLOCK
        kb = load_keys(k, at, BLOCK, k_t, g * k_h, BLOCK, D, False)
        s = tl.dot(queries, tl.trans(kb), input_precision=PRECISION) * scale
        s = tl.where((((entry >> token) & 1) != 0)[:, None], s, LOWEST)
        vb = load_keys(v, at, BLOCK, v_t, g * v_h, BLOCK, D, False)
        acc, top, total = _attend_block(acc, top, total, s, vb, PRECISION)
    tl.store(out + to, (acc / total[:, None]).to(out.dtype.element_ty), mask=real[:, None])
    tl.store(lse + row * H + head, top + tl.log2(total), mask=real)


def common(
    q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, heads: Heads
) -> tuple[Tensor, Tensor]:
    """Attention over local and initial blocks, or all blocks before the switch.

    q (B, T, H, D), k, v (B, S, G, D) -> out (B, T, H, D), lse (B * T, H) in units of log2.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[0] * q.shape[1], heads.query, dtype=torch.float32, device=q.device)
    tokens = heads.tokens(128 if heads.warpgroups else 64, most=64)
    grid = sequences.grid(tokens, heads.kv)
    _common_forward[grid](
        q, k, v, out, lse, sequences.table, heads.width**-0.5 * LOG2E, q.stride(1), q.stride(2),
        k.stride(1), k.stride(2), v.stride(1), v.stride(2), heads.query, TOKENS=tokens,
        PRECISION=precision(q), **heads.constants(), num_warps=8, num_stages=heads.stages(q,
        3),
    )  # fmt: skip
    return out, lse


def union_of(indices: Tensor, sequences: Sequences, heads: Heads) -> tuple[Tensor, Tensor]:
    """Per tile of tokens, the union of their chosen blocks and its size; indices (P, G, free)."""
    tokens = heads.tokens(64)
    grid = sequences.grid(tokens, heads.kv)
    tiles = grid[0] * grid[1] * grid[2]
    union = torch.empty(tiles, tokens * heads.free_padded, dtype=torch.int32, device=indices.device)
    counts = torch.empty(tiles, dtype=torch.int32, device=indices.device)
    _union[grid](
        indices, union, counts, sequences.table, heads.kv, FREE=heads.free, KEEP=heads.free_padded,
        TOKENS=tokens, num_warps=4,
    )  # fmt: skip
    return union, counts


def add_chosen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    indices: Tensor,
    sequences: Sequences,
    heads: Heads,
) -> None:
    """Extend out and lse of `common`, in place, by the blocks chosen by score."""
    union, counts = union_of(indices, sequences, heads)
    tokens = heads.tokens(64)
    grid = sequences.grid(tokens, heads.kv)
    _chosen_forward[grid](
        q, k, v, out, lse, union, counts, sequences.table, heads.width**-0.5 * LOG2E, q.stride(1),
        q.stride(2), k.stride(1), k.stride(2), v.stride(1), v.stride(2), heads.query,
        TOKENS=tokens, KEEP=heads.free_padded, PRECISION=precision(q), **heads.tile(), num_warps=4,
        num_stages=heads.stages(q, 3),
    )  # fmt: skip
