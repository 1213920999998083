"""The native executor: the C++ core (`endside.native`) behind the protocol, without PyTorch.

The core runs whole steps: token ids and chunk tables in, logits out, every buffer made when it was
built. Here is what it does not know: sequences and their chunks (`native_sequences`), packed
weights on the disk (`native_pack`), and how much of what is needed (`native_plan`).

Every row's result depends on its own sequence alone, bit for bit, so a decode step of B sequences
is one call, prompts may be cut anywhere, and a draft tree gives each of its rows the logits that
plain decoding would. The core keeps the keys of a tree only until its next call; where another
sequence ran in between, accepted tokens are simply run again, to the same bits.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Items
from typing import TYPE_CHECKING, Any

import numpy as np

from endside.engine.executors import Plan
from endside.engine.executors.native_pack import Pack, Writer, cached
from endside.engine.executors.native_plan import (
    ROWS,
    TREES,
    cache_type,
    choose_context,
    limits,
    recipe,
    thread_count,
    usable_threads,
)
from endside.engine.executors.native_sequences import Sequence, Sequences
from endside.engine.executors.native_state import export, features, fill, identity, trace
from endside.engine.executors.native_weights import (
    join,
    matrices,
    native_shape,
    native_sparse,
    norms,
    pack,
    plain_vector,
    random_floats,
    random_matrix,
    rounded,
    shapes,
)
from endside.errors import UserError
from endside.formats.hf_config import with_attention
from endside.model.flops import visible_keys
from endside.model.presets import preset
from endside.native.model import CHUNK, Model, Request, cell_order
from endside.quant.pack import bf16_to_float

if TYPE_CHECKING:
    from endside.checkpoint import Checkpoint
    from endside.formats.weights import Parameter
    from endside.model.config import ModelConfig

log = logging.getLogger(__name__)

EMBEDDING = "embed_tokens.weight"


class NativeExecutor:
    """Implements `Executor`. `pack` keeps the weights that the core reads alive."""

    name = "native"
    row_exact = True
    page = CHUNK

    def __init__(
        self, config: ModelConfig, weights: Pack, embed: np.ndarray, plan: Plan, *, context: int
    ) -> None:
        self.threads = thread_count(plan.threads)
        if self.threads > (there := len(usable_threads())):
            log.warning("%d threads on %d: they wait for each other", self.threads, there)
        bounds = limits(plan, context, self.threads)
        self.config, self.pack = config, weights
        self.vocab_size = config.vocab_size
        self.context, self.capacity = context, bounds.chunks * CHUNK
        stored = cache_type(plan, config)
        self.model = Model(
            native_shape(config),
            join(config, context, weights.matrices, weights.vectors, embed),
            sparse=native_sparse(config),
            cache=stored,
            limits=bounds,
            isa=plan.isa,
        )
        self._embed = embed
        self._cells = f"{stored} in {cell_order(stored, config.head_dim, plan.isa)}"
        self._identity: str | None = None
        self.feature_layers: tuple[int, ...] = ()
        self._features: dict[int, np.ndarray] = {}
        self.sequences = Sequences(bounds.chunks, copy=self.model.copy_chunk)
        self._drafted: int | None = None  # the sequence whose tree the core still holds

    def open(self, tokens: int) -> int:
        """Take chunks for a sequence of at most `tokens`. Raises Full when they are taken."""
        return self.sequences.open(tokens)

    def length(self, seq: int) -> int:
        """Tokens stored for `seq`, an undecided draft included."""
        state = self.sequences[seq]
        return state.stored + state.pending

    def prefill(self, seq: int, tokens: np.ndarray, *, logits: str = "last") -> np.ndarray | None:
        """Append tokens (T,) -> "last" (V,), "all" (T, V), "none" None; float32."""
        assert logits in ("last", "all", "none"), f'logits is {logits!r}: "last", "all" or "none"'
        self.sequences.own({seq: len(tokens)})
        state = self.sequences[seq]
        parts = []
        for start in range(0, len(tokens), ROWS):
            part = tokens[start : start + ROWS]
            last = start + len(part) == len(tokens)
            want = logits if logits != "last" or last else "none"
            parts.append(self._forward([self._request(state, part, want=want)], [seq], start > 0))
            state.stored += len(part)
        if logits == "none":
            return None
        return parts[-1][0] if logits == "last" else np.concatenate(parts)

    def decode(self, seqs: list[int], tokens: np.ndarray) -> np.ndarray:
        """Append tokens (B,), one to each of `seqs` -> logits (B, V), in one call."""
        self.sequences.own(dict.fromkeys(seqs, 1))
        states = [self.sequences[seq] for seq in seqs]
        parts = []
        for start in range(0, len(seqs), ROWS):
            rows = range(start, min(start + ROWS, len(seqs)))
            wanted = [self._request(states[row], tokens[row : row + 1]) for row in rows]
            parts.append(self._forward(wanted, seqs[rows.start : rows.stop], start > 0))
        for state in states:
            state.stored += 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def verify(self, seq: int, tokens: np.ndarray, parents: np.ndarray) -> np.ndarray:
        """Append a draft tree (T,) provisionally, `parents` index it or are -1 -> logits (T, V)."""
        state = self.sequences[seq]
        depths = _depths(parents)
        if len(tokens) > TREES:
            raise UserError(
                f"a draft of {len(tokens)} tokens: at most {TREES} are verified at once"
            )
        self.sequences.own({seq: max(depths) + 1})
        logits = self._forward([self._request(state, tokens, parents=parents, want="all")], [seq])
        state.draft, state.parents = np.array(tokens), np.array(parents)
        self._drafted = seq
        return logits

    def accept(self, seq: int, rows: list[int]) -> None:
        """Keep these rows of the last verified tree, root to leaf, and drop the others."""
        state = self.sequences[seq]
        assert state.draft is not None and state.parents is not None, "no draft waits for a verdict"
        expected = [-1, *rows[:-1]] if rows else []
        assert [int(state.parents[row]) for row in rows] == expected, (
            f"{rows} is no path from the root"
        )
        kept, held = state.draft[rows], self._drafted == seq
        state.draft = state.parents = None
        if not held and rows:
            features = self._features
            self.prefill(seq, kept, logits="none")
            self._features = features
            return
        if rows:
            self.model.accept(0, np.array(rows, dtype=np.int32))
        state.stored += len(rows)
        self._drafted = None

    def trim(self, seq: int, length: int) -> None:
        """Forget every token of `seq` from position `length` on."""
        state = self.sequences[seq]
        assert 0 <= length <= state.stored + state.pending, f"{length} tokens were never stored"
        kept = max(0, length - state.stored)
        if kept:
            self.accept(seq, list(range(kept)))
        state.draft = state.parents = None
        state.stored = length

    def fork(self, seq: int, tokens: int, length: int | None = None) -> int:
        """A new sequence that shares `seq`'s first `length` tokens, with room for `tokens`."""
        return self.sequences.fork(seq, tokens, length)

    def shrink(self, seq: int, tokens: int) -> None:
        """Keep the first `tokens` tokens and give back the chunks that only more would need."""
        self.trim(seq, min(tokens, self.length(seq)))
        self.sequences.shrink(seq, tokens)

    def room(self, closing: Iterable[int] = ()) -> int:
        """Tokens that `open` finds chunks for, or would if these sequences were closed."""
        return self.sequences.room(closing)

    def close(self, seq: int) -> None:
        """Give the chunks of `seq` back."""
        self.sequences.close(seq)

    def attention(self, length: int) -> tuple[str, int]:
        """How the last of `length` tokens attends: "dense" or "sparse", and the keys it sees."""
        seen = visible_keys(self.config, length)
        return ("dense" if seen == length else "sparse"), seen

    def features(self, seq: int) -> np.ndarray:
        """The rows of the last call, as `feature_layers` asks -> (T, F) float32."""
        return self._features[seq]

    def set_inputs(self, rows: np.ndarray) -> None:
        """Tokens vocab_size, vocab_size + 1, … enter the first layer as rows (I, C)."""
        self.model.set_inputs(rows)

    def embed_rows(self, tokens: np.ndarray) -> np.ndarray:
        """tokens (T,) -> what enters the first layer (T, C) float32."""
        rows = self._embed[tokens]
        wide = bf16_to_float(rows) if rows.dtype == np.uint16 else rows.astype(np.float32)
        return wide * np.float32(self.config.scale_emb)

    def head_rows(self, tokens: np.ndarray) -> np.ndarray:
        """The output head's weights for tokens (T,) -> (T, C) float32."""
        head, width = self.pack.matrices["head"], self.config.hidden_size
        if len(tokens) == head.n:
            return head.unpack()[tokens, :width]
        return np.concatenate([head.unpack(int(token), 1)[:, :width] for token in tokens])

    def identity(self) -> str:
        """A digest of all that the keys of a sequence depend on."""
        if self._identity is None:
            self._identity = identity(
                self.config,
                self.pack,
                self._embed,
                self.context,
                self._cells,
            )
        return self._identity

    def export(self, seq: int, tokens: int) -> dict[str, np.ndarray]:
        """The chunks of the first `tokens` tokens: views, to be used before anything runs."""
        return export(self.model, self.sequences[seq].chunks, tokens)

    def restore(self, arrays: Mapping[str, np.ndarray], tokens: int) -> int:
        """A sequence of `tokens` stored tokens from what `export` gave. Raises Full, UserError."""
        seq = self.open(tokens)
        state = self.sequences[seq]
        try:
            fill(self.model, state.chunks, arrays, tokens)
        except UserError:
            self.close(seq)
            raise
        state.stored = tokens
        return seq

    def trace(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """Run tokens (T,) by themselves -> stage -> (T, C) or (T, V) float32, in order."""
        self._drafted = None
        seq = self.open(len(tokens))
        try:
            chunks = self.sequences[seq].chunks
            return trace(self.model, chunks, tokens, self.pack.vectors["final_norm"], ROWS)
        finally:
            self.close(seq)

    def visible(self, seq: int, tokens: np.ndarray) -> np.ndarray:
        """Append tokens (T <= 512,) -> how many keys each row attended to (L, T, G) int32."""
        self.sequences.own({seq: len(tokens)})
        state, config = self.sequences[seq], self.config
        size = (config.num_hidden_layers, len(tokens), config.num_key_value_heads)
        seen = np.zeros(size, np.int32)
        self._drafted = None
        self.model.forward([self._request(state, tokens, want="none")], visible=seen)
        state.stored += len(tokens)
        return seen

    def _request(
        self,
        state: Sequence,
        tokens: np.ndarray,
        *,
        parents: np.ndarray | None = None,
        want: str = "last",
    ) -> Request:
        assert not state.pending, "a verified draft is undecided: accept or trim it first"
        return Request(
            tokens=np.ascontiguousarray(tokens, dtype=np.int32),
            chunks=state.chunks,
            start=state.stored,
            parents=None if parents is None else np.ascontiguousarray(parents, dtype=np.int32),
            want=want,
        )

    def _forward(
        self, requests: Items[Request], seqs: Items[int], more: bool = False
    ) -> np.ndarray:
        """Logits of rows of `seqs`; more: they go on with the last call's, and so do features."""
        self._drafted = None
        if not self.feature_layers:
            return self.model.forward(list(requests))
        counts = [len(each.tokens) for each in requests]
        size = (self.config.num_hidden_layers + 1, sum(counts), self.config.hidden_size)
        residual = np.empty(size, np.float32)
        logits = self.model.forward(list(requests), trace=residual)
        rows = features(residual, self.feature_layers, self.pack, self.config)
        before = self._features if more else {}
        parts = zip(seqs, np.split(rows, np.cumsum(counts)[:-1]), strict=True)
        self._features = before | {
            seq: np.concatenate([before[seq], part]) if seq in before else part
            for seq, part in parts
        }
        return logits


def _depths(parents: np.ndarray) -> list[int]:
    """Steps of each row from the root of its tree; parents stand before their children."""
    depths: list[int] = []
    for row, parent in enumerate(parents.tolist()):
        if not -1 <= parent < row:
            raise UserError(
                f"row {row} of a draft has parent {parent}: parents come first, root -1"
            )
        depths.append(0 if parent < 0 else depths[parent] + 1)
    return depths


def load(checkpoint: Checkpoint, config: ModelConfig, plan: Plan) -> NativeExecutor:
    """The model of an opened folder, its weights mapped from their pack or packed now."""
    from endside.formats.source import folder_source, low_bits
    from endside.formats.weights import to_float

    source = folder_source(checkpoint)
    parameters, asked = source.parameters, recipe(plan, *low_bits(source))
    context = choose_context(config, plan, asked, shapes(config, asked, parameters)).context
    threads = thread_count(plan.threads)
    if changed := rounded(config, parameters):
        log.warning(
            "%d matrices are stored in bits that the native executor does not multiply by, the "
            "first is %s: they are rounded to int8 in groups of 32; --executor torch keeps them",
            len(changed), changed[0],
        )  # fmt: skip
    table = parameters[EMBEDDING]

    checkpoint.verify(weights=False)

    def build(sink: Pack | Writer) -> None:
        checkpoint.verify()
        for matrix in matrices(config):
            sink.add(matrix.name, pack(matrix, parameters, asked, threads))
        for name, source in norms(config).items():
            sink.add(name, plain_vector(parameters[source].read()))
        if not table.plain:
            sink.add(EMBEDDING, np.ascontiguousarray(to_float(table.read())))

    key = {"recipe": asked.name, "model": _identity(config)}  # a group that does not act is no key
    weights = cached(checkpoint, asked.name, key, build)
    embed = _embedding(table) if table.plain else weights.vectors[EMBEDDING].reshape(table.shape)
    return NativeExecutor(config, weights, embed, plan, context=context)


def _identity(config: ModelConfig) -> list[Any]:
    """What of a model's shape the packed buffers depend on."""
    return [
        config.num_hidden_layers, config.hidden_size, config.num_attention_heads,
        config.num_key_value_heads, config.head_dim, config.intermediate_size, config.vocab_size,
        config.tie_word_embeddings,
    ]  # fmt: skip


def _embedding(parameter: Parameter) -> np.ndarray:
    """The table (V, C) where it lies in its file; only rows that are looked up are ever read."""
    table = parameter.read()
    assert isinstance(table, np.ndarray), "a plain parameter reads as an array"
    return table.astype(np.float32) if table.dtype == np.float64 else table


def random_executor(preset_name: str, plan: Plan, seed: int = 0) -> NativeExecutor:
    """A model of a named shape with noise for weights, made in the packed form at once."""
    config = with_attention(preset(preset_name), plan.attention)
    asked = recipe(plan)
    planned = shapes(config, asked)
    context = choose_context(config, plan, asked, planned).context
    noise = np.random.default_rng(seed)
    weights = Pack()
    for name, shape in planned.items():
        weights.add(name, random_matrix(shape, noise))
    for name in norms(config):
        weights.add(name, np.ones(config.hidden_size, np.float32))
    embed = _random_table(config.vocab_size, config.hidden_size, noise)
    return NativeExecutor(config, weights, embed, plan, context=context)


def _random_table(rows: int, columns: int, noise: np.random.Generator) -> np.ndarray:
    """A bfloat16 table (V, C) in a file without a name: like a checkpoint's, it is only mapped."""
    import tempfile

    with tempfile.TemporaryFile() as file:
        block = random_floats(1 << 20, noise)
        for start in range(0, rows * columns, len(block)):
            file.write(block[: rows * columns - start].tobytes())
        file.flush()
        return np.memmap(file, np.uint16, mode="r", shape=(rows, columns))
