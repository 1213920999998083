"""Which chunk of the cache holds which tokens of which sequence.

The core stores keys and values in chunks of 1,024 tokens (native/src/cache.h); a chunk also holds
the summaries of every window of keys that ends in it, so what it holds depends on nothing after its
own end. All chunks a sequence may ever need are taken when it is opened: a running sequence never
waits.

    fork    shares full chunks by counting their users, and copies the last, partial one
    shrink  gives back the chunks behind the last token that is kept
    own     before tokens are stored, a shared chunk that they change is copied (after a trim)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from endside.engine.executor import Full
from endside.native.model import CHUNK


@dataclass
class Sequence:
    """Chunks in order, tokens stored, and the tokens of a draft tree that waits for a verdict."""

    chunks: np.ndarray  # int32
    room: int  # tokens
    stored: int = 0
    draft: np.ndarray | None = None  # (T,) token ids
    parents: np.ndarray | None = None  # (T,) rows of the tree, -1: the last stored token

    @property
    def pending(self) -> int:
        """Rows of the tree."""
        return 0 if self.draft is None else len(self.draft)


class Sequences:
    """The pool of `count` chunks. `copy(source, target)` copies one inside the core."""

    def __init__(self, count: int, *, copy: Callable[[int, int], None]) -> None:
        self._copy = copy
        self._users = [0] * count
        self._sequences: dict[int, Sequence] = {}
        self._next = 0

    def room(self, closing: Iterable[int] = ()) -> int:
        """Tokens for which chunks are free, or would be if these sequences were closed."""
        users = list(self._users)
        for seq in closing:
            for chunk in self._sequences[seq].chunks:
                users[chunk] -= 1
        return users.count(0) * CHUNK

    def __getitem__(self, seq: int) -> Sequence:
        return self._sequences[seq]

    def open(self, tokens: int) -> int:
        """Take chunks for `tokens` tokens -> the sequence's number. Raises Full."""
        return self._add(Sequence(self._take(_chunks(tokens)), tokens))

    def fork(self, seq: int, tokens: int, length: int | None = None) -> int:
        """A new sequence with the first `length` stored tokens, or all; room for `tokens`."""
        source = self._sequences[seq]
        assert not source.pending, "a verified draft is undecided: accept or trim it first"
        stored = source.stored if length is None else length
        assert stored <= source.stored, f"{stored} tokens are asked for, {source.stored} are stored"
        assert tokens >= stored, f"{stored} tokens do not fit in {tokens}"
        shared = stored // CHUNK
        fresh = self._take(_chunks(tokens) - shared)
        for chunk in source.chunks[:shared]:
            self._users[chunk] += 1
        if stored % CHUNK:
            self._copy(int(source.chunks[shared]), int(fresh[0]))
        chunks = np.concatenate([source.chunks[:shared], fresh])
        return self._add(Sequence(chunks, tokens, stored))

    def shrink(self, seq: int, tokens: int) -> None:
        """No more than `tokens` tokens will be stored: give back the chunks behind them."""
        state = self._sequences[seq]
        kept = _chunks(tokens)
        for chunk in state.chunks[kept:]:
            self._users[chunk] -= 1
        state.chunks = state.chunks[:kept].copy()
        state.room = min(state.room, tokens)

    def close(self, seq: int) -> None:
        """Give the chunks of `seq` back."""
        for chunk in self._sequences.pop(seq).chunks:
            self._users[chunk] -= 1

    def own(self, growing: dict[int, int]) -> None:
        """Make room for new tokens (sequence -> how many): copies what they would change under
        others. Raises Full before anything is copied where no chunk is left for that.
        """
        shared = []
        for seq, new in growing.items():
            state = self._sequences[seq]
            assert state.stored + new <= state.room, (
                f"sequence {seq} has room for {state.room} tokens, {state.stored + new} are needed"
            )
            changed = range(state.stored // CHUNK, _chunks(state.stored + new))
            shared += [(state, one) for one in changed if self._users[state.chunks[one]] > 1]
        if not shared:
            return
        for (state, index), fresh in zip(shared, self._take(len(shared)), strict=True):
            old = int(state.chunks[index])
            if index < _chunks(state.stored):
                self._copy(old, int(fresh))
            state.chunks[index] = fresh
            self._users[old] -= 1

    def _take(self, count: int) -> np.ndarray:
        empty = [chunk for chunk, users in enumerate(self._users) if not users]
        if count > len(empty):
            raise Full(f"{count} chunks of {CHUNK} tokens are needed, {len(empty)} are free")
        for chunk in empty[:count]:
            self._users[chunk] = 1
        return np.array(empty[:count], dtype=np.int32)

    def _add(self, state: Sequence) -> int:
        seq, self._next = self._next, self._next + 1
        self._sequences[seq] = state
        return seq


def _chunks(tokens: int) -> int:
    return -(-tokens // CHUNK)
