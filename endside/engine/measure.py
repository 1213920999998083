"""How fast an executor is at a given depth: prefill and decode, and how many keys a token sees.

A depth of 128K tokens takes minutes to reach and nothing here depends on what the cache holds, so
`stand` computes a prefix of some thousand tokens and repeats its chunks up to the depth asked for.
That holds for sparse attention too: choosing blocks scores every summary and keeps the same number
of them, whatever they say. (Copies tie; the choice is made all the same.) `stand(depth, depth)` is
a real prefill, with which bench/vs_llamacpp.py compares at 4K and 16K. An executor that has no
chunks to copy prefills for real.

Weights may be random and tokens are: neither changes what a step costs.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from endside.errors import UserError
from endside.native.model import CHUNK

if TYPE_CHECKING:
    from endside.engine.executor import Executor
    from endside.engine.executors.native import NativeExecutor
    from endside.model.config import ModelConfig

BASE = 4096  # tokens of a real prefix
ROWS = 512  # tokens of one call


@dataclass(frozen=True)
class Sight:
    """Keys that a token attends to, and keys there are: means over rows, layers and key heads."""

    visible: float
    available: float

    @property
    def share(self) -> float:
        """1 is dense."""
        return self.visible / self.available


class Bench:
    """One sequence of an executor that stands at a depth; what is run there is forgotten again."""

    def __init__(self, executor: Executor, seed: int = 0) -> None:
        self.executor = executor
        self.depth = 0
        self._seq = executor.open(executor.context)
        self._rng = np.random.default_rng(seed)
        self._prefix = 0  # tokens at the start that a real prefill made and nothing overwrote

    def stand(self, depth: int, base: int = BASE) -> float:
        """Go to `depth` stored tokens, of which at least the first `base` are real; seconds."""
        self._check(depth)
        begun = time.perf_counter()
        native = as_native(self.executor)
        real = min(depth, max(CHUNK, base // CHUNK * CHUNK)) if native and base < depth else depth
        if native is None:
            self._prefix = min(self._prefix, depth)
        self._set_length(min(self._prefix, real))
        if real > self._prefix:
            self.executor.prefill(self._seq, self._tokens(real - self._prefix), logits="none")
            self._prefix = real
        if native and depth > real:
            self._repeat(native, depth, real // CHUNK)
        self.depth = depth
        return time.perf_counter() - begun

    def prefill(self, tokens: int) -> float:
        """Seconds to run that many new tokens up to the logits of the last."""
        self._check(self.depth + tokens)
        ids = self._tokens(tokens)
        begun = time.perf_counter()
        self.executor.prefill(self._seq, ids, logits="last")
        seconds = time.perf_counter() - begun
        self._forget()
        return seconds

    def decode(self, tokens: int) -> list[float]:
        """Seconds of each of that many steps of one token."""
        self._check(self.depth + tokens)
        ids, each = self._tokens(tokens), []
        for index in range(tokens):
            begun = time.perf_counter()
            self.executor.decode([self._seq], ids[index : index + 1])
            each.append(time.perf_counter() - begun)
        self._forget()
        return each

    def sight(self, tokens: int = 1) -> Sight:
        """What `tokens` new tokens here see: counted by the core, elsewhere what the shape says."""
        self._check(self.depth + tokens)
        native = as_native(self.executor)
        if native is None:
            return self.expected(tokens)
        ids = self._tokens(tokens)
        pieces = [ids[start : start + ROWS] for start in range(0, tokens, ROWS)]
        seen = np.concatenate([native.visible(self._seq, piece) for piece in pieces], axis=1)
        self._forget()
        return Sight(float(seen.mean()), self.depth + (tokens + 1) / 2)

    def expected(self, tokens: int = 1) -> Sight:
        """What they should see, from the shape alone."""
        ends = range(self.depth + 1, self.depth + tokens + 1)
        seen = np.array([self.executor.attention(end)[1] for end in ends])
        return Sight(float(seen.mean()), self.depth + (tokens + 1) / 2)

    def _repeat(self, native: NativeExecutor, depth: int, chunks: int) -> None:
        """Fill the cache up to `depth` with copies of the first `chunks` chunks, in turn."""
        state = native.sequences[self._seq]
        for index in range(chunks, -(-depth // CHUNK)):
            source, target = state.chunks[index % chunks], state.chunks[index]
            native.model.copy_chunk(int(source), int(target))
        state.stored = depth
        self._prefix = min(self._prefix, chunks * CHUNK)

    def _set_length(self, length: int) -> None:
        """The sequence ends here; chunks keep what they hold, so the native one may grow again."""
        if native := as_native(self.executor):
            native.sequences[self._seq].stored = length
        else:
            self.executor.trim(self._seq, length)

    def _forget(self) -> None:
        self.executor.trim(self._seq, self.depth)
        self._prefix = min(self._prefix, self.depth)

    def _tokens(self, count: int) -> np.ndarray:
        return self._rng.integers(3, self.executor.vocab_size, count)

    def _check(self, tokens: int) -> None:
        if tokens > self.executor.context:
            raise UserError(
                f"{tokens:,} tokens are more than the context of {self.executor.context:,} "
                "that was planned: ask for a longer context"
            )


def as_native(executor: Executor) -> NativeExecutor | None:
    """The executor, where it is the native one."""
    from endside.engine.executors.native import NativeExecutor

    return executor if isinstance(executor, NativeExecutor) else None


def weight_bytes(executor: Executor) -> int | None:
    """Bytes of packed weights that one decode step reads; None where the executor cannot say."""
    native = as_native(executor)
    if native is None:
        return None
    return sum(matrix.nbytes for matrix in native.pack.matrices.values())


def cache_bytes(config: ModelConfig, sight: Sight, element_bytes: float) -> float:
    """Bytes of keys, values and summaries that one decode step reads."""
    keys = 2 * sight.visible
    if config.sparse is not None and sight.share < 1:
        fine = sight.available / config.sparse.kernel_stride
        keys += fine * (1.25 if config.sparse.lse == "coarse" else 1)
    width = config.num_key_value_heads * config.head_dim
    return keys * width * config.num_hidden_layers * element_bytes


def bandwidth(size: int, threads: int, repeats: int = 5) -> float:
    """Bytes per second of the median of some reads of `size` bytes, each thread its own share.

    The reader is numpy's maximum over bytes: close to what memory gives, and portable. The exact
    probe, which also chooses the page kind, is bench/limits.cc.
    """
    share = max(1, size // threads)
    parts = [np.ones(share, np.uint8) for _ in range(threads)]
    seconds = []
    for _ in range(repeats + 1):
        team = [threading.Thread(target=part.max) for part in parts]
        begun = time.perf_counter()
        for one in team:
            one.start()
        for one in team:
            one.join()
        seconds.append(time.perf_counter() - begun)
    return share * threads / float(np.median(seconds[1:]))
