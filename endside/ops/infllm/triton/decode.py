"""Decode in Triton: one or a few queries per sequence, their blocks split over many programs.

A step of one token has B x G rows of work: far too few programs to fill a GPU. The blocks a query
attends to (initial, chosen and local ones, or its whole past before the switch) form one list, and
SPLITS programs each take an equal run of it. Each leaves an unnormalised output and its log-sum;
a second kernel merges them in a fixed order. List lengths are read on the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from endside.ops.infllm.triton.layout import LOG2E, Heads, Sequences, load_keys, precision, sequence
from endside.ops.infllm.triton.sparse_forward import LOWEST, _attend_block

PROGRAMS = 528  # four per multiprocessor of an H100
MOST_PARTS = 64  # one program merges them at once
TOKENS = 8  # new tokens per sequence up to which the split path is used


@triton.jit
def _split(q, k, v, acc_out, top_out, total_out, indices, table, scale, q_t, q_h, k_t, k_h, v_t,
           v_h, G, NEW, SPLITS, GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
           D: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr, FREE: tl.constexpr,
           PRECISION: tl.constexpr):  # fmt: skip
    part = tl.program_id(0)
    g = tl.program_id(1)
    token = tl.program_id(2)
    shift, past, keys, k_row, first = sequence(table, token // NEW)
    position = past + token % NEW
    row = (shift + position).to(tl.int64)
    r = tl.arange(0, ROWS)
    d = tl.arange(0, D)
    n = tl.arange(0, BLOCK)
    at = q + row * q_t + (g * GROUP + r).to(tl.int64)[:, None] * q_h + d[None, :]
    queries = tl.load(at, mask=(r < GROUP)[:, None], other=0.0)
    own = position // BLOCK
    blocks = tl.where(position < first, own + 1, INIT + FREE + LOCAL)
    each = (blocks + SPLITS - 1) // SPLITS
    acc = tl.zeros([ROWS, D], tl.float32)
    top = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for i in range(part * each, tl.minimum(part * each + each, blocks)):
        chosen = tl.load(
            indices + (row * G + g) * FREE + i - INIT,
            mask=(position >= first) & (i >= INIT) & (i < INIT + FREE),
            other=0,
        )
        local = own - LOCAL + 1 + i - INIT - FREE
        block = tl.where(
            (position < first) | (i < INIT), i, tl.where(i < INIT + FREE, chosen, local)
        )
        left = keys - block * BLOCK
        kb = load_keys(k, k_row + block * BLOCK, left, k_t, g * k_h, BLOCK, D, True)
        s = tl.dot(queries, tl.trans(kb), input_precision=PRECISION) * scale
        s = tl.where((block * BLOCK + n <= position)[None, :], s, LOWEST * 2)
        vb = load_keys(v, k_row + block * BLOCK, left, v_t, g * v_h, BLOCK, D, True)
        acc, top, total = _attend_block(acc, top, total, s, vb, PRECISION)
    to = ((token * G + g) * SPLITS + part).to(tl.int64) * ROWS + r
    tl.store(acc_out + to[:, None] * D + d[None, :], acc)
    tl.store(top_out + to, top)
    tl.store(total_out + to, total)


@triton.jit
def _merge(acc_in, top_in, total_in, out, SPLITS, GROUP: tl.constexpr, ROWS: tl.constexpr,
           D: tl.constexpr, PARTS: tl.constexpr):  # fmt: skip
    head = tl.program_id(0)
    token = tl.program_id(1)
    kv = tl.num_programs(0) // GROUP
    part = tl.arange(0, PARTS)
    d = tl.arange(0, D)
    at = ((token * kv + head // GROUP) * SPLITS + part).to(tl.int64) * ROWS + head % GROUP
    real = part < SPLITS
    top = tl.load(top_in + at, mask=real, other=LOWEST)
    weight = tl.exp2(top - tl.max(top, 0))
    total = tl.sum(tl.load(total_in + at, mask=real, other=0.0) * weight, 0)
    acc = tl.load(acc_in + at[:, None] * D + d[None, :], mask=real[:, None], other=0.0)
    merged = tl.sum(acc * weight[:, None], 0) / total
    to = (token * tl.num_programs(0) + head).to(tl.int64) * D + d
    tl.store(out + to, merged.to(out.dtype.element_ty))


def splits_of(programs: int, blocks: int) -> int:
    """Parts per query: enough to fill the device, at least two blocks each."""
    return max(1, min(triton.cdiv(PROGRAMS, programs), triton.cdiv(blocks, 2), MOST_PARTS))


def decode(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor | None, *, sequences: Sequences, heads: Heads
) -> Tensor:
    """Attention of q (B, T, H, D), T small, over k, v (B, S, G, D); indices (B*T, G, free)"""
    rows, new = q.shape[:2]
    most = triton.cdiv(sequences.keys, heads.block)
    if indices is not None:
        most = max(heads.init + heads.free + heads.local, triton.cdiv(heads.first, heads.block))
    splits = splits_of(rows * new * heads.kv, most)
    packed = max(16, heads.padded)
    shape = (rows * new, heads.kv, splits, packed)
    acc = torch.empty(*shape, heads.width, dtype=torch.float32, device=q.device)
    top, total = (torch.empty(shape, dtype=torch.float32, device=q.device) for _ in range(2))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    sizes = {name: value for name, value in heads.constants().items() if name != "HEADS"}
    _split[(splits, heads.kv, rows * new)](
        q, k, v, acc, top, total, sequences.table if indices is None else indices, sequences.table,
        heads.width**-0.5 * LOG2E, q.stride(1), q.stride(2), k.stride(1), k.stride(2), v.stride(1),
        v.stride(2), heads.kv, new, splits, ROWS=packed, FREE=heads.free, PRECISION=precision(q),
        **sizes, num_warps=4, num_stages=heads.stages(q),
    )  # fmt: skip
    _merge[(heads.query, rows * new)](
        acc, top, total, out, splits, GROUP=heads.group, ROWS=packed, D=heads.width,
        PARTS=triton.next_power_of_2(splits), num_warps=4,
    )  # fmt: skip
    return out
