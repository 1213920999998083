"""Block-sparse attention, backward, in Triton: two families of kernels, no atomics.

With P = exp2(s - LSE), dP = dO V^T and delta = rowsum(dO * O), dS = P * (dP - delta), and

    dQ = c dS K,    dK = c dS^T Q,    dV = P^T dO,

over the attended pairs only; choosing the blocks carries no gradient (infllmv2 §7).

dQ goes query by query, exactly like the forward: a wide pass over the common blocks, then the union
of the chosen blocks of a few tokens. dK and dV go key block by key block: the queries that see a
block are one contiguous range (the local window, every dense query, and for an initial block all
later ones) and a list of tokens that chose it. The lists come from one stable sort of the choices.
Every gradient is written by exactly one program in a fixed order, so results repeat bit for bit;
the price is that S and dP are computed twice. A group's heads are rows of one tile, so the sum over
them is part of the matrix product.
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
from endside.ops.infllm.triton.sparse_forward import union_of

MASKED = tl.constexpr(-1.0e30)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _delta(out, dout, delta, rows, D: tl.constexpr, ROWS: tl.constexpr):
    """delta = rowsum(dO * O) for ROWS rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = row.to(tl.int64)[:, None] * D + tl.arange(0, D)[None, :]
    real = row < rows
    o = tl.load(out + at, mask=real[:, None], other=0.0).to(tl.float32)
    do = tl.load(dout + at, mask=real[:, None], other=0.0).to(tl.float32)
    tl.store(delta + row, tl.sum(o * do, 1), mask=real)


@triton.jit
def _add_dq(acc, queries, douts, lse, delta, kb, vb, seen, scale, PRECISION: tl.constexpr):
    """acc += dS K for one block; `seen` masks pairs (it may be broadcast)."""
    s = tl.dot(queries, tl.trans(kb), input_precision=PRECISION) * scale
    p = tl.exp2(tl.where(seen, s - lse[:, None], MASKED))
    dp = tl.dot(douts, tl.trans(vb), input_precision=PRECISION)
    ds = (p * (dp - delta[:, None])).to(kb.dtype)
    return tl.dot(ds, kb, acc, input_precision=PRECISION)


@triton.jit
def _common_dq(q, k, v, dout, lse, delta, dq, table, scale, q_t, q_h, k_t, k_h, v_t, v_h, H,
               GROUP: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
               BLOCK: tl.constexpr, D: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr,
               PRECISION: tl.constexpr):  # fmt: skip
    g = tl.program_id(1)
    shift, past, keys, k_row, first = sequence(table, tl.program_id(2))
    start = (past // TOKENS + tl.num_programs(0) - 1 - tl.program_id(0)) * TOKENS
    if start >= keys:
        return
    _, position, head, real = tile_rows(start, past, keys, g, TOKENS, GROUP, HEADS)
    d = tl.arange(0, D)
    n = tl.arange(0, BLOCK)
    row = (shift + position).to(tl.int64)
    queries = load_rows(q, row, head, real, q_t, q_h, D)
    to = (row * H + head)[:, None] * D + d[None, :]
    douts = load_rows(dout, row, head, real, H * D, D, D)
    lse_row = tl.load(lse + row * H + head, mask=real, other=0.0)
    delta_row = tl.load(delta + row * H + head, mask=real, other=0.0)
    acc = tl.zeros([TOKENS * HEADS, D], tl.float32)
    own = start // BLOCK
    dense = position < first
    local = tl.where(start + TOKENS > first, own - LOCAL + 1, 0)
    partial = tl.where(start + TOKENS > first, tl.where(start < first, local, INIT), 0)
    for block in range(0, partial):
        kb = load_keys(k, k_row + block * BLOCK, BLOCK, k_t, g * k_h, BLOCK, D, False)
        vb = load_keys(v, k_row + block * BLOCK, BLOCK, v_t, g * v_h, BLOCK, D, False)
        seen = (dense | (block < INIT))[:, None]
        acc = _add_dq(acc, queries, douts, lse_row, delta_row, kb, vb, seen, scale, PRECISION)
    for block in range(local, own):
        kb = load_keys(k, k_row + block * BLOCK, BLOCK, k_t, g * k_h, BLOCK, D, False)
        vb = load_keys(v, k_row + block * BLOCK, BLOCK, v_t, g * v_h, BLOCK, D, False)
        acc = _add_dq(acc, queries, douts, lse_row, delta_row, kb, vb, True, scale, PRECISION)
    kb = load_keys(k, k_row + own * BLOCK, keys - own * BLOCK, k_t, g * k_h, BLOCK, D, True)
    vb = load_keys(v, k_row + own * BLOCK, keys - own * BLOCK, v_t, g * v_h, BLOCK, D, True)
    seen = (own * BLOCK + n)[None, :] <= position[:, None]
    acc = _add_dq(acc, queries, douts, lse_row, delta_row, kb, vb, seen, scale, PRECISION)
    tl.store(dq + to, (acc * (scale * LN2)).to(dq.dtype.element_ty), mask=real[:, None])


@triton.jit
def _chosen_dq(q, k, v, dout, lse, delta, dq, union, counts, table, scale, q_t, q_h, k_t, k_h,
               v_t, v_h, H, GROUP: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
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
    douts = load_rows(dout, row, head, real, H * D, D, D)
    lse_row = tl.load(lse + row * H + head, mask=real, other=0.0)
    delta_row = tl.load(delta + row * H + head, mask=real, other=0.0)
    acc = tl.zeros([TOKENS * HEADS, D], tl.float32)
    entries = union + tile.to(tl.int64) * (TOKENS * KEEP)
    for i in range(0, count):
        entry = tl.load(entries + i)
        at = k_row + (entry >> TOKENS) * BLOCK
        kb = load_keys(k, at, BLOCK, k_t, g * k_h, BLOCK, D, False)
        vb = load_keys(v, at, BLOCK, v_t, g * v_h, BLOCK, D, False)
        seen = (((entry >> token) & 1) != 0)[:, None]
        acc = _add_dq(acc, queries, douts, lse_row, delta_row, kb, vb, seen, scale, PRECISION)
    before = tl.load(dq + to, mask=real[:, None], other=0.0).to(tl.float32)
    total = acc * (scale * LN2) + before
    tl.store(dq + to, total.to(dq.dtype.element_ty), mask=real[:, None])


@triton.jit
def _add_dkv(dk, dv, kb, vb, q, dout, lse, delta, row, head, real, seen, scale, q_t, q_h, H,
             D: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """dk += dS^T Q and dv += P^T dO for one tile of query rows; unreal rows add nothing."""
    queries = load_rows(q, row, head, real, q_t, q_h, D)
    douts = load_rows(dout, row, head, real, H * D, D, D)
    lse_row = tl.load(lse + row * H + head, mask=real, other=0.0)
    delta_row = tl.load(delta + row * H + head, mask=real, other=0.0)
    # Keys are the rows here: P^T and dS^T enter the products as they are.
    s = tl.dot(kb, tl.trans(queries), input_precision=PRECISION) * scale
    p = tl.exp2(tl.where(seen, s - lse_row[None, :], MASKED))
    dv = tl.dot(p.to(douts.dtype), douts, dv, input_precision=PRECISION)
    dp = tl.dot(vb, tl.trans(douts), input_precision=PRECISION)
    ds = (p * (dp - delta_row[None, :])).to(queries.dtype)
    dk = tl.dot(ds, queries, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _dkv(q, k, v, dout, lse, delta, dk, dv, starts, order, table, scale, q_t, q_h, k_t, k_h, v_t,
         v_h, H, GROUP: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
         BLOCK: tl.constexpr, D: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr,
         CHOSEN: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    block = tl.program_id(0)
    g = tl.program_id(1)
    shift, past, keys, k_row, first = sequence(table, tl.program_id(2))
    if block * BLOCK >= keys:
        return
    d = tl.arange(0, D)
    n = tl.arange(0, BLOCK)
    kb = load_keys(k, k_row + block * BLOCK, keys - block * BLOCK, k_t, g * k_h, BLOCK, D, True)
    vb = load_keys(v, k_row + block * BLOCK, keys - block * BLOCK, v_t, g * v_h, BLOCK, D, True)
    acc_k = tl.zeros([BLOCK, D], tl.float32)
    acc_v = tl.zeros([BLOCK, D], tl.float32)
    column = n + block * BLOCK
    # The contiguous range: its first block is causal, the rest sees all of these keys.
    stop = tl.minimum(
        tl.where(block < INIT, keys, tl.maximum(first, (block + LOCAL) * BLOCK)), keys
    )
    edge = tl.minimum((block + 1) * BLOCK, stop)
    begin = tl.maximum(block * BLOCK, past // TOKENS * TOKENS)
    for start in range(begin, edge, TOKENS):
        _, position, head, real = tile_rows(start, past, keys, g, TOKENS, GROUP, HEADS)
        seen = column[:, None] <= position[None, :]
        row = (shift + position).to(tl.int64)
        acc_k, acc_v = _add_dkv(acc_k, acc_v, kb, vb, q, dout, lse, delta, row, head, real, seen,
                                scale, q_t, q_h, H, D, PRECISION)  # fmt: skip
    begin = tl.maximum((block + 1) * BLOCK, past // TOKENS * TOKENS)
    for start in range(begin, stop, TOKENS):
        _, position, head, real = tile_rows(start, past, stop, g, TOKENS, GROUP, HEADS)
        row = (shift + position).to(tl.int64)
        acc_k, acc_v = _add_dkv(acc_k, acc_v, kb, vb, q, dout, lse, delta, row, head, real, True,
                                scale, q_t, q_h, H, D, PRECISION)  # fmt: skip
    if CHOSEN:
        list_of = (tl.program_id(2) * tl.num_programs(0) + block) * tl.num_programs(1) + g
        begin = tl.load(starts + list_of)
        end = tl.load(starts + list_of + 1)
        r = tl.arange(0, TOKENS * HEADS)
        for i in range(begin, end, TOKENS):
            at = i + r // HEADS
            head = g * GROUP + r % HEADS
            row = tl.load(order + at, mask=at < end, other=0).to(tl.int64)
            real = (at < end) & (r % HEADS < GROUP)
            acc_k, acc_v = _add_dkv(acc_k, acc_v, kb, vb, q, dout, lse, delta, row, head, real,
                                    True, scale, q_t, q_h, H, D, PRECISION)  # fmt: skip
    own = column < keys
    to = ((k_row + column).to(tl.int64) * tl.num_programs(1) + g)[:, None] * D + d[None, :]
    acc_k = acc_k * (scale * LN2)
    tl.store(dk + to, acc_k.to(dk.dtype.element_ty), mask=own[:, None])
    tl.store(dv + to, acc_v.to(dv.dtype.element_ty), mask=own[:, None])


def choosers(
    indices: Tensor, rows: Tensor, blocks: int, sequences: Sequences
) -> tuple[Tensor, Tensor]:
    """Per (sequence, block, g) the query rows that chose it: starts and order.

    indices (P, G, K); rows (P,): sequence of each query row; blocks: most blocks of a sequence.
    List i is order[starts[i] : starts[i + 1]]; its rows ascend, because the sort is stable.
    """
    _, kv, free = indices.shape
    g = torch.arange(kv, dtype=torch.int32, device=indices.device)
    key = (rows[:, None, None] * blocks + indices) * kv + g[None, :, None]
    lists = sequences.count * blocks * kv
    key = torch.where(indices >= 0, key, lists).flatten()
    sorted_keys, order = torch.sort(key, stable=True)
    bounds = torch.arange(lists + 1, dtype=torch.int32, device=indices.device)
    starts = torch.searchsorted(sorted_keys, bounds, out_int32=True)
    return starts, (order // (kv * free)).to(torch.int32)


def rows_to_sequences(table: Tensor, rows: int) -> Tensor:
    """Sequence that each of the query rows belongs to: (P,) int32."""
    row = torch.arange(rows, dtype=torch.int32, device=table.device)
    return torch.searchsorted(
        (table[:, 0] + table[:, 1]).contiguous(), row, right=True, out_int32=True
    )


def backward(
    dout: Tensor,
    tensors: tuple[Tensor, ...],
    *,
    sequences: Sequences,
    heads: Heads,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv for dout (B, T, H, D) and the saved (q, k, v, out, lse, indices or None)."""
    q, _, _, out, lse, _ = tensors
    dout = dout.contiguous()
    rows = q.shape[0] * q.shape[1] * heads.query
    delta = torch.empty_like(lse)
    _delta[(triton.cdiv(rows, 64),)](out, dout, delta, rows, D=heads.width, ROWS=64)
    dq = _query_gradient(dout, tensors, delta, sequences=sequences, heads=heads)
    dk, dv = _key_gradients(dout, tensors, delta, sequences=sequences, heads=heads)
    return dq, dk, dv


def _query_gradient(
    dout: Tensor, tensors: tuple[Tensor, ...], delta: Tensor, *, sequences: Sequences, heads: Heads
) -> Tensor:
    """dq (B, T, H, D): the common blocks, then the chosen ones on top."""
    q, k, v, _, lse, indices = tensors
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    scale = heads.width**-0.5 * LOG2E
    strides = (
        q.stride(1),
        q.stride(2),
        k.stride(1),
        k.stride(2),
        v.stride(1),
        v.stride(2),
        heads.query,
    )
    # Before Hopper 64 rows of Q, dO and dQ do not fit the registers.
    tokens = heads.tokens(64 if heads.warpgroups else 32)
    grid = sequences.grid(tokens, heads.kv)
    _common_dq[grid](
        q, k, v, dout, lse, delta, dq, sequences.table, scale, *strides, TOKENS=tokens,
        PRECISION=precision(q), **heads.constants(), num_warps=4,
        num_stages=heads.stages(q),
    )  # fmt: skip
    if indices is None:
        return dq
    union, counts = union_of(indices, sequences, heads)
    tokens = heads.tokens(64)
    grid = sequences.grid(tokens, heads.kv)
    _chosen_dq[grid](
        q, k, v, dout, lse, delta, dq, union, counts, sequences.table, scale, *strides,
        TOKENS=tokens, KEEP=heads.free_padded, PRECISION=precision(q), **heads.tile(), num_warps=4,
        num_stages=heads.stages(q),
    )  # fmt: skip
    return dq


def _key_gradients(
    dout: Tensor, tensors: tuple[Tensor, ...], delta: Tensor, *, sequences: Sequences, heads: Heads
) -> tuple[Tensor, Tensor]:
    """dk, dv (B, S, G, D): each block's programs walk the queries that see it."""
    q, k, v, _, lse, indices = tensors
    # Rows of k past a sequence's keys get no program.
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    blocks = triton.cdiv(sequences.keys, heads.block)
    starts = order = delta
    if indices is not None:
        rows = rows_to_sequences(sequences.table, q.shape[0] * q.shape[1])
        starts, order = choosers(indices, rows, blocks, sequences)
    tokens = heads.tokens(64)
    _dkv[(blocks, heads.kv, sequences.count)](
        q, k, v, dout, lse, delta, dk, dv, starts, order, sequences.table, heads.width**-0.5 *
        LOG2E, q.stride(1), q.stride(2), k.stride(1), k.stride(2), v.stride(1), v.stride(2),
        heads.query, TOKENS=tokens, CHOSEN=indices is not None, PRECISION=precision(q),
        **heads.constants(), num_warps=8, num_stages=heads.stages(q),
    )  # fmt: skip
    return dk, dv
