"""Index arithmetic of InfLLM v2, shared by every implementation: no tensors are created here.

For position p (own block b = p // M, M tokens per block, strides 16 and 64 as released):

    fine summary j    tokens 16 j .. 16 j + 31     visible iff j < (p + 1) // 16 - 1
    coarse summary m  tokens 64 m .. 64 m + 127    visible iff m < (p + 1) // 64 - 1
    block B           touched by fine summaries 4 B - 1 .. 4 B + 3

From p = budget on, the blocks a query attends to are three disjoint ranges (infllmv2 §5):

    [0, init)                    always
    [first_local(b), b]          always: W + 1 blocks (4.1) or W blocks (4.0)
    [init, first_local(b))       the `free_blocks` best by score

Before that position the three cover every visible block, so sparse equals dense. Functions take
plain ints and, where it makes sense, integer tensors: they only use // + - * and comparisons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from endside.errors import UserError

if TYPE_CHECKING:
    import torch

    from endside.ops.infllm.config import SparseConfig

Index = TypeVar("Index", int, "torch.Tensor")


def _at_least_zero(x: Index) -> Index:
    """max(0, x) that works on ints and on tensors alike."""
    return x * (x > 0)


def visible_fine(position: Index, sparse: SparseConfig) -> Index:
    """Fine summaries that a query at `position` may look at (infllmv2 §3)."""
    return _at_least_zero((position + 1) // sparse.kernel_stride - 1)


def visible_coarse(position: Index, sparse: SparseConfig) -> Index:
    """Coarse summaries that a query at `position` may look at (infllmv2 §3)."""
    return _at_least_zero((position + 1) // sparse.coarse_stride - 1)


def block_count(length: int, sparse: SparseConfig) -> int:
    """N: blocks that hold `length` keys, the last one perhaps partly."""
    return -(-length // sparse.block_size)


def pool_range(block: int, fine: int, sparse: SparseConfig) -> tuple[int, int]:
    """First and past-the-last fine summary that touches `block`, of `fine` stored ones (§4)."""
    step = sparse.block_size // sparse.kernel_stride
    return max(step * block - 1, 0), min(step * block + step, fine)


def local_blocks(sparse: SparseConfig) -> int:
    """Forced blocks at the end, the query's own included: W + 1 (4.1) or W (4.0)."""
    return sparse.window_blocks + (sparse.selection == "4.1")


def first_local(block: Index, sparse: SparseConfig) -> Index:
    """First block of the local range of a query in `block`."""
    return _at_least_zero(block - local_blocks(sparse) + 1)


def free_blocks(sparse: SparseConfig) -> int:
    """Blocks chosen by score once the budget is exceeded: 62 (4.1) or 63 (4.0) as released."""
    return sparse.total_blocks - sparse.init_blocks - local_blocks(sparse)


def first_chosen(length: int, sparse: SparseConfig) -> int:
    """First position whose result can differ from dense attention, in a forward to `length`."""
    return max(sparse.first_sparse(length), sparse.budget)


def is_dense(length: int, sparse: SparseConfig) -> bool:
    """Whether every query of a text of `length` tokens sees all that dense attention would show."""
    return first_chosen(length, sparse) >= length


def visible_count(position: int, length: int, sparse: SparseConfig) -> int:
    """Keys that the query at `position` attends to."""
    if position < first_chosen(length, sparse):
        return position + 1
    return (sparse.total_blocks - 1) * sparse.block_size + position % sparse.block_size + 1


@dataclass(frozen=True)
class AttendStats:
    """How much attention acts: tokens per query, averaged over the queries of one forward."""

    visible: float  # tokens attended to
    available: float  # tokens a dense query would attend to

    @property
    def ratio(self) -> float:
        """visible / available; 1 means that sparsity does not act."""
        return self.visible / self.available


def attend_stats(new: int, length: int, sparse: SparseConfig) -> AttendStats:
    """Mean visible and available tokens of the last `new` positions of `length`."""
    positions = range(length - new, length)
    visible = sum(visible_count(p, length, sparse) for p in positions)
    return AttendStats(visible / new, sum(p + 1 for p in positions) / new)


def check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    sparse: SparseConfig,
    summaries: tuple[torch.Tensor, torch.Tensor] | None = None,
    lengths: Sequence[int] | None = None,
) -> None:
    """Raise UserError unless q (B,T,H,D), k and v (B,S,G,D) and the summaries fit together."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise UserError(
                f"attend: {name} has shape {tuple(x.shape)}: "
                "give 4 axes, (rows, tokens, heads, width)"
            )
    if k.shape != v.shape:
        raise UserError(
            f"attend: k {tuple(k.shape)} and v {tuple(v.shape)} differ in shape: make them equal"
        )
    (rows, new, heads, width), (key_rows, length, groups, key_width) = q.shape, k.shape
    if (rows, width) != (key_rows, key_width):
        raise UserError(
            f"attend: q {tuple(q.shape)} and k {tuple(k.shape)} differ in rows or head width: "
            "make both equal"
        )
    if heads % groups:
        raise UserError(
            f"attend: {heads} query heads are not a multiple of {groups} key heads: "
            "every key head serves a whole group"
        )
    if not (q.dtype == k.dtype == v.dtype and q.dtype.is_floating_point):
        raise UserError(
            f"attend: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}: give one floating type"
        )
    if lengths is not None and (len(lengths) != rows or max(lengths) > length):
        raise UserError(
            f"attend: lengths {list(lengths)} do not describe {rows} row(s) of {length} keys: "
            "give one number per row, no larger than that"
        )
    shortest = length if lengths is None else min(lengths)
    if new < 1 or new > shortest:
        raise UserError(
            f"attend: {new} new tokens for {shortest} keys: "
            "the keys must contain those of the new tokens, and there must be at least one"
        )
    if summaries is not None:
        _check_summaries(summaries, k.shape, sparse)


def _check_summaries(
    summaries: tuple[torch.Tensor, torch.Tensor], shape: tuple[int, ...], sparse: SparseConfig
) -> None:
    """Raise UserError unless k1 and k2 cover every complete window of `shape` (B,S,G,D)."""
    rows, length, groups, width = shape
    needs = (sparse.fine_count(length), sparse.coarse_count(length))
    for name, x, need in zip(("k1", "k2"), summaries, needs, strict=True):
        fits = x.dim() == 4 and (x.shape[0], *x.shape[2:]) == (rows, groups, width)
        if not fits or x.shape[1] < need:
            raise UserError(
                f"attend: summaries {name} {tuple(x.shape)} do not cover keys {tuple(shape)}: "
                f"give ({rows}, {need}, {groups}, {width})"
            )
