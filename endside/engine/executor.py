"""One interface over every backend: token ids in, logits out, a static pool of cache pages between.

Speculation, constraints and sampling are written once above this protocol (the core idea of
ArkInfer); a backend only runs the model. Arrays at this border are numpy, so that an executor
without PyTorch never loads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np


class Full(Exception):
    """The page pool cannot hold that many tokens now; it may once a sequence is closed."""


class Executor(Protocol):
    """A loaded model with its page pool. A sequence is a small integer handed out by `open`."""

    name: str  # "torch", "native", …
    vocab_size: int
    context: int  # longest sequence, in tokens
    capacity: int  # tokens in the whole page pool, page-rounded
    page: int  # tokens in a page: what sequences take, share and give back
    feature_layers: tuple[int, ...]  # settable: what `features` gives; (): nothing is kept
    row_exact: bool  # a row's bits depend on its sequence alone, not on how rows are cut or batched

    def open(self, tokens: int) -> int:
        """Reserve pages for a sequence of at most `tokens`. Raises Full when they are taken."""
        ...

    def length(self, seq: int) -> int:
        """Tokens stored for `seq`."""
        ...

    def prefill(self, seq: int, tokens: np.ndarray, *, logits: str = "last") -> np.ndarray | None:
        """Append `tokens` (T,) int64. "last" -> (V,), "all" -> (T, V), "none" -> None; float32."""
        ...

    def decode(self, seqs: list[int], tokens: np.ndarray) -> np.ndarray:
        """Append tokens (B,), one to each of `seqs` -> logits (B, V) float32, row by row alone."""
        ...

    def verify(self, seq: int, tokens: np.ndarray, parents: np.ndarray) -> np.ndarray:
        """Append a draft tree provisionally; `parents` (T,) index it, -1: the last stored token.

        Returns logits (T, V); follow with `accept` (the path kept) or `trim`.
        """
        ...

    def accept(self, seq: int, rows: list[int]) -> None:
        """Keep these rows of the last verified tree, root to leaf, and drop the others."""
        ...

    def trim(self, seq: int, length: int) -> None:
        """Forget every token of `seq` from position `length` on."""
        ...

    def fork(self, seq: int, tokens: int, length: int | None = None) -> int:
        """A new sequence that shares `seq`'s first `length` stored tokens (None: all of them).

        It has room for `tokens` in all. Raises Full.
        """
        ...

    def shrink(self, seq: int, tokens: int) -> None:
        """Keep the first `tokens` tokens and give back the pages that only more would need."""
        ...

    def room(self, closing: Iterable[int] = ()) -> int:
        """Tokens that `open` finds pages for, or would if these sequences were closed."""
        ...

    def close(self, seq: int) -> None:
        """Give the pages of `seq` back."""
        ...

    def features(self, seq: int) -> np.ndarray:
        """What `feature_layers` ask of the rows of the last call that ran `seq` (T, F) float32.

        Each layer gives the residual stream that enters it (C); number L, the number of layers,
        what the output head reads: the last stream after the final norm.
        """
        ...

    def set_inputs(self, rows: np.ndarray) -> None:
        """Tokens vocab_size, vocab_size + 1, … enter the first layer as rows (I, C) float32.

        They can stand in a tree, to be asked what comes there; no model writes them.
        """
        ...

    def embed_rows(self, tokens: np.ndarray) -> np.ndarray:
        """tokens (T,) -> what enters the first layer (T, C) float32, for draft heads."""
        ...

    def head_rows(self, tokens: np.ndarray) -> np.ndarray:
        """The output head's weights for tokens (T,) -> (T, C) float32, for draft heads."""
        ...

    def attention(self, length: int) -> tuple[str, int]:
        """How the last of `length` tokens attends: "dense" or "sparse", and the keys it sees."""
        ...

    def identity(self) -> str:
        """A digest of all that the keys of a sequence depend on: weights, shape, rope, cache."""
        ...

    def export(self, seq: int, tokens: int) -> dict[str, np.ndarray]:
        """What is stored of the first `tokens` tokens of `seq`, compressed keys too, for a file."""
        ...

    def restore(self, arrays: Mapping[str, np.ndarray], tokens: int) -> int:
        """A sequence of `tokens` stored tokens from what `export` gave. Raises Full, UserError."""
        ...

    def trace(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """Run tokens (T,) by themselves -> what each stage gives, float32, in order of the stages.

        "embed" (T, C), "layer 0" (T, C): the residual stream behind each layer, …, "norm" (T, C),
        "logits" (T, V).
        """
        ...
