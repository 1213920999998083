"""How the kernels see a batch: one table of sequences, and tiles of (tokens x heads of a group).

Every kernel works on one key/value head g and packs the query heads that share it into the rows of
its tile: row r is token r // heads, head r % heads (heads = the group, padded to a power of two).
The keys of a tile are then read once for the whole group, and a decode step of one token with 16
heads still fills a matrix instruction. Tiles start at absolute positions that are multiples of
their token count, which divides the block size, so all tokens of a tile lie in the same block and
share their initial and local blocks.

A batch (B, T) and a packed run of sequences differ only in the table: per sequence the first query
row, the number of new tokens, the first key row, the number of keys, the first row of each of the
two summaries, and the first position whose blocks are chosen. The table lives on the device, so a
captured graph may change lengths in it; the host knows only upper bounds, and programs past the end
of their sequence return at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from endside.errors import UserError
from endside.ops.infllm.config import SparseConfig
from endside.ops.infllm.geometry import first_chosen, free_blocks, local_blocks

LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class Sequences:
    """The table of sequences and the host's upper bounds."""

    table: Tensor  # (B, 7) int32: q row, new tokens, k row, keys, k1 row, k2 row, first sparse
    new: int  # most new tokens of one sequence
    keys: int  # most keys of one sequence

    @property
    def count(self) -> int:
        """B: sequences."""
        return self.table.shape[0]

    def grid(self, tokens: int, kv: int) -> tuple[int, int, int]:
        """Tiles of `tokens` in the longest sequence, key/value heads, sequences."""
        return triton.cdiv(self.new, tokens) + 1, kv, self.count


@dataclass(frozen=True)
class Heads:
    """Sizes every kernel is compiled for."""

    width: int  # D
    kv: int  # G
    group: int  # query heads per key/value head
    padded: int  # the group, padded to a power of two
    block: int  # tokens per block
    init: int  # blocks at the start that every sparse query sees
    local: int  # blocks at the end that every sparse query sees, its own included
    free: int  # blocks chosen by score
    first: int  # first position whose blocks are chosen; earlier ones see everything
    warpgroups: bool  # a Hopper: wide tiles leave registers free, and shared memory is large

    @property
    def query(self) -> int:
        """H: query heads."""
        return self.kv * self.group

    @property
    def free_padded(self) -> int:
        """Power of two that holds the chosen blocks, at least 16."""
        return max(16, triton.next_power_of_2(self.free))

    def tokens(self, rows: int, most: int = 16) -> int:
        """Tokens per tile of about `rows` rows (a power of two; a tile never leaves its block)."""
        floor = max(1, 16 // self.padded)
        return min(max(floor, min(rows // self.padded, most)), self.block)

    def stages(self, x: Tensor, most: int = 2) -> int:
        """Key blocks in flight: three fit a Hopper, two any GPU since sm_80, one in fp32."""
        return 1 if x.dtype == torch.float32 else min(most, 3 if self.warpgroups else 2)

    def constants(self) -> dict[str, int]:
        """Compile-time arguments common to the kernels over initial and local blocks."""
        return dict(INIT=self.init, LOCAL=self.local, **self.tile())

    def tile(self) -> dict[str, int]:
        """Compile-time arguments common to all attention kernels."""
        return dict(GROUP=self.group, HEADS=self.padded, BLOCK=self.block, D=self.width)


def heads_of(q: Tensor, k: Tensor, sparse: SparseConfig, keys: int) -> Heads:
    """Sizes for q (..., H, D) over k (..., G, D); UserError where a kernel cannot have them."""
    width, block = q.shape[-1], sparse.block_size
    if width not in (16, 32, 64, 128):
        raise UserError(
            f"head width {width}: the Triton kernels take 16, 32, 64 or 128; use impl='vectorised'"
        )
    if block not in (16, 32, 64, 128):
        raise UserError(
            f"sparse_config.block_size {block}: the Triton kernels take 16, 32, 64 or 128; "
            "use impl='vectorised'"
        )
    group = q.shape[-2] // k.shape[-2]
    return Heads(
        width=width,
        kv=k.shape[-2],
        group=group,
        padded=triton.next_power_of_2(group),
        block=block,
        init=sparse.init_blocks,
        local=local_blocks(sparse),
        free=free_blocks(sparse),
        first=first_chosen(keys, sparse),
        warpgroups=has_warpgroups(q),
    )


def row_stride(x: Tensor) -> int:
    """Rows between two sequences of x (B, S, G, D)."""
    return x.stride(0) // x.stride(1) if x.shape[0] > 1 else 0


def addressable(*tensors: Tensor) -> list[Tensor]:
    """The tensors (B, S, G, D), copied only where one table of rows cannot address them all."""

    def plain(x: Tensor) -> bool:
        whole = x.shape[0] == 1 or (x.stride(1) > 0 and x.stride(0) % x.stride(1) == 0)
        return x.stride(-1) == 1 and whole

    fits = all(plain(x) for x in tensors) and len({row_stride(x) for x in tensors}) == 1
    return list(tensors) if fits else [x.contiguous() for x in tensors]


def batch_table(
    q: Tensor, keys: Tensor, rows: tuple[int, int, int], sparse: SparseConfig
) -> Tensor:
    """Table (B, 7) of q (B, T, H, D) with keys (B,) int32; rows: strides in rows of k, k1, k2."""
    index = torch.arange(q.shape[0], dtype=torch.int32, device=q.device)
    new = torch.full_like(index, q.shape[1])
    k, k1, k2 = (index * stride for stride in rows)
    return torch.stack(
        [index * q.shape[1], new, k, keys, k1, k2, first_positions(keys, sparse)], dim=1
    )


def first_positions(keys: Tensor, sparse: SparseConfig) -> Tensor:
    """First position with chosen blocks, per sequence of `keys` (B,), without asking the host."""
    if sparse.compat is None or sparse.dense_len < 0:
        return torch.full_like(keys, first_chosen(0, sparse))
    return torch.where(keys >= sparse.dense_len, sparse.budget, keys.clamp(min=sparse.budget))


def packed_table(lengths: Sequence[int], sparse: SparseConfig, device: torch.device) -> Tensor:
    """Table (B, 7) of packed sequences; summaries of each start at row (first token // stride)."""
    rows, start, stride = [], 0, sparse.kernel_stride
    for length in lengths:
        k1, k2 = start // stride, start // (4 * stride)
        rows.append([start, length, start, length, k1, k2, first_chosen(length, sparse)])
        start += length
    return to_device(rows, device)


def to_device(values: Sequence[object], device: torch.device) -> Tensor:
    """int32 tensor of host numbers on `device`, copied from pinned memory so that nobody waits."""
    host = torch.tensor(values, dtype=torch.int32)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def precision(x: Tensor) -> str:
    """Matrix products in full fp32 for fp32 inputs; other types ignore it."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


def has_warpgroups(x: Tensor) -> bool:
    """Whether x lives on a GPU whose matrix unit serves four warps at once (Hopper, sm_90)."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 9


@triton.jit
def sequence(table, row):
    """(first q row - first new position, first new position, keys, first k row, first sparse)."""
    q_row = tl.load(table + row * 7)
    new = tl.load(table + row * 7 + 1)
    k_row = tl.load(table + row * 7 + 2)
    keys = tl.load(table + row * 7 + 3)
    first = tl.load(table + row * 7 + 6)
    past = keys - new
    return q_row - past, past, keys, k_row, first


@triton.jit
def tile_rows(start, past, keys, g, TOKENS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr):
    """(token in tile, position, query head, is real) of each row of the tile at `start`."""
    row = tl.arange(0, TOKENS * HEADS)
    token = row // HEADS
    head = row % HEADS
    position = start + token
    real = (position >= past) & (position < keys) & (head < GROUP)
    return token, position, g * GROUP + head, real


@triton.jit
def load_rows(x, row, head, real, stride_t, stride_h, D: tl.constexpr):
    """(rows, D) of x (tokens, heads, D), one token and head per row; 0 where not real."""
    d = tl.arange(0, D)
    at = x + row[:, None] * stride_t + head[:, None] * stride_h + d[None, :]
    return tl.load(at, mask=real[:, None], other=0.0)


@triton.jit
def load_keys(
    x, first, count, stride_t, g_offset, BLOCK: tl.constexpr, D: tl.constexpr, MASK: tl.constexpr
):
    """(BLOCK, D) rows from row `first` on; with MASK, rows from `count` on read as 0."""
    n = tl.arange(0, BLOCK)
    d = tl.arange(0, D)
    at = x + g_offset + (first + n).to(tl.int64)[:, None] * stride_t + d[None, :]
    if MASK:
        return tl.load(at, mask=(n < count)[:, None], other=0.0)
    return tl.load(at)
