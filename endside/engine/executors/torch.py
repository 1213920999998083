"""The PyTorch executor: `Transformer.forward` over its paged cache, on any device PyTorch knows.

Batch invariance. A row's logits must not depend on which other rows run beside it, or the same seed
would give another text under load. PyTorch's matrix products do not promise that: measured with
torch 2.13 on an AVX2 CPU, float32, every one of 64 rows of x W^T changes bits when it is computed
with even one other row instead of alone (widths 64, 256 and 1024), because one row is a
matrix-vector product and two are not. On a CPU every sequence therefore runs as its own forward,
B = 1; the price is small there, since weights are read again for each row but compute is the limit
only with many. On other devices a decode step is one batched forward: faster, and equal only up to
rounding.

`verify` runs every path of a draft tree as a row of one batch (`torch_tree`); its logits equal
those of single steps up to rounding.
"""

from __future__ import annotations

import hashlib
import json
import logging
import zlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from endside.engine.executor import Full
from endside.engine.executors import Plan, check_length, default_context, free_memory, torch_tree
from endside.errors import UserError
from endside.model.batch import Batch
from endside.model.cache import PAGE, Cache, CacheFull
from endside.model.flops import cache_bytes_per_token, parameters, visible_keys
from endside.ops.rope.frequencies import inverse_frequencies

if TYPE_CHECKING:
    from endside.checkpoint import Checkpoint
    from endside.model.config import ModelConfig
    from endside.model.transformer import Transformer

log = logging.getLogger(__name__)

TRACED = 512  # rows of one pass of `trace`


def load(checkpoint: Checkpoint, plan: Plan) -> TorchExecutor:
    """The model of an opened folder on the device, in the number format and length of `plan`."""
    from endside.formats.hf import load_checkpoint, read_config, with_attention

    if plan.threads is not None:
        torch.set_num_threads(plan.threads)
    config = with_attention(read_config(checkpoint), plan.attention)
    device = _device(plan.device)
    dtype = _dtype(plan.dtype, device, config)
    context = _context(plan.context, config, dtype, device)
    if plan.capacity is not None:
        context = min(context, plan.capacity)
    model = load_checkpoint(
        checkpoint, dtype=dtype, device=device, context=context, attention=plan.attention
    )
    return TorchExecutor(model, context=context, capacity=plan.capacity, device=device, dtype=dtype)


def _device(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but PyTorch finds no CUDA device here: use --device cpu")
    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def _dtype(name: str, device: str, config: ModelConfig) -> torch.dtype:
    """auto: bfloat16 on a GPU; float32 on a CPU, unless the weights would not fit."""
    if name != "auto":
        return getattr(torch, name)
    wide = parameters(config).total * 4
    if device == "cpu" and wide < 0.8 * free_memory():
        return torch.float32
    if device == "cpu":
        log.warning("bfloat16 is used: float32 weights need %.1f GiB, too much", wide / 2**30)
    return torch.bfloat16


def _context(asked: int | None, config: ModelConfig, dtype: torch.dtype, device: str) -> int:
    if asked is not None:
        return check_length(asked, config)
    memory = free_memory() if device == "cpu" else torch.cuda.mem_get_info()[0]
    each = cache_bytes_per_token(config, dtype.itemsize)
    return default_context(config.max_position_embeddings, each, memory)


class TorchExecutor:
    """Implements `Executor`. The page pool is allocated here, once."""

    name = "torch"
    row_exact = False
    page = PAGE

    def __init__(
        self,
        model: Transformer,
        *,
        context: int,
        capacity: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if context < 1 or (capacity is not None and capacity < 1):
            raise UserError(f"context is {context} tokens: it must be at least 1")
        self.model = model.to(device=device, dtype=dtype).eval()
        self.device = torch.device(device)
        self.config, self.vocab_size = model.config, model.config.vocab_size
        self.feature_layers: tuple[int, ...] = ()
        self._features: dict[int, np.ndarray] = {}
        self._inputs: torch.Tensor | None = None
        self._drafts: dict[int, torch_tree.Draft] = {}
        self.context = context
        self.cache = Cache(model.config, tokens=capacity or context, dtype=dtype, device=device)
        self.capacity = self.cache.capacity

    def open(self, tokens: int) -> int:
        """Reserve pages for a sequence of at most `tokens`. Raises Full when they are taken."""
        try:
            return self.cache.open(tokens)
        except CacheFull as error:
            raise Full(str(error)) from error

    def length(self, seq: int) -> int:
        """Tokens stored for `seq`, an undecided draft included."""
        draft = self._drafts.get(seq)
        return self.cache.length(seq) + (len(draft.tokens) if draft else 0)

    @torch.inference_mode()
    def prefill(self, seq: int, tokens: np.ndarray, *, logits: str = "last") -> np.ndarray | None:
        """Append tokens (T,) -> "last" (V,), "all" (T, V), "none" None; float32."""
        hidden = self._forward([seq], tokens[None])
        if logits == "none":
            return None
        if logits == "last":
            return self._logits(hidden[:, -1])[0]
        assert logits == "all", f'logits is {logits!r}: use "last", "all" or "none"'
        return self._logits(hidden)[0]

    @torch.inference_mode()
    def decode(self, seqs: list[int], tokens: np.ndarray) -> np.ndarray:
        """Append tokens (B,), one to each of `seqs` -> logits (B, V)."""
        if self.device.type != "cpu":
            return self._logits(self._forward(seqs, tokens[:, None])[:, -1])
        rows, kept = [], {}
        for row, seq in enumerate(seqs):
            rows.append(self._logits(self._forward([seq], tokens[row : row + 1, None])[:, -1]))
            kept |= self._features
        self._features = kept
        return np.concatenate(rows)

    @torch.inference_mode()
    def verify(self, seq: int, tokens: np.ndarray, parents: np.ndarray) -> np.ndarray:
        """Append a draft tree (T,) provisionally, `parents` index it or are -1 -> logits (T, V)."""
        self._forget(seq)
        features: list[np.ndarray] = []

        def run(seqs: list[int], rows: np.ndarray) -> torch.Tensor:
            hidden = self._forward(seqs, rows)
            features.extend(self._features[one] for one in seqs if self.feature_layers)
            return hidden

        draft, hidden, place = torch_tree.verify(self.cache, seq, tokens, parents, run)
        self._drafts[seq] = draft
        if self.feature_layers:
            self._features = {seq: np.stack(features)[place[:, 0], place[:, 1]]}
        return self._logits(hidden)

    @torch.inference_mode()
    def accept(self, seq: int, rows: list[int]) -> None:
        """Keep these rows of the last verified tree, root to leaf, and drop the others."""
        draft, features = self._drafts[seq], self._features
        assert not rows or any(path[: len(rows)] == rows for path in draft.paths), (
            f"{rows} is no path from the root"
        )
        torch_tree.accept(self.cache, seq, draft, rows, self._forward)
        del self._drafts[seq]
        self._features = features

    def trim(self, seq: int, length: int) -> None:
        """Forget every token of `seq` from position `length` on."""
        kept = length - self.cache.length(seq)
        if kept > 0:
            self.accept(seq, list(range(kept)))
        self._forget(seq)
        self.cache.trim(seq, length)

    def _forget(self, seq: int) -> None:
        """Drop a tree that nobody decided about."""
        if seq in self._drafts:
            torch_tree.drop(self.cache, self._drafts.pop(seq))

    def fork(self, seq: int, tokens: int, length: int | None = None) -> int:
        """A new sequence that shares `seq`'s first `length` tokens, with room for `tokens`."""
        try:
            return self.cache.fork(seq, tokens, length)
        except CacheFull as error:
            raise Full(str(error)) from error

    def shrink(self, seq: int, tokens: int) -> None:
        """Keep the first `tokens` tokens and give back the pages that only more would need."""
        self.cache.shrink(seq, tokens)

    def room(self, closing: Iterable[int] = ()) -> int:
        """Tokens that `open` finds pages for, or would if these sequences were closed."""
        return self.cache.room(closing)

    def close(self, seq: int) -> None:
        """Give the pages of `seq` back."""
        self._forget(seq)
        self.cache.close(seq)

    def attention(self, length: int) -> tuple[str, int]:
        """How the last of `length` tokens attends: "dense" or "sparse", and the keys it sees."""
        seen = visible_keys(self.model.config, length)
        return ("dense" if seen == length else "sparse"), seen

    def features(self, seq: int) -> np.ndarray:
        """The rows of the last call, as `feature_layers` asks -> (T, F) float32."""
        return self._features[seq]

    def set_inputs(self, rows: np.ndarray) -> None:
        """Tokens vocab_size, vocab_size + 1, … enter the first layer as rows (I, C)."""
        dtype = next(self.model.parameters()).dtype
        self._inputs = torch.tensor(rows, dtype=dtype, device=self.device)

    @torch.inference_mode()
    def embed_rows(self, tokens: np.ndarray) -> np.ndarray:
        """tokens (T,) -> what enters the first layer (T, C) float32."""
        ids = torch.from_numpy(np.ascontiguousarray(tokens, dtype=np.int64)).to(self.device)
        return self.model.embed(ids).float().cpu().numpy()

    def head_rows(self, tokens: np.ndarray) -> np.ndarray:
        """The output head's weights for tokens (T,) -> (T, C) float32."""
        tied = self.config.tie_word_embeddings
        weight = self.model.embed_tokens.weight if tied else self.model.lm_head.weight
        return weight.detach()[torch.from_numpy(tokens).to(self.device)].float().cpu().numpy()

    def identity(self) -> str:
        """A digest of all that the keys of a sequence depend on."""
        frequencies, amplitude = inverse_frequencies(
            self.model.config.rope, self.model.config.head_dim, self.model.context,
            self.model.config.max_position_embeddings,
        )  # fmt: skip
        known = [
            "torch", repr(self.model.config), str(next(self.model.parameters()).dtype), amplitude,
            hashlib.sha256(frequencies).hexdigest(),
        ]  # fmt: skip
        for name, tensor in sorted(self.model.state_dict().items()):
            raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy()
            known.append((name, len(raw), zlib.crc32(raw)))
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()

    def export(self, seq: int, tokens: int) -> dict[str, np.ndarray]:
        """Keys, values and compressed keys of the first `tokens` tokens of `seq`, as bytes."""
        return self.cache.export(seq, tokens)

    def restore(self, arrays: Mapping[str, np.ndarray], tokens: int) -> int:
        """A sequence of `tokens` stored tokens from what `export` gave. Raises Full, UserError."""
        seq = self.open(tokens)
        try:
            self.cache.restore(seq, arrays, tokens)
        except UserError:
            self.close(seq)
            raise
        return seq

    @torch.inference_mode()
    def trace(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """Run tokens (T,) by themselves -> stage -> (T, C) or (T, V) float32, in order."""
        parts: dict[str, list[np.ndarray]] = {}

        def keep(name: str, output: torch.Tensor) -> None:
            parts.setdefault(name, []).append(output[0].float().cpu().numpy())

        hooks = [
            layer.register_forward_hook(
                lambda module, given, output, name=f"layer {index}": keep(name, output)
            )
            for index, layer in enumerate(self.model.layers)
        ]
        seq = self.open(len(tokens))
        try:
            for start in range(0, len(tokens), TRACED):
                part = np.asarray(tokens[None, start : start + TRACED])
                keep("embed", self.model.embed(torch.from_numpy(part).to(self.device)))
                hidden = self._forward([seq], part)
                keep("norm", hidden)
                keep("logits", self.model.logits(hidden))
        finally:
            self.close(seq)
            for hook in hooks:
                hook.remove()
        order = ["embed", *(f"layer {n}" for n in range(len(hooks))), "norm", "logits"]
        return {name: np.concatenate(parts[name]) for name in order}

    def _forward(self, seqs: list[int], tokens: np.ndarray) -> torch.Tensor:
        """tokens (B, T) int64 appended to `seqs` -> hidden (B, T, C)."""
        ids = torch.from_numpy(np.ascontiguousarray(tokens, dtype=np.int64)).to(self.device)
        return self._run(Batch(tokens=ids, seqs=tuple(seqs), inputs=self._inputs))

    def _run(self, batch: Batch) -> torch.Tensor:
        """hidden (B, T, C) of a batch; the features that are asked for are kept by sequence."""
        if not self.feature_layers:
            return self.model(batch, self.cache)
        streams: dict[int, torch.Tensor] = {}
        asked = [layer for layer in self.feature_layers if layer < len(self.model.layers)]
        hooks = [
            self.model.layers[layer].register_forward_pre_hook(
                lambda module, given, layer=layer: streams.update({layer: given[0]})
            )
            for layer in asked
        ]
        try:
            hidden = streams[len(self.model.layers)] = self.model(batch, self.cache)
        finally:
            for hook in hooks:
                hook.remove()
        rows = torch.cat([streams[layer] for layer in self.feature_layers], -1).float().cpu()
        self._features = dict(zip(batch.seqs or (), rows.numpy(), strict=True))
        return hidden

    def _logits(self, hidden: torch.Tensor) -> np.ndarray:
        return self.model.logits(hidden).float().cpu().numpy()
