"""The fused selector in Triton: score summaries, pool to blocks, keep the best (infllmv2 §3-5).

One program holds the queries of a few tokens, all heads of one group, and makes two passes:

    1  LSE_h = log sum_m exp(c q_h . k2_m)                  visible coarse (or fine) summaries
    2  s[j]  = sum_h exp(c q_h . k1_j - LSE_h)              fine summaries, 4 per block
       pool[B] = max s[4B-1 .. 4B+3]
       keep the `free` best blocks between the initial and the local ones

Pass 2 walks 64 blocks at a time. Summary 4B+i of 64 blocks is one matrix product per i, so the
maximum over a block needs no reshaping, and its left neighbour's last summary is a shift by one.
The running list holds 64-bit keys, score bits above the complement of the index: scores are sums of
exponentials, never negative, so their bits order like integers, and equal scores order by index.
A chunk is sorted, merged with the list by one bitonic step, and forgotten: nothing of size
n x n / 16 ever exists, and only indices (P, G, K) leave the kernel.
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
    load_rows,
    precision,
    sequence,
    tile_rows,
)

LOWEST = tl.constexpr(-1.0e30)


@triton.jit
def _normaliser(queries, keys, key_row, visible, most, scale, k_t, k_off, N: tl.constexpr,
                D: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """log2-sum-exp2 of each row over its visible summaries."""
    n = tl.arange(0, N)
    d = tl.arange(0, D)
    top = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, most, N):
        m = start + n
        at = keys + k_off + (key_row + m).to(tl.int64)[:, None] * k_t + d[None, :]
        kb = tl.load(at, mask=(m < most)[:, None], other=0.0)
        s = tl.dot(queries, tl.trans(kb), input_precision=PRECISION) * scale
        s = tl.where(m[None, :] < visible[:, None], s, LOWEST)
        high = tl.maximum(top, tl.max(s, 1))
        total = total * tl.exp2(top - high) + tl.sum(tl.exp2(s - high[:, None]), 1)
        top = high
    return top + tl.log2(total)


@triton.jit
def _group_score(queries, lse, k1, key_row, block, stop, i, visible, real, scale, k_t, k_off,
                 N: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
                 LOCAL: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """(TOKENS, N): summary 4B+i of N blocks, summed over the heads of the group."""
    d = tl.arange(0, D)
    j = block * 4 + i
    at = k1 + k_off + (key_row + j).to(tl.int64)[:, None] * k_t + d[None, :]
    kb = tl.load(at, mask=(block < stop)[:, None], other=0.0)
    s = tl.dot(queries, tl.trans(kb), input_precision=PRECISION) * scale
    e = tl.exp2(s - lse[:, None])
    e = tl.where(real[:, None], e, 0.0)
    # With two or more local blocks every summary of a candidate is visible.
    if LOCAL < 2:
        e = tl.where(j[None, :] < visible[:, None], e, 0.0)
    return tl.sum(tl.reshape(e, [TOKENS, HEADS, N]), 1)


@triton.jit
def _select(q, k1, k2, out, table, scale, q_t, q_h, k1_t, k1_h, k2_t, k2_h, GROUP: tl.constexpr,
            HEADS: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr,
            INIT: tl.constexpr, LOCAL: tl.constexpr, FREE: tl.constexpr, KEEP: tl.constexpr,
            COARSE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    g = tl.program_id(1)
    shift, past, keys, _, first = sequence(table, tl.program_id(2))
    start = (past // TOKENS + tl.program_id(0)) * TOKENS
    if start >= keys:
        return
    k1_row = tl.load(table + tl.program_id(2) * 7 + 4)
    k2_row = tl.load(table + tl.program_id(2) * 7 + 5)
    _, position, head, real = tile_rows(start, past, keys, g, TOKENS, GROUP, HEADS)
    slot = tl.arange(0, KEEP)
    best = tl.zeros([TOKENS, KEEP], tl.int64)
    if start + TOKENS > first:
        row = (shift + position).to(tl.int64)
        queries = load_rows(q, row, head, real, q_t, q_h, D)
        fine = (position + 1) // (BLOCK // 4) - 1
        coarse = (position + 1) // BLOCK - 1
        end = tl.minimum(start + TOKENS, keys)
        if COARSE:
            lse = _normaliser(queries, k2, k2_row, coarse, end // BLOCK - 1, scale, k2_t, g * k2_h,
                              64, D, TOKENS * HEADS, PRECISION)  # fmt: skip
        else:
            lse = _normaliser(queries, k1, k1_row, fine, end // (BLOCK // 4) - 1, scale, k1_t,
                              g * k1_h, 64, D, TOKENS * HEADS, PRECISION)  # fmt: skip
        stop = start // BLOCK - LOCAL + 1
        carry = tl.zeros([TOKENS], tl.float32)
        left = tl.broadcast_to(tl.maximum(slot - 1, 0)[None, :], [TOKENS, KEEP])
        for begin in range(0, stop, KEEP):
            block = begin + slot
            pool = tl.zeros([TOKENS, KEEP], tl.float32)
            for i in tl.static_range(4):
                last = _group_score(queries, lse, k1, k1_row, block, stop, i, fine, real, scale,
                                    k1_t, g * k1_h, KEEP, D, TOKENS, HEADS, LOCAL,
                                    PRECISION)  # fmt: skip
                pool = tl.maximum(pool, last)
            before = tl.where(slot[None, :] == 0, carry[:, None], tl.gather(last, left, 1))
            carry = tl.sum(tl.where(slot[None, :] == KEEP - 1, last, 0.0), 1)
            pool = tl.maximum(pool, before)
            rank = (0x7FFFFFFF - block).to(tl.int64)[None, :]
            key = (pool.to(tl.int32, bitcast=True).to(tl.int64) << 32) | rank
            key = tl.where(((block >= INIT) & (block < stop))[None, :], key, 0)
            best = tl.maximum(best, tl.sort(key, 1))
            best = tl.bitonic_merge(best, 1, True)
    token = start + tl.arange(0, TOKENS)
    chosen = 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32)
    keep = (best > 0) & (slot < FREE)[None, :] & (token >= first)[:, None]
    chosen = tl.sort(tl.where(keep, chosen, 0x7FFFFFFF), 1)
    chosen = tl.where(chosen == 0x7FFFFFFF, -1, chosen)
    G = tl.num_programs(1)
    at = out + ((shift + token).to(tl.int64)[:, None] * G + g) * FREE + slot[None, :]
    tl.store(at, chosen, mask=((token >= past) & (token < keys))[:, None] & (slot < FREE)[None, :])


def select(
    q: Tensor, k1: Tensor, k2: Tensor, sequences: Sequences, *, heads: Heads, coarse: bool
) -> Tensor:
    """Blocks chosen by score for q (B, T, H, D): (B*T, G, free) int32, ascending, -1 for none.

    k1 and k2 (rows, G, D) are the fine and coarse summaries, addressed through the table. Initial
    and local blocks are not listed; positions before heads.first list nothing.
    """
    rows = q.shape[0] * q.shape[1]
    out = torch.empty(rows, heads.kv, heads.free, dtype=torch.int32, device=q.device)
    # 64 rows: four tokens of the published models, whose scores and list stay in registers. Three
    # such programs fit a multiprocessor and hide each other's loads: the loop is not pipelined.
    tokens = heads.tokens(64)
    grid = sequences.grid(tokens, heads.kv)
    _select[grid](
        q, k1, k2, out, sequences.table, heads.width**-0.5 * LOG2E, q.stride(1), q.stride(2),
        k1.stride(-3), k1.stride(-2), k2.stride(-3), k2.stride(-2), TOKENS=tokens, FREE=heads.free,
        KEEP=heads.free_padded, COARSE=coarse, PRECISION=precision(q), **heads.constants(),
        num_warps=4 if heads.warpgroups else 8, num_stages=1,
    )  # fmt: skip
    return out
