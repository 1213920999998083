"""The llama.cpp executor: a .gguf file run by that library, under our engine.

An adapter, to prove that what is written above the `Executor` protocol (sampling, constraints,
draft trees, prefix reuse) asks nothing of a backend that a foreign one could not give. It needs the
optional package llama-cpp-python and uses its low-level calls only; tokenizer and templates are
ours, and weights, kernels and keys are llama.cpp's. Attention is dense: the library knows no
InfLLM v2, so a sparse model runs here as the dense model that it also is.

How its cache is made to look like ours. llama.cpp keeps one pool of cells, and a cell belongs to
any number of its sequence numbers. A fork copies numbers, not keys (`seq_cp`); a trim takes a
number from cells (`seq_rm`). Reservation it does not know, so the pages of `native_sequences` count
for it: a page's cells are never more than its tokens.

    verify   every leaf of a draft tree gets a sequence number of its own behind a copy of the
             stored tokens, and a row carries the numbers of all leaves below it; so each row sees
             exactly its own path, in one pass
    accept   the cells of the kept path take the sequence's number; then the leaves' are dropped

Rows are not exact: how many rows run together decides which kernel sums them.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from endside.engine.executor import Full
from endside.engine.executors import Plan, check_length, default_context, free_memory
from endside.engine.executors.llamacpp_stages import Stages
from endside.engine.executors.native_pack import word_sum
from endside.engine.executors.native_plan import thread_count
from endside.engine.executors.native_sequences import Sequences
from endside.errors import UserError
from endside.native.model import CHUNK

if TYPE_CHECKING:
    from endside.checkpoint import Checkpoint
    from endside.model.config import ModelConfig

log = logging.getLogger(__name__)

ROWS, TREES = 512, 64  # rows of one pass, and of a draft tree, at most
NUMBERS = 128  # sequences at once; the leaves of a tree are numbered behind them
CACHES = {"f16": 1, "f32": 0}  # the library's numbers of types
TOKEN_BYTES = 4  # per value and layer: keys and values of 16 bits


@dataclass(frozen=True)
class Row:
    """One token of a pass: where it stands, whose it is, and whether its logits are asked for."""

    token: int
    position: int
    seqs: tuple[int, ...]
    wanted: bool


def load(checkpoint: Checkpoint, config: ModelConfig, plan: Plan) -> LlamaExecutor:
    """The model in the .gguf file that `checkpoint` was opened from."""
    path = _file(checkpoint)
    if plan.attention == "sparse":
        raise UserError(
            "attention sparse is asked for, and llama.cpp has dense attention only: use --executor "
            "native, or --attention dense"
        )
    if config.sparse is not None:
        log.warning("llama.cpp attends densely: the sparse settings of %s do not act", path.name)
    if plan.context is not None:
        context = check_length(plan.context, config)
    else:
        each = TOKEN_BYTES * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        context = default_context(config.max_position_embeddings, each, free_memory())
        context = min(context, plan.capacity or context)
    return LlamaExecutor(path, plan, context=context)


def _file(checkpoint: Checkpoint) -> Path:
    files = {(checkpoint.folder / info.file).resolve() for info in checkpoint.tensors.values()}
    if len(files) != 1 or next(iter(files)).suffix != ".gguf":
        raise UserError(
            f"{checkpoint.folder} holds no .gguf file, and llama.cpp reads nothing else: make one "
            "with `endside convert MODEL FILE.gguf --to gguf`"
        )
    return next(iter(files))


def library() -> Any:
    """The low-level module of llama-cpp-python; UserError where it is not installed."""
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"executor llamacpp needs the package llama-cpp-python ({error}): "
            "pip install 'endside[llamacpp]'"
        ) from error
    return llama_cpp


@cache
def _silence(library: Any) -> Any:
    """The library's log goes nowhere. It keeps one callback for all models, so ours never dies."""
    return library.llama_log_callback(lambda level, text, data: None)


class LlamaExecutor:
    """Implements `Executor`. The library's context with all its cells is made here, once."""

    name = "llamacpp"
    row_exact = False
    page = CHUNK
    feature_layers: tuple[int, ...] = ()

    def __init__(self, path: Path, plan: Plan, *, context: int, cache: str = "f16") -> None:
        self.library = library()
        self.path, self.context, self._cache = path, context, cache
        pages = -(-(plan.capacity or context) // CHUNK) + plan.max_batch - 1
        self.capacity = pages * CHUNK
        self.sequences = Sequences(pages, copy=lambda source, target: None)
        self._numbers = list(range(NUMBERS))[::-1]  # free ones, the smallest last
        self._number: dict[int, int] = {}  # sequence -> the library's number
        self._leaves: list[int] = []  # of the undecided tree: row of each leaf
        self._stages = Stages(self.library)
        self._model, self._context = self._made(plan)
        self._memory = self.library.llama_get_memory(self._context)
        vocab = self.library.llama_model_get_vocab(self._model)
        self.vocab_size = self.library.llama_vocab_n_tokens(vocab)

    def _made(self, plan: Plan) -> tuple[Any, Any]:
        """The library's model and context."""
        low = self.library
        low.llama_log_set(_silence(low), ctypes.c_void_p(0))
        low.llama_backend_init()
        wanted = low.llama_model_default_params()
        wanted.n_gpu_layers = 0
        model = low.llama_model_load_from_file(os.fsencode(self.path), wanted)
        if not model:
            raise UserError(
                f"llama.cpp does not read {self.path}: use --executor native, or another version "
                "of llama-cpp-python"
            )
        shape = low.llama_context_default_params()
        shape.n_ctx = self.capacity + TREES  # a tree's cells lie beside the reserved ones
        shape.n_batch = shape.n_ubatch = ROWS
        shape.n_seq_max, shape.kv_unified = NUMBERS + TREES, True
        shape.n_threads = shape.n_threads_batch = thread_count(plan.threads)
        shape.type_k = shape.type_v = CACHES[self._cache]
        shape.no_perf, shape.offload_kqv = True, False
        shape.cb_eval = self._stages.callback
        context = low.llama_init_from_model(model, shape)
        if not context:
            low.llama_model_free(model)
            raise UserError(
                f"llama.cpp cannot make a context of {self.context:,} tokens for {self.path.name}: "
                "lower --context"
            )
        return model, context

    def __del__(self) -> None:
        if getattr(self, "_context", None):
            self.library.llama_free(self._context)
            self.library.llama_model_free(self._model)

    def open(self, tokens: int) -> int:
        """Reserve cells for a sequence of at most `tokens`. Raises Full when they are taken."""
        return self._named(lambda: self.sequences.open(tokens))

    def length(self, seq: int) -> int:
        """Tokens stored for `seq`, an undecided draft included."""
        state = self.sequences[seq]
        return state.stored + state.pending

    def prefill(self, seq: int, tokens: np.ndarray, *, logits: str = "last") -> np.ndarray | None:
        """Append tokens (T,) -> "last" (V,), "all" (T, V), "none" None; float32."""
        assert logits in ("last", "all", "none"), f'logits is {logits!r}: "last", "all" or "none"'
        self.sequences.own({seq: len(tokens)})
        state, number, parts = self.sequences[seq], (self._number[seq],), []
        ids = tokens.tolist()
        for start in range(0, len(ids), ROWS):
            rows = [
                Row(
                    ids[at], state.stored + at - start, number,
                    logits == "all" or (logits == "last" and at + 1 == len(ids)),
                )
                for at in range(start, min(start + ROWS, len(ids)))
            ]  # fmt: skip
            parts.append(self._run(rows))
            state.stored += len(rows)
        if logits == "none":
            return None
        return parts[-1][0] if logits == "last" else np.concatenate(parts)

    def decode(self, seqs: list[int], tokens: np.ndarray) -> np.ndarray:
        """Append tokens (B,), one to each of `seqs` -> logits (B, V), in one pass."""
        self.sequences.own(dict.fromkeys(seqs, 1))
        rows = [
            Row(token, self.sequences[seq].stored, (self._number[seq],), True)
            for seq, token in zip(seqs, tokens.tolist(), strict=True)
        ]
        parts = [self._run(rows[at : at + ROWS]) for at in range(0, len(rows), ROWS)]
        for seq in seqs:
            self.sequences[seq].stored += 1
        return np.concatenate(parts)

    def verify(self, seq: int, tokens: np.ndarray, parents: np.ndarray) -> np.ndarray:
        """Append a draft tree (T,) provisionally, `parents` index it or are -1 -> logits (T, V)."""
        state = self.sequences[seq]
        if len(tokens) > TREES:
            raise UserError(
                f"a draft of {len(tokens)} tokens: at most {TREES} are verified at once"
            )
        assert not state.pending and not self._leaves, "a verified draft is undecided"
        depths, below = _tree(parents)
        self.sequences.own({seq: max(depths) + 1})
        self._leaves = [row for row in range(len(tokens)) if below[row] == [row]]
        for index in range(len(self._leaves)):
            self._copy(self._number[seq], NUMBERS + index, 0, state.stored)
        rows = [
            Row(
                int(token), state.stored + depths[row],
                tuple(NUMBERS + self._leaves.index(leaf) for leaf in below[row]), True,
            )
            for row, token in enumerate(tokens)
        ]  # fmt: skip
        logits = self._run(rows)
        state.draft, state.parents = np.array(tokens), np.array(parents)
        return logits

    def accept(self, seq: int, rows: list[int]) -> None:
        """Keep these rows of the last verified tree, root to leaf, and drop the others."""
        state = self.sequences[seq]
        assert state.parents is not None, "no draft waits for a verdict"
        expected = [-1, *rows[:-1]] if rows else []
        assert [int(state.parents[row]) for row in rows] == expected, (
            f"{rows} is no path from the root"
        )
        below = _tree(state.parents)[1]
        if rows:
            leaf = NUMBERS + self._leaves.index(below[rows[-1]][0])
            self._copy(leaf, self._number[seq], state.stored, state.stored + len(rows))
        state.stored += len(rows)
        self._forget_tree(seq)

    def trim(self, seq: int, length: int) -> None:
        """Forget every token of `seq` from position `length` on."""
        state = self.sequences[seq]
        assert 0 <= length <= state.stored + state.pending, f"{length} tokens were never stored"
        kept = max(0, length - state.stored)
        if state.pending and kept:
            self.accept(seq, list(range(kept)))
        self._forget_tree(seq)
        self._remove(self._number[seq], length)
        state.stored = length

    def fork(self, seq: int, tokens: int, length: int | None = None) -> int:
        """A new sequence that shares `seq`'s first `length` tokens, with room for `tokens`."""
        fork = self._named(lambda: self.sequences.fork(seq, tokens, length))
        self._copy(self._number[seq], self._number[fork], 0, self.sequences[fork].stored)
        return fork

    def shrink(self, seq: int, tokens: int) -> None:
        """Keep the first `tokens` tokens and give back the pages that only more would need."""
        self.trim(seq, min(tokens, self.length(seq)))
        self.sequences.shrink(seq, tokens)

    def room(self, closing: Iterable[int] = ()) -> int:
        """Tokens that `open` finds pages for, or would if these sequences were closed."""
        closing = list(closing)
        return self.sequences.room(closing) if self._numbers or closing else 0

    def close(self, seq: int) -> None:
        """Give the cells of `seq` back."""
        self._forget_tree(seq)
        number = self._number.pop(seq)
        self._remove(number, 0)
        self._numbers.append(number)
        self.sequences.close(seq)

    def attention(self, length: int) -> tuple[str, int]:
        """Dense, over all `length` tokens."""
        return "dense", length

    def identity(self) -> str:
        """A digest of the file, the context and the library's way to keep keys."""
        data = np.memmap(self.path, np.uint8, mode="r")
        known = ["llamacpp", self.library.__version__, self._cache, self.context, len(data)]
        known += [word_sum(data), hashlib.sha256(data[: 1 << 20]).hexdigest()]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()

    def export(self, seq: int, tokens: int) -> dict[str, np.ndarray]:
        """What the library writes of the first `tokens` tokens of `seq`: "state" uint8."""
        fork = self.fork(seq, tokens, tokens)
        try:
            number = self._number[fork]
            size = self.library.llama_state_seq_get_size(self._context, number)
            state = np.empty(size, np.uint8)
            written = self.library.llama_state_seq_get_data(
                self._context, _pointer(state, ctypes.c_uint8), size, number
            )
        finally:
            self.close(fork)
        assert written == size, f"llama.cpp wrote {written} bytes of {size}"
        return {"state": state}

    def restore(self, arrays: Mapping[str, np.ndarray], tokens: int) -> int:
        """A sequence of `tokens` stored tokens from what `export` gave. Raises Full, UserError."""
        seq = self.open(tokens)
        state = np.array(arrays.get("state", ()), dtype=np.uint8)
        read = self.library.llama_state_seq_set_data(
            self._context, _pointer(state, ctypes.c_uint8), len(state), self._number[seq]
        )
        last = self.library.llama_memory_seq_pos_max(self._memory, self._number[seq])
        if not len(state) or read != len(state) or last != tokens - 1:
            self.close(seq)
            raise UserError(
                f"llama.cpp does not take the saved {tokens} tokens: save the session again"
            )
        self.sequences[seq].stored = tokens
        return seq

    def trace(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """Run tokens (T,) by themselves -> stage -> (T, C) or (T, V) float32, in order."""
        seq = self.open(len(tokens))
        try:
            with self._stages:
                logits = self.prefill(seq, tokens, logits="all")
        finally:
            self.close(seq)
        assert logits is not None, "logits of every position were asked for"
        return {**self._stages.taken(), "logits": logits}

    def _run(self, rows: list[Row]) -> np.ndarray:
        """One pass -> logits (wanted rows, V)."""
        low, count = self.library, len(rows)
        tokens = np.array([row.token for row in rows], np.int32)
        positions = np.array([row.position for row in rows], np.int32)
        counts = np.array([len(row.seqs) for row in rows], np.int32)
        wanted = np.array([row.wanted for row in rows], np.int8)
        numbers = [np.array(row.seqs, np.int32) for row in rows]
        pointers = (ctypes.POINTER(ctypes.c_int32) * count)(
            *(_pointer(one, ctypes.c_int32) for one in numbers)
        )
        batch = low.llama_batch(
            count, _pointer(tokens, ctypes.c_int32), None, _pointer(positions, ctypes.c_int32),
            _pointer(counts, ctypes.c_int32), pointers, _pointer(wanted, ctypes.c_int8),
        )  # fmt: skip
        code = low.llama_decode(self._context, batch)
        assert code == 0, f"llama.cpp refuses {count} rows (code {code})"
        out = np.empty((int(wanted.sum()), self.vocab_size), np.float32)
        for at, row in enumerate(np.flatnonzero(wanted).tolist()):
            found = low.llama_get_logits_ith(self._context, row)
            out[at] = np.ctypeslib.as_array(found, (self.vocab_size,))
        return out

    def _named(self, make: Any) -> int:
        """A sequence from `make`, with a number of the library's. Raises Full."""
        if not self._numbers:
            raise Full(f"llama.cpp holds {NUMBERS} sequences at most")
        seq = make()
        self._number[seq] = self._numbers.pop()
        return seq

    def _copy(self, source: int, target: int, start: int, end: int) -> None:
        self.library.llama_memory_seq_cp(self._memory, source, target, start, end)

    def _remove(self, number: int, start: int) -> None:
        self.library.llama_memory_seq_rm(self._memory, number, start, -1)

    def _forget_tree(self, seq: int) -> None:
        """Drop the leaves' cells that no kept path took over."""
        state = self.sequences[seq]
        if state.draft is not None:
            for index in range(len(self._leaves)):
                self._remove(NUMBERS + index, 0)
            self._leaves, state.draft, state.parents = [], None, None


def _tree(parents: np.ndarray) -> tuple[list[int], list[list[int]]]:
    """parents (T,) -> the depth of each row, and the leaves below it (a leaf: itself)."""
    depths: list[int] = []
    for row, parent in enumerate(parents.tolist()):
        if not -1 <= parent < row:
            raise UserError(
                f"row {row} of a draft has parent {parent}: parents come first, root -1"
            )
        depths.append(0 if parent < 0 else depths[parent] + 1)
    below: list[list[int]] = [[] for _ in depths]
    for row in range(len(depths) - 1, -1, -1):
        below[row] = below[row] or [row]
        if (parent := int(parents[row])) >= 0:
            below[parent] += below[row]
    return depths, below


def _pointer(array: np.ndarray, kind: Any) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(kind))
