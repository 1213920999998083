"""Block-sparse attention on the CPU: a dense pass over the window, then the chosen blocks.

The local blocks of a query are those of its 64 neighbours too, so they are one matrix product per
query tile. The rest is chosen per query; there the loop is over key blocks: every block meets the
queries that chose it, `slots` of them at a time, and many such meetings run as one batched product.
Both passes feed the same running softmax (m, l, acc), which makes the result exact:

    m' = max(m, s)    l' = l e^(m - m') + sum e^(s - m')    acc' = acc e^(m - m') + e^(s - m') v

The backward pass recomputes the weights from lse = m + log l and needs no stored scores:

    P = e^(s - lse)    dV = P^T dO    dS = P * (dO V^T - rowsum(dO * O))    dQ = dS K    dK = dS^T Q

Rows are folded: z = (row, key head), Z = B G of them, each with I = H / G query heads. A query is
row z * T + t of a flat table that ends in one spare row, where unused slots point.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.autograd.function import FunctionCtx, once_differentiable

from endside.ops.infllm import geometry
from endside.ops.infllm.config import SparseConfig
from endside.ops.infllm.reference import wide

# elements of the largest temporary: 4 MiB of floats measured fastest of 1 to 16
TEMPORARY = 1 << 20
# rows of one product; fewer would waste the multiplier, more would leave slots empty
PRODUCT_ROWS = 128


class Meetings(NamedTuple):
    """Which queries meet which chosen block, ordered by block."""

    blocks: torch.Tensor  # (items,) z * N + block
    queries: torch.Tensor  # (items, slots) z * T + t, or Z * T: an unused slot


class Chunk(NamedTuple):
    """Consecutive queries that are worked on together."""

    start: int  # first query, counted from the first query of the call
    stop: int
    meetings: Meetings


def arrange(taken: torch.Tensor, *, group: int, blocks: int) -> Meetings:
    """Meetings of taken (Z, T, at most `blocks`) bool, with PRODUCT_ROWS / group slots or fewer."""
    z, new, count = taken.shape
    flat = taken.transpose(1, 2).contiguous().view(-1).nonzero().squeeze(1)
    block, query = flat // new, flat % new + flat // (new * count) * new
    keys, group_of, sizes = torch.unique_consecutive(block, return_inverse=True, return_counts=True)
    mean = flat.shape[0] // keys.shape[0]
    slots = max(1, min(PRODUCT_ROWS // group, 1 << mean.bit_length() - 1))
    items = (sizes + slots - 1) // slots
    rank = torch.arange(flat.shape[0]) - (sizes.cumsum(0) - sizes)[group_of]
    place = (items.cumsum(0) - items)[group_of] * slots + rank
    queries = torch.full((int(items.sum()) * slots,), z * new)
    queries[place] = query
    numbers = keys // count * blocks + keys % count
    return Meetings(numbers.repeat_interleave(items), queries.view(-1, slots))


class _Keys:
    """Keys and values (B, S, G, D), read by window or by block in the type of the arithmetic."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor, sparse: SparseConfig) -> None:
        self.k, self.v, self.sparse = k, v, sparse
        self.rows, self.length, self.groups, self.width = k.shape
        self.blocks = geometry.block_count(self.length, sparse)
        self._flat = (k.reshape(-1, self.width), v.reshape(-1, self.width))

    def window(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values start .. stop - 1 of every z: (Z, stop - start, D) twice."""
        k, v = (x[:, start:stop].transpose(1, 2) for x in (self.k, self.v))
        shape = (-1, stop - start, self.width)
        return wide(k).reshape(shape), wide(v).reshape(shape)

    def places(self, z: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Rows of the flat (B S G, D) tables that hold tokens (n, m) of z (n,): (n, m)."""
        z = z.unsqueeze(1)
        return (z // self.groups * self.length + tokens) * self.groups + z % self.groups

    def block_places(self, blocks: torch.Tensor) -> torch.Tensor:
        """The same for whole blocks (items,), numbered z * N + block: (items, M)."""
        size = self.sparse.block_size
        first = (blocks % self.blocks * size).unsqueeze(1)
        return self.places(blocks // self.blocks, first + torch.arange(size))

    def gather(self, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values at places (n, m): (n, m, D) twice."""
        shape = (*places.shape, self.width)
        k, v = (wide(x.index_select(0, places.flatten())) for x in self._flat)
        return k.view(shape), v.view(shape)


class _Running:
    """The running softmax of one chunk: m, l (queries + 1, I) and acc (queries + 1, I, D)."""

    def __init__(self, q: torch.Tensor) -> None:
        self.z, self.new, self.group, self.width = q.shape
        queries = self.z * self.new
        self.top = q.new_zeros(queries + 1, self.group)
        self.sum = q.new_zeros(queries + 1, self.group)
        self.acc = q.new_zeros(queries + 1, self.group * self.width)

    def begin(self, part: slice, scores: torch.Tensor, v: torch.Tensor) -> None:
        """First keys of the queries `part`: scores (Z, n, I, keys), consumed; v (Z, keys, D)."""
        top = scores.amax(-1)
        weights = scores.sub_(top.unsqueeze(-1)).exp_()
        self.view(self.top)[:, part] = top
        self.view(self.sum)[:, part] = weights.sum(-1)
        acc = torch.bmm(weights.flatten(1, 2), v).view(self.z, -1, self.group * self.width)
        self.view(self.acc)[:, part] = acc

    def add(self, queries: torch.Tensor, scores: torch.Tensor, v: torch.Tensor) -> None:
        """More keys: queries (items, slots), v (items, M, D); consumes scores (items, rows, M)."""
        rows = queries.flatten()
        narrow = rows.unsqueeze(1).expand(-1, self.group)
        old = self.top.clone()
        self.top.scatter_reduce_(0, narrow, scores.amax(-1).view(-1, self.group), "amax")
        decay = (old - self.top).exp_()
        self.sum *= decay
        self.acc.view(-1, self.group, self.width).mul_(decay.unsqueeze(-1))
        weights = scores.sub_(self.top.index_select(0, rows).view(*scores.shape[:2], 1)).exp_()
        self.sum.scatter_add_(0, narrow, weights.sum(-1).view(-1, self.group))
        added = torch.bmm(weights, v).view(rows.shape[0], -1)
        self.acc.scatter_add_(0, rows.unsqueeze(1).expand_as(added), added)

    def view(self, table: torch.Tensor) -> torch.Tensor:
        """A table without its spare row: (Z, T, ...)."""
        return table[:-1].view(self.z, self.new, -1)

    def finish(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Output (Z, T, I, D) and lse (Z, T, I)."""
        total = self.view(self.sum)
        out = self.view(self.acc).unflatten(-1, (self.group, self.width)) / total.unsqueeze(-1)
        return out, self.view(self.top) + total.log()


def attend_one(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, taken: torch.Tensor, sparse: SparseConfig
) -> torch.Tensor:
    """Decoding: one query per z, whose keys are gathered and attended to at once.

    q (Z, 1, I, D) scaled and wide, k, v (B, S, G, D), taken (Z, 1, N) bool -> (Z, 1, I, D).
    """
    keys, z = _Keys(k, v, sparse), torch.arange(q.shape[0])
    size = sparse.block_size
    # every query takes the same number of blocks
    first = taken.nonzero()[:, 2].view(q.shape[0], -1, 1) * size
    chosen = (first + torch.arange(size)).flatten(1)
    start = geometry.first_local((keys.length - 1) // size, sparse) * size
    local = torch.arange(start, keys.length).expand(q.shape[0], -1)
    k, v = keys.gather(keys.places(z, torch.cat([chosen, local], dim=1)))
    weights = torch.bmm(q.squeeze(1), k.transpose(1, 2)).softmax(-1)
    return torch.bmm(weights, v).unsqueeze(1)


def _window_tiles(
    chunk: Chunk, first: int, sparse: SparseConfig
) -> Iterator[tuple[slice, int, int]]:
    """Split a chunk where the own block changes: (queries, first key, last key + 1)."""
    position, stop = first + chunk.start, first + chunk.stop
    while position < stop:
        block = position // sparse.block_size
        end = min(stop, (block + 1) * sparse.block_size)
        part = slice(position - first - chunk.start, end - first - chunk.start)
        yield part, geometry.first_local(block, sparse) * sparse.block_size, end
        position = end


def _window_scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Causal scores (Z, n, I, keys) of q (Z, n, I, D), which are the last of k (Z, keys, D)."""
    new = q.shape[1]
    scores = torch.bmm(q.flatten(1, 2), k.transpose(1, 2)).view(*q.shape[:3], -1)
    if new > 1:
        future = torch.ones(new, new - 1, dtype=torch.bool).triu().unsqueeze(1)
        scores[..., 1 - new :].masked_fill_(future, -torch.inf)
    return scores


def _with_spare(x: torch.Tensor) -> torch.Tensor:
    """x (Z, T, I, ...) as a flat table (Z T + 1, I ...) whose last row is 0."""
    table = x.flatten(0, 1).flatten(1)
    return torch.cat([table, table.new_zeros(1, table.shape[1])])


def _slices(meetings: Meetings, group: int, block: int) -> Iterator[Meetings]:
    """Meetings in portions whose scores stay within TEMPORARY elements."""
    items, slots = meetings.queries.shape
    step = max(1, TEMPORARY // (slots * group * block))
    for start in range(0, items, step):
        part = slice(start, start + step)
        yield Meetings(meetings.blocks[part], meetings.queries[part])


class BlockAttention(torch.autograd.Function):
    """Attention over window and chosen blocks; every query must stand at or past the budget."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        chunks: list[Chunk],
        sparse: SparseConfig,
    ) -> torch.Tensor:
        """q (Z, T, I, D) scaled and wide, k, v (B, S, G, D) of any type -> (Z, T, I, D)."""
        keys, first = _Keys(k, v, sparse), k.shape[1] - q.shape[1]
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:3])
        for chunk in chunks:
            part = slice(chunk.start, chunk.stop)
            out[:, part], lse[:, part] = _forward_chunk(q[:, part], keys, chunk, first)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.chunks, ctx.sparse = chunks, sparse
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, out_grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of q, k and v through the attended pairs."""
        q, k, v, out, lse = ctx.saved_tensors
        keys, first = _Keys(k, v, ctx.sparse), k.shape[1] - q.shape[1]
        grads = _Gradients(q, k, v)
        share = (out_grad * out).sum(-1)  # (Z, T, I)
        for chunk in ctx.chunks:
            part = slice(chunk.start, chunk.stop)
            inputs = _Saved(q[:, part], out_grad[:, part], lse[:, part], share[:, part])
            grads.q[:, part] = _backward_chunk(inputs, grads, keys, chunk, first)
        return grads.q, grads.k.to(k.dtype), grads.v.to(v.dtype), None, None


def _forward_chunk(
    q: torch.Tensor, keys: _Keys, chunk: Chunk, first: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (Z, T, I, D) and lse (Z, T, I) of the queries q (Z, T, I, D) of one chunk."""
    running, group = _Running(q), q.shape[2]
    for part, start, stop in _window_tiles(chunk, first, keys.sparse):
        k, v = keys.window(start, stop)
        running.begin(part, _window_scores(q[:, part], k), v)
    table = _with_spare(q)
    for blocks, queries in _slices(chunk.meetings, group, keys.sparse.block_size):
        k, v = keys.gather(keys.block_places(blocks))
        rows = table.index_select(0, queries.flatten()).view(blocks.shape[0], -1, q.shape[3])
        running.add(queries, torch.bmm(rows, k.transpose(1, 2)), v)
    return running.finish()


class _Saved(NamedTuple):
    """What the backward pass reads per query: (Z, T, I, D) twice, then (Z, T, I) twice."""

    q: torch.Tensor
    out_grad: torch.Tensor
    lse: torch.Tensor
    share: torch.Tensor  # rowsum(dO * O)


class _Gradients:
    """Gradient sums: q (Z, T, I, D), k and v (B, S, G, D)."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        self.q = torch.empty_like(q)
        self.k = torch.zeros(k.shape, dtype=q.dtype)
        self.v = torch.zeros(v.shape, dtype=q.dtype)

    def add_window(self, start: int, stop: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Add k, v (Z, stop - start, D) to the keys start .. stop - 1."""
        for total, part in ((self.k, k), (self.v, v)):
            target = total[:, start:stop].transpose(1, 2)
            target += part.view(target.shape)

    def add_blocks(self, places: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Add k, v (items, M, D) to the flat rows `places` (items, M)."""
        for total, part in ((self.k, k), (self.v, v)):
            rows = part.reshape(-1, part.shape[-1])
            flat = total.view(-1, part.shape[-1])
            flat.scatter_add_(0, places.view(-1, 1).expand_as(rows), rows)


class _PairGradients(NamedTuple):
    """Gradients of one product: queries (n, rows, D), keys and values (n, keys, D)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


def _pair_gradients(
    scores: torch.Tensor, saved: _Saved, k: torch.Tensor, v: torch.Tensor
) -> _PairGradients:
    """Gradients through scores (n, rows, keys), consumed; saved (n, rows, D) and (n, rows, 1)."""
    weights = scores.sub_(saved.lse).exp_()
    v_grad = torch.bmm(weights.transpose(1, 2), saved.out_grad)
    weights_grad = torch.bmm(saved.out_grad, v.transpose(1, 2))
    scores_grad = weights_grad.sub_(saved.share).mul_(weights)
    q_grad, k_grad = torch.bmm(scores_grad, k), torch.bmm(scores_grad.transpose(1, 2), saved.q)
    return _PairGradients(q_grad, k_grad, v_grad)


def _backward_chunk(
    saved: _Saved, grads: _Gradients, keys: _Keys, chunk: Chunk, first: int
) -> torch.Tensor:
    """Add the key and value gradients of one chunk; return its queries' (Z, T, I, D)."""
    z, new, group, width = saved.q.shape
    q_grad = saved.q.new_zeros(z * new + 1, group * width)
    own = q_grad[:-1].view(z, new, group * width)
    for part, start, stop in _window_tiles(chunk, first, keys.sparse):
        k, v = keys.window(start, stop)
        scores = _window_scores(saved.q[:, part], k).flatten(1, 2)
        here = _Saved(*(x[:, part].reshape(z, scores.shape[1], -1) for x in saved))
        pair = _pair_gradients(scores, here, k, v)
        own[:, part] = pair.q.view(z, -1, group * width)
        grads.add_window(start, stop, pair.k, pair.v)
    tables = [_with_spare(x) for x in saved]
    for blocks, queries in _slices(chunk.meetings, group, keys.sparse.block_size):
        places, rows = keys.block_places(blocks), queries.flatten()
        k, v = keys.gather(places)
        shape = (blocks.shape[0], queries.shape[1] * group, -1)
        here = _Saved(*(x.index_select(0, rows).view(shape) for x in tables))
        pair = _pair_gradients(torch.bmm(here.q, k.transpose(1, 2)), here, k, v)
        added = pair.q.view(rows.shape[0], -1)
        q_grad.scatter_add_(0, rows.unsqueeze(1).expand_as(added), added)
        grads.add_blocks(places, pair.k, pair.v)
    return own.unflatten(-1, (group, width))
