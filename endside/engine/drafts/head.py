"""One decoder layer in numpy that continues what the model has just thought: a draft head at work.

    pair t       the model's hidden state h_t, and the embedding of token t + 1
    eagle2, mtp  x = fc [norm1 E ; norm2 h], one layer, logits by the model's own head
    eagle3       h = fc of three streams; the layer's attention reads [norm E ; norm h], its stream
                 is h, logits by a head of its own
    next pair    the layer's output stands for the hidden state that the model would have had

(EAGLE, arXiv 2401.15077; EAGLE-3, arXiv 2503.01840; formats §4.2.) The layer runs rows of any
tree: keys of pairs lie in a window of the last 1,024 (CPM.cu's, which also makes long prompts
cheap), those of a tree behind them for as long as it grows. Matrices go through the native core
where it is there, in bfloat16 or in low bits; a draft changes no token, so its rounding only costs
guesses.

FR-Spec (arXiv 2502.14856): `ids` cuts the output head to the most frequent tokens. That head is the
largest matrix here and would be read for every node; a quarter of the rows hold nearly all tokens
that are ever accepted.

What we chose not to do: batches over sequences. Each answers with its own tree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from endside import native
from endside.engine.drafts.expand import Guesses, likeliest
from endside.errors import UserError
from endside.formats.draft_head import LAYER, DraftHead
from endside.model.config import ModelConfig
from endside.native.draft import BLOCK
from endside.native.packed import Kind, linear, pack
from endside.ops.rope.frequencies import inverse_frequencies

Bits = Literal["float", "float32", "int8", "int4"]  # float: bfloat16 where the core multiplies
Product = Callable[[np.ndarray], np.ndarray]  # (n, K) -> (n, N)

SIZE = 1024  # pairs that are remembered, at most
SLACK = 320  # rooms beyond the window: a piece of a prompt, and a tree
PIECE = 256  # rows of a prompt at a time
BITS = 64  # of Rows.above
KINDS: dict[Bits, Kind] = {"float": "bf16", "float32": "f32", "int8": "int8", "int4": "int4"}
GROUP = 32  # weights per scale, for a head that was not trained with others


def product(weight: np.ndarray, bits: Bits, group: int = GROUP) -> Product:
    """x -> x W^T for weight (N, K), by the native core where there is one."""
    if native.load() is None:
        turned = np.ascontiguousarray(weight.T)
        return lambda x: x @ turned
    packed = pack(weight, KINDS[bits], group=group)
    return lambda x: linear(np.ascontiguousarray(x), packed)


@dataclass(frozen=True)
class Rows:
    """Pairs that are run together: where their keys go, and which rooms of the window they see."""

    tokens: np.ndarray  # (n,) whose embeddings they hold
    hidden: np.ndarray  # (n, C)
    positions: np.ndarray  # (n,) in the text
    at: int  # room of the first; the others follow
    seen: np.ndarray  # (n,) rooms from the beginning that a row sees
    above: np.ndarray  # (n,) uint64: bit i is room seen + i

    @staticmethod
    def text(tokens: np.ndarray, hidden: np.ndarray, begin: int, at: int) -> Rows:
        """Pairs begin .. of a text, each of which sees those before it and itself."""
        count = np.arange(len(tokens))
        none = np.zeros(len(tokens), np.uint64)
        return Rows(tokens, hidden, begin + count, at, at + 1 + count, none)

    def mask(self) -> np.ndarray:
        """(n, at + n) bool: who sees which."""
        rooms = np.arange(self.at + len(self.tokens)) - self.seen[:, None]
        bits = self.above[:, None] >> rooms.clip(0, BITS - 1).astype(np.uint64)
        return (rooms < 0) | ((rooms < BITS) & (bits & np.uint64(1)).astype(bool))


class Window:
    """Keys and values of the last pairs of one sequence, and of a tree behind them."""

    def __init__(self, groups: int, width: int, size: int) -> None:
        self.size = size
        self.keys = np.zeros((groups, size + SLACK, width), np.float32)
        self.values = np.zeros_like(self.keys)
        self.count = 0  # pairs that stay

    def write(self, at: int, keys: np.ndarray, values: np.ndarray) -> None:
        """keys, values (n, G, D) into rows at .. at + n."""
        self.keys[:, at : at + len(keys)] = keys.transpose(1, 0, 2)
        self.values[:, at : at + len(keys)] = values.transpose(1, 0, 2)

    def slide(self, new: int) -> None:
        """Make room for `new` rows that stay and a tree: the oldest go, in blocks as the core's."""
        if self.count + new <= self.size:
            return
        gone = min(self.count, -(-(self.count + new - self.size) // BLOCK) * BLOCK)
        self._drop(gone)
        self.count -= gone

    def _drop(self, gone: int) -> None:
        for array in (self.keys, self.values):
            array[:, : self.count - gone] = array[:, gone : self.count].copy()


class Head:
    """A draft head's weights, ready to run. base: the model it guesses for."""

    def __init__(
        self,
        weights: DraftHead,
        base: ModelConfig,
        *,
        embed: Callable[[np.ndarray], np.ndarray],
        rows: Callable[[np.ndarray], np.ndarray],
        context: int,
        bits: Bits = "float",
    ) -> None:
        """embed(tokens) -> (n, C) scaled embeddings; rows(ids) -> (n, C) of the model's head."""
        if weights.config.hidden_size != base.hidden_size:
            raise UserError(
                f"the draft is {weights.config.hidden_size} wide, the model {base.hidden_size}: "
                "use a draft made for this model"
            )
        self.kind, self.config, self.ids = weights.kind, weights.config, weights.ids
        self._embed, self._vectors = embed, weights.tensors
        self._scale = _residual_scale(weights, base)
        shape = self.config if self.kind == "eagle3" else base
        self._frequencies, self._amplitude = inverse_frequencies(
            shape.rope, self.config.head_dim, context, shape.max_position_embeddings
        )
        self.divisor = 1.0 if self.kind == "eagle3" else base.logit_divisor
        output = self._output(weights, base, rows)
        self.tokens = len(output)  # Vd
        self._load(weights, output, bits)
        last = base.num_hidden_layers
        self.feature_layers = (2, last // 2, last - 3) if self.kind == "eagle3" else (last,)

    def _load(self, weights: DraftHead, output: np.ndarray, bits: Bits) -> None:
        tensors, group = weights.tensors, weights.group
        of: Callable[[str], np.ndarray] = lambda name: tensors[f"{LAYER}{name}.weight"]
        self._fc = product(tensors["fc.weight"], bits, group)
        parts = [of(f"self_attn.{name}_proj") for name in "qkv"]
        self._qkv = product(np.concatenate(parts), bits, group)
        self._o = product(of("self_attn.o_proj"), bits, group)
        gate, up = of("mlp.gate_proj"), of("mlp.up_proj")
        self._gate_up = product(np.concatenate([gate, up]), bits, group)
        self._down = product(of("mlp.down_proj"), bits, group)
        self._out = product(output, bits)

    def _output(
        self, weights: DraftHead, base: ModelConfig, rows: Callable[[np.ndarray], np.ndarray]
    ) -> np.ndarray:
        if self.kind == "eagle3":
            return weights.tensors["lm_head.weight"]
        return rows(np.arange(base.vocab_size) if self.ids is None else self.ids)

    def window(self) -> Window:
        """For a new sequence."""
        return Window(self.config.num_key_value_heads, self.config.head_dim, SIZE)

    def hidden(self, features: np.ndarray) -> np.ndarray:
        """What the model's features (n, F) are to the layer (n, C)."""
        return self._fc(features) if self.kind == "eagle3" else features

    def run(
        self, rows: Rows, window: Window, *, guesses: int = 0, width: int = 1
    ) -> tuple[np.ndarray, Guesses]:
        """The states behind pairs (n, C); `width` tokens that may follow each of the last."""
        states = self._states(rows, window)
        found = likeliest(self.guess(states[len(states) - guesses :]), width)
        return states, found

    def _states(self, rows: Rows, window: Window) -> np.ndarray:
        embeds = self._normed(self._embed(rows.tokens), "input_norm1.weight")
        hidden = rows.hidden
        if self.kind == "eagle3":
            stream = hidden
            embeds = self._normed(embeds, f"{LAYER}input_layernorm.weight")
            given = [embeds, self._normed(hidden, f"{LAYER}hidden_norm.weight")]
            x = np.concatenate(given, 1)
        else:
            given = [embeds, self._normed(hidden, "input_norm2.weight")]
            stream = self._fc(np.concatenate(given, 1)) + self._vectors.get("fc.bias", 0)
            x = self._normed(stream, f"{LAYER}input_layernorm.weight")
        stream = stream + self._attend(x, rows, window) * self._scale
        x = self._normed(stream, f"{LAYER}post_attention_layernorm.weight")
        gate, up = np.split(self._gate_up(x), 2, axis=1)
        stream = stream + self._down(gate / (1 + np.exp(-gate)) * up) * self._scale
        return self._normed(stream, "norm.weight") if self.kind == "mtp" else stream

    def guess(self, states: np.ndarray) -> np.ndarray:
        """states (n, C) -> log-probabilities (n, Vd) of the token after the next."""
        if self.kind == "eagle3":
            states = self._normed(states, "norm.weight")
        logits = self._out(states) * np.float32(1 / self.divisor)
        logits -= logits.max(1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(1, keepdims=True))

    def names(self, own: np.ndarray) -> np.ndarray:
        """The model's tokens for the head's own."""
        return own if self.ids is None else self.ids[own]

    def _normed(self, x: np.ndarray, name: str) -> np.ndarray:
        weight = self._vectors.get(name)
        if weight is None:
            return x
        mean = np.square(x).mean(-1, keepdims=True)
        return x / np.sqrt(mean + self.config.rms_norm_eps) * weight

    def _attend(self, x: np.ndarray, rows: Rows, window: Window) -> np.ndarray:
        config, n, at = self.config, len(x), rows.at
        heads, groups, width = (
            config.num_attention_heads, config.num_key_value_heads, config.head_dim
        )  # fmt: skip
        parts = self._qkv(x).reshape(n, heads + 2 * groups, width)
        turned = self._rotate(parts[:, : heads + groups], rows.positions)
        window.write(at, turned[:, heads:], parts[:, heads + groups :])
        keys, values = window.keys[:, : at + n], window.values[:, : at + n]
        q = turned[:, :heads].reshape(n, groups, -1, width).transpose(1, 2, 0, 3)
        scores = q.reshape(groups, -1, width) @ keys.transpose(0, 2, 1) / np.sqrt(width)
        scores = scores.reshape(groups, -1, n, at + n)
        scores = np.where(rows.mask(), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = weights.reshape(groups, -1, at + n) @ values
        mixed = mixed.reshape(groups, -1, n, width).transpose(2, 0, 1, 3)
        return self._o(mixed.reshape(n, heads * width).astype(np.float32))

    def _rotate(self, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """x (n, H, D) turned to its positions (n,)."""
        angle = positions[:, None].astype(np.float32) * self._frequencies
        cos, sin = (f(angle)[:, None] * self._amplitude for f in (np.cos, np.sin))
        first, second = np.split(x, 2, axis=-1)
        turned = np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
        return turned.astype(np.float32)


def _residual_scale(weights: DraftHead, base: ModelConfig) -> float:
    """EAGLE-2 for MiniCPM counts its layer as one more of the model's; eagle3 has no scale."""
    if weights.kind == "mtp":
        return base.residual_scale
    depth = weights.config.scale_depth
    if weights.kind == "eagle3" or depth is None:
        return 1.0
    return depth / (base.num_hidden_layers + 1) ** 0.5
