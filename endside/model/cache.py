"""Keys, values and their summaries: one static pool of pages, a list of pages per sequence.

A page holds one block of keys (64 tokens). InfLLM's summaries live in the page that holds the
LAST token of their window: fine kernel j ends at token 16j + 31 and so takes slot j + 1 counted
over the sequence, four to a page; coarse kernel m ends at 64m + 127 and takes slot m + 1, one to a
page. What a page holds therefore depends only on tokens up to its own end, which makes every
operation exact:

    append   writes rows, then pools the windows they complete
    trim     forgets a tail: a summary is valid iff its window is, so lengths say everything
    accept   gathers the kept rows of a draft tree, then pools from the tree's start again
    fork     shares full pages and copies the last, partial one; a shared page is copied on write
    shrink   gives back the pages behind the last token that is kept

A sequence gets consecutive pages where the pool has them, so that `view` is a slice; scattered
pages are gathered. Memory is allocated once; nothing here grows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch

from endside.errors import UserError
from endside.model.config import ModelConfig
from endside.ops.infllm.reference import compress

PAGE = 64  # tokens; equals the block size of sparse attention


Rows = slice | torch.Tensor  # entries of a pool


class CacheFull(Exception):
    """No page is free for the asked-for tokens."""


@dataclass
class _Sequence:
    """Pages in order; `stored` tokens are visible, those before `base` precede the last append."""

    pages: list[int] = field(default_factory=list)
    stored: int = 0
    base: int = 0


class Cache:
    """One pool for `tokens` tokens of every layer."""

    def __init__(
        self, config: ModelConfig, *, tokens: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.pages = -(-tokens // PAGE)
        self.sparse = config.sparse
        layers, groups, width = (
            config.num_hidden_layers,
            config.num_key_value_heads,
            config.head_dim,
        )
        place = {"dtype": dtype, "device": device}
        shape = (layers, self.pages * PAGE, groups, width)
        # Left unwritten: the system then commits memory page by page, as tokens arrive.
        self._keys, self._values = torch.empty(shape, **place), torch.empty(shape, **place)
        if self.sparse is not None:
            assert self.sparse.block_size == PAGE, "sparse block size differs from the page size"
            fine = self.pages * PAGE // self.sparse.kernel_stride
            self._fine = torch.empty(layers, fine, groups, width, **place)
            self._coarse = torch.empty(layers, self.pages, groups, width, **place)
        self._users = [0] * self.pages
        self._sequences: dict[int, _Sequence] = {}
        self._next = 0

    @property
    def capacity(self) -> int:
        """Tokens the whole pool holds."""
        return self.pages * PAGE

    def open(self, tokens: int) -> int:
        """Reserve pages for a sequence of at most `tokens` -> its number. Raises CacheFull."""
        return self._add(_Sequence(self._take(-(-tokens // PAGE))))

    def length(self, seq: int) -> int:
        """Tokens stored for `seq`."""
        return self._sequences[seq].stored

    def append(self, layer: int, seq: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write k, v (T, G, D) behind the stored tokens; `advance` adds them to the length."""
        new = k.shape[0]
        state = self._sequences[seq]
        if state.stored + new > len(state.pages) * PAGE:
            raise CacheFull(
                f"sequence {seq} has room for {len(state.pages) * PAGE} tokens, "
                f"{state.stored + new} are needed: open it with more"
            )
        if layer == 0:
            self._own(state, state.stored, new)
        rows = self._rows(state, state.stored, state.stored + new)
        self._keys[layer, rows], self._values[layer, rows] = k, v
        if self.sparse is not None:
            self._summarise(layer, state, state.stored, state.stored + new)

    def advance(self, seq: int, new: int) -> None:
        """The last `new` appended tokens of every layer count from now on."""
        state = self._sequences[seq]
        state.base, state.stored = state.stored, state.stored + new

    def view(self, layer: int, seq: int, new: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (S, G, D) of the stored tokens and `new` more that were just appended."""
        state = self._sequences[seq]
        rows = self._rows(state, 0, state.stored + new)
        return self._keys[layer, rows], self._values[layer, rows]

    def summaries(self, layer: int, seq: int, new: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Fine (N1, G, D) and coarse (N2, G, D) summaries of the same tokens."""
        state = self._sequences[seq]
        length = state.stored + new
        fine, coarse = self.sparse.fine_count(length), self.sparse.coarse_count(length)
        per_page = PAGE // self.sparse.kernel_stride
        return (
            self._fine[layer, self._rows(state, 1, 1 + fine, per_page)],
            self._coarse[layer, self._rows(state, 1, 1 + coarse, 1)],
        )

    def trim(self, seq: int, length: int) -> None:
        """Forget the tokens from position `length` on."""
        state = self._sequences[seq]
        assert 0 <= length <= state.stored, f"cannot trim {state.stored} tokens to {length}"
        state.stored, state.base = length, min(state.base, length)

    def extend(self, seq: int, source: int, new: int) -> None:
        """Store behind `seq` the `new` tokens that `source`, a fork of it, has at these places."""
        state, other = self._sequences[seq], self._sequences[source]
        start, end = state.stored, state.stored + new
        assert other.stored >= end, f"{new} tokens behind {start} are asked for: there are fewer"
        self._own(state, start, new)
        target, written = self._indices(state, start, end), self._indices(other, start, end)
        for pool in (self._keys, self._values):
            pool[:, target] = pool[:, written]
        if self.sparse is not None:
            for layer in range(self._keys.shape[0]):
                self._summarise(layer, state, start, end)
        self.advance(seq, new)

    def fork(self, seq: int, tokens: int, length: int | None = None) -> int:
        """A new sequence with the first `length` stored tokens, or all; room for `tokens`."""
        source = self._sequences[seq]
        stored = source.stored if length is None else length
        assert stored <= source.stored, f"{stored} tokens are asked for, {source.stored} are stored"
        assert tokens >= stored, f"{stored} tokens do not fit in {tokens}"
        full = stored // PAGE
        fresh = self._take(-(-tokens // PAGE) - full)
        for page in source.pages[:full]:
            self._users[page] += 1
        if stored % PAGE:
            self._copy(source.pages[full], fresh[0])
        return self._add(_Sequence(source.pages[:full] + fresh, stored, stored))

    def shrink(self, seq: int, tokens: int) -> None:
        """Forget the tokens from number `tokens` on, and give back the pages behind them."""
        state = self._sequences[seq]
        self.trim(seq, min(tokens, state.stored))
        kept = -(-tokens // PAGE)
        for page in state.pages[kept:]:
            self._users[page] -= 1
        del state.pages[kept:]

    def room(self, closing: Iterable[int] = ()) -> int:
        """Tokens for which pages are free, or would be if these sequences were closed."""
        users = list(self._users)
        for seq in closing:
            for page in self._sequences[seq].pages:
                users[page] -= 1
        return users.count(0) * PAGE

    def export(self, seq: int, tokens: int) -> dict[str, np.ndarray]:
        """The bytes of a sequence's first `tokens` tokens: "keys" (L, S, G * D * size) uint8, …"""
        return {
            name: pool[:, index].contiguous().cpu().flatten(2).view(torch.uint8).numpy()
            for name, pool, index in self._filled(seq, tokens)
        }

    def restore(self, seq: int, arrays: Mapping[str, np.ndarray], tokens: int) -> None:
        """Fill an opened, empty sequence with what `export` gave; UserError where sizes differ."""
        parts = self._filled(seq, tokens)
        if {name for name, _, _ in parts} != arrays.keys():
            raise UserError(
                f"a saved cache holds {', '.join(arrays)}, this model {[one[0] for one in parts]}: "
                "save the session again with this model"
            )
        rows = {}
        for name, pool, index in parts:
            array = arrays[name]
            wanted = (*pool[:, index].shape[:2], pool[0, 0].numel() * pool.element_size())
            if array.shape != wanted or array.dtype != np.uint8:
                raise UserError(
                    f"saved {name} are {array.dtype} {array.shape}, this model's are uint8 "
                    f"{wanted}: save the session again with this model"
                )
            rows[name] = torch.from_numpy(np.array(array)).view(pool.dtype).to(pool.device)
        for name, pool, index in parts:
            pool[:, index] = rows[name].unflatten(2, pool.shape[2:])
        self.advance(seq, tokens)

    def close(self, seq: int) -> None:
        """Give the pages of `seq` back."""
        for page in self._sequences.pop(seq).pages:
            self._users[page] -= 1

    def _filled(self, seq: int, tokens: int) -> list[tuple[str, torch.Tensor, Rows]]:
        """(name, pool, rows) of all that belongs to the first `tokens` tokens."""
        state = self._sequences[seq]
        rows = self._rows(state, 0, tokens)
        parts = [("keys", self._keys, rows), ("values", self._values, rows)]
        if self.sparse is not None:
            fine, coarse = self.sparse.fine_count(tokens), self.sparse.coarse_count(tokens)
            per_page = PAGE // self.sparse.kernel_stride
            parts.append(("fine", self._fine, self._rows(state, 1, 1 + fine, per_page)))
            parts.append(("coarse", self._coarse, self._rows(state, 1, 1 + coarse, 1)))
        return parts

    def _add(self, state: _Sequence) -> int:
        seq, self._next = self._next, self._next + 1
        self._sequences[seq] = state
        return seq

    def _take(self, count: int) -> list[int]:
        """`count` free pages, consecutive where possible (the smallest run that fits)."""
        empty = [page for page, users in enumerate(self._users) if not users]
        if count > len(empty):
            raise CacheFull(f"{count} pages of {PAGE} tokens are needed, {len(empty)} are free")
        fitting = [run for run in _runs(empty) if len(run) >= count]
        taken = (min(fitting, key=len) if fitting else empty)[:count]
        for page in taken:
            self._users[page] += 1
        return taken

    def _own(self, state: _Sequence, start: int, new: int) -> None:
        """Copy the pages that tokens start .. start + new would change under another sequence."""
        for index in range(start // PAGE, -(-(start + new) // PAGE)):
            shared = state.pages[index]
            if self._users[shared] > 1:
                (state.pages[index],) = self._take(1)
                self._users[shared] -= 1
                self._copy(shared, state.pages[index])

    def _copy(self, source: int, target: int) -> None:
        pools = [(self._keys, PAGE), (self._values, PAGE)]
        if self.sparse is not None:
            pools += [(self._fine, PAGE // self.sparse.kernel_stride), (self._coarse, 1)]
        for pool, size in pools:
            pool[:, target * size : (target + 1) * size] = pool[
                :, source * size : (source + 1) * size
            ]

    def _summarise(self, layer: int, state: _Sequence, start: int, end: int) -> None:
        """Pool the windows that end within tokens start .. end of `layer`."""
        cfg = self.sparse
        per_page = PAGE // cfg.kernel_stride
        for pool, size, stride, slots, count in (
            (self._fine, cfg.kernel_size, cfg.kernel_stride, per_page, cfg.fine_count),
            (self._coarse, cfg.coarse_size, cfg.coarse_stride, 1, cfg.coarse_count),
        ):
            first, last = count(start), count(end)
            if last > first:
                window = slice(first * stride, (last - 1) * stride + size)
                keys = self._keys[layer, self._rows(state, window.start, window.stop)]
                pool[layer, self._rows(state, first + 1, last + 1, slots)] = compress(
                    keys[None], size, stride
                )[0]

    def _rows(self, state: _Sequence, start: int, end: int, size: int = PAGE) -> Rows:
        """Where entries start .. end of a sequence lie in a pool of `size` entries per page."""
        if start >= end:
            return slice(0, 0)
        first, last = start // size, (end - 1) // size
        if state.pages[last] - state.pages[first] == last - first and _is_run(
            state.pages[first : last + 1]
        ):
            shift = (state.pages[first] - first) * size
            return slice(start + shift, end + shift)
        return self._indices(state, start, end, size)

    def _indices(self, state: _Sequence, start: int, end: int, size: int = PAGE) -> torch.Tensor:
        pages = torch.tensor(state.pages, dtype=torch.long, device=self._keys.device)
        entry = torch.arange(start, end, device=self._keys.device)
        return pages[entry // size] * size + entry % size


def _is_run(pages: list[int]) -> bool:
    return all(b == a + 1 for a, b in pairwise(pages))


def _runs(pages: list[int]) -> list[list[int]]:
    """Ascending page numbers split where they are not consecutive."""
    runs: list[list[int]] = []
    for page in pages:
        if runs and runs[-1][-1] == page - 1:
            runs[-1].append(page)
        else:
            runs.append([page])
    return runs
