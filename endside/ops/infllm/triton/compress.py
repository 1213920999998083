"""Summaries of the keys in Triton: means over complete windows that overlap by half (infllmv2 §2).

One program pools WINDOWS neighbouring windows of one key/value head: it walks the 2 x stride keys
of a window and adds them in fp32. Each key is read twice from memory (the halves of two windows),
once of which hits the cache; the result is 1/16 and 1/64 of the keys, so nothing finer pays.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from endside.ops.infllm.triton.layout import Sequences

WINDOWS = 16


@triton.jit
def _compress(k, out, table, k_t, k_h, G, COLUMN: tl.constexpr, STRIDE: tl.constexpr,
              D: tl.constexpr, WINDOWS: tl.constexpr):  # fmt: skip
    g = tl.program_id(1)
    row = tl.program_id(2)
    k_row = tl.load(table + row * 7 + 2)
    keys = tl.load(table + row * 7 + 3)
    out_row = tl.load(table + row * 7 + COLUMN)
    count = keys // STRIDE - 1
    w = tl.program_id(0) * WINDOWS + tl.arange(0, WINDOWS)
    d = tl.arange(0, D)
    real = (w < count)[:, None]
    at = k + (k_row + w * STRIDE).to(tl.int64)[:, None] * k_t + g * k_h + d[None, :]
    total = tl.zeros([WINDOWS, D], tl.float32)
    for i in range(0, 2 * STRIDE):
        total += tl.load(at + i * k_t, mask=real, other=0.0).to(tl.float32)
    mean = (total / (2 * STRIDE)).to(out.dtype.element_ty)
    tl.store(out + ((out_row + w).to(tl.int64)[:, None] * G + g) * D + d[None, :], mean, mask=real)


def compress(k: Tensor, sequences: Sequences, stride: int, column: int) -> Tensor:
    """Means over windows of 2 x stride of k (B, S, G, D) -> rows (N, G, D).

    `column` of the table says where each sequence's rows start: 4 for k1, 5 for k2.
    """
    _, _, kv, width = k.shape
    rows = k.shape[0] * (k.shape[1] // stride) + 1
    out = torch.empty(rows, kv, width, dtype=k.dtype, device=k.device)
    windows = max(0, sequences.keys // stride - 1)
    if windows:
        grid = (triton.cdiv(windows, WINDOWS), kv, sequences.count)
        _compress[grid](
            k, out, sequences.table, k.stride(1), k.stride(2), kv,
            COLUMN=column, STRIDE=stride, D=width, WINDOWS=WINDOWS,
        )  # fmt: skip
    return out
