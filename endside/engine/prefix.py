"""Prompts that begin alike are computed once: what finished requests stored stays in the pool.

The idea is that of radix trees over cached sequences (SGLang, arXiv 2312.07104, section 3): tokens
are cut into pieces of equal length, a tree has one edge for each piece, and every sequence that
stores keys lies on the path of its tokens. A new request walks its prompt down the tree and starts
as a fork of a sequence that came as far. Pages are shared, not copied, so a kept prefix costs
memory once, and what belongs to a page (InfLLM's compressed keys among it) follows the fork.

An edge is looked up by the token ids themselves: their hash finds it, their equality proves it.

What may be taken over. An executor says by `row_exact` whether a row's bits depend on its sequence
alone. Where they do, pieces are 64 tokens, and an answer's tokens count like a prompt's: the keys
that decoding stored are those a prompt of the same tokens would store, so the next turn of a chat
starts behind the last one. Where they do not, keys depend on how rows were cut: pieces are whole
prefill chunks, of prompts alone, because these are cut the same way in every request. Either way
the same seed gives the same text, whether its prefix was found or computed.

Who holds what. Running sequences are in the tree while they read their prompt, so twins that
arrive together compute each piece once between them. A finished sequence is kept, cut down to its
whole pieces. Kept sequences only ever use pages that nobody asks for: a request that finds none
takes the last pieces of the least recently used ones, and none is taken in vain, when even all of
them together would not make room. The pool's `capacity` is therefore what decides how many prompts
are remembered, and a cache of one context remembers about one conversation.

What we chose not to do: keep prefixes on the disk by themselves (session files are asked for), and
look inside a piece for the last few equal tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from endside.engine.executor import Executor, Full

PIECE = 64  # tokens: a block of sparse attention


@dataclass(frozen=True)
class Counts:
    """What the cache did so far."""

    lookups: int = 0  # requests admitted
    hits: int = 0  # of them started behind a stored prefix, or met one on their way
    tokens_reused: int = 0
    tokens_dropped: int = 0  # to make room


@dataclass(eq=False)
class _Node:
    """One piece of tokens behind those of `parent`, and the sequences that store all of them."""

    parent: _Node | None = None
    key: bytes = b""
    children: dict[bytes, _Node] = field(default_factory=dict)
    holders: dict[int, None] = field(default_factory=dict)  # in order of arrival


class PrefixCache:
    """Opens and closes the sequences of one executor; `on=False`: it keeps and finds nothing.

    One cache serves an executor at a time: `clear` it before another takes over.
    """

    def __init__(self, executor: Executor, *, chunk: int, on: bool = True) -> None:
        self.executor = executor
        self.on = on
        self.piece = PIECE if executor.row_exact else chunk
        self.counts = Counts()
        self._root = _Node()
        self._paths: dict[int, list[_Node]] = {}  # of every sequence, running or kept
        self._kept: dict[int, None] = {}  # least recently used first

    @property
    def tokens(self) -> int:
        """Tokens of all kept sequences, those they share counted for each."""
        return sum(len(self._paths[seq]) for seq in self._kept) * self.piece

    def open(self, prompt: np.ndarray, limit: int) -> tuple[int, int]:
        """A sequence for `prompt` (S,) with room for `limit` tokens -> (it, tokens it has stored).

        At least the prompt's last token is left to run. Raises Full when pages must be waited for.
        """
        path = self._found(prompt)
        seq, path = self._fork(path, limit) if path else (-1, [])
        if not path:
            seq = self.reserve(limit)
        self._paths[seq] = []
        self._enter(seq, path)
        self._count(lookups=1, hits=bool(path), tokens_reused=len(path) * self.piece)
        return seq, len(path) * self.piece

    def further(self, seq: int, prompt: np.ndarray, stored: int, limit: int) -> tuple[int, int]:
        """Ask again before the next chunk: others may have stored more of the same prompt.

        -> (sequence, stored tokens), the old ones or those of a fork that takes its place.
        """
        path = self._found(prompt)
        length = len(path) * self.piece
        if length <= stored:
            return seq, stored
        try:
            fork = self.executor.fork(self._source(path), limit, length)
        except Full:
            return seq, stored
        self._paths[fork] = []
        self._enter(fork, path)
        self._drop(seq)
        self._count(hits=not stored, tokens_reused=length - stored)
        return fork, length

    def note(self, seq: int, stored: np.ndarray) -> None:
        """A running sequence has stored these tokens (S,) of its prompt so far."""
        if self.on:
            self._enter(seq, self._grown(self._paths[seq], stored))

    def close(self, seq: int, stored: np.ndarray, prompt: int) -> None:
        """A sequence ends; stored (S,): its tokens in the cache, of which `prompt` are given ones.

        It is kept where that may save work, else its pages are given back.
        """
        if not self.executor.row_exact:
            stored = stored[:prompt]
        if self.on:
            self._enter(seq, self._grown(self._paths[seq], stored))
        self._keep(seq)

    def add(self, seq: int, stored: np.ndarray) -> None:
        """Keep a sequence that was made elsewhere (a loaded session) and stores these tokens."""
        self._paths[seq] = []
        self._enter(seq, self._grown([], stored))
        self._keep(seq)

    def latest(self) -> tuple[int, np.ndarray]:
        """The kept sequence that was used last, and its tokens (S,) int64; (-1, none) without."""
        seq = next(reversed(self._kept), -1)
        keys = [node.key for node in self._paths.get(seq, [])]
        return seq, np.frombuffer(b"".join(keys), dtype=np.int64)

    def reserve(self, tokens: int) -> int:
        """A new sequence with room for `tokens`; kept ones give way. Raises Full."""
        while True:
            try:
                return self.executor.open(tokens)
            except Full:
                if self.executor.room(self._kept) < tokens:
                    raise
                self._shorten_oldest()

    def clear(self) -> None:
        """Give the pages of every kept sequence back."""
        for seq in list(self._kept):
            self._drop(seq)

    def _found(self, prompt: np.ndarray) -> list[_Node]:
        """The path of the longest stored beginning; the last token always stays outside."""
        if not self.on:
            return []
        path, node = [], self._root
        for key in _pieces(prompt[:-1], self.piece):
            child = node.children.get(key)
            if child is None:
                break
            path.append(child)
            node = child
        return path

    def _source(self, path: list[_Node]) -> int:
        """A sequence that stores the whole path, a kept one where there is one."""
        seqs = path[-1].holders
        seq = next((one for one in seqs if one in self._kept), next(iter(seqs)))
        if seq in self._kept:
            self._kept[seq] = self._kept.pop(seq)
        return seq

    def _fork(self, path: list[_Node], limit: int) -> tuple[int, list[_Node]]:
        """A fork behind as much of `path` as there is room for -> (it, that much); (-1, []): none.

        Sequences other than its source give way first, then what the source has behind the fork.
        """
        source = self._source(path)
        path = path[: self._shareable(source, len(path), limit)]
        while path:
            try:
                return self.executor.fork(source, limit, len(path) * self.piece), path
            except Full:
                if not self._shorten_oldest(source, len(path)):
                    break
        return -1, []

    def _shareable(self, source: int, most: int, limit: int) -> int:
        """The most pieces of `source` that a fork with room for `limit` tokens can share."""
        page, others = self.executor.page, [seq for seq in self._kept if seq != source]
        spare = self.executor.room(others) // page
        stored, own = -(-len(self._paths[source]) * self.piece // page), 0
        if source in self._kept:
            # pages are shared from the start, so those of its own are its last
            own = self.executor.room(self._kept) // page - spare
        for count in range(most, 0, -1):
            length = count * self.piece
            freed = min(own, stored + (-length // page))
            if -(-limit // page) - length // page <= spare + freed:
                return count
        return 0

    def _shorten_oldest(self, source: int = -1, least: int = 0) -> bool:
        """Take one piece from the sequence that was not used for longest; False: none is left.

        `source` is only cut down to its first `least` pieces.
        """
        for seq in self._kept:
            path = self._paths[seq]
            if seq == source and len(path) <= least:
                continue
            self._count(tokens_dropped=self.piece)
            if len(path) == 1:
                self._drop(seq)
            else:
                self._leave(seq, path.pop())
                self.executor.shrink(seq, len(path) * self.piece)
            return True
        return False

    def _grown(self, path: list[_Node], tokens: np.ndarray) -> list[_Node]:
        """`path`, prolonged by the whole pieces of `tokens` behind it."""
        node = path[-1] if path else self._root
        path = list(path)
        for key in _pieces(tokens, self.piece, len(path)):
            child = node.children.get(key)
            if child is None:
                child = node.children[key] = _Node(node, key)
            path.append(child)
            node = child
        return path

    def _enter(self, seq: int, path: list[_Node]) -> None:
        """Write `seq` into the nodes of its path that do not know it yet."""
        for node in path[len(self._paths[seq]) :]:
            node.holders[seq] = None
        self._paths[seq] = list(path)

    def _leave(self, seq: int, node: _Node) -> None:
        """Take `seq` out of a node, and a node that nobody stores out of the tree."""
        del node.holders[seq]
        if not node.holders and node.parent is not None:
            del node.parent.children[node.key]

    def _keep(self, seq: int) -> None:
        path = self._paths[seq]
        others = [one for one in path[-1].holders if one in self._kept] if path else []
        if others:
            # the last piece is there already: what was used now is used last
            self._kept[others[0]] = self._kept.pop(others[0])
        if others or not path:
            self._drop(seq)
            return
        self.executor.shrink(seq, len(path) * self.piece)
        self._kept[seq] = None
        for one in [one for one in path[0].holders if one in self._kept and one != seq]:
            if self._paths[one][-1] in path:
                self._drop(one)

    def _drop(self, seq: int) -> None:
        """Close a sequence and forget it."""
        for node in reversed(self._paths.pop(seq)):
            self._leave(seq, node)
        self._kept.pop(seq, None)
        self.executor.close(seq)

    def _count(self, **more: int) -> None:
        old = self.counts
        self.counts = Counts(**{**vars(old), **{k: vars(old)[k] + int(v) for k, v in more.items()}})


def _pieces(tokens: np.ndarray, size: int, start: int = 0) -> list[bytes]:
    """The whole pieces of `tokens` (S,) from number `start` on, as bytes."""
    whole = np.ascontiguousarray(tokens, dtype=np.int64)
    return [
        whole[at : at + size].tobytes() for at in range(start * size, len(whole) - size + 1, size)
    ]
