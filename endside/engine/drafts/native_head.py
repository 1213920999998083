"""A draft head in the native core: one call for each level of a tree, with the engine's threads.

`head.py` says what is computed, and computes the same in numpy. Products of low bits give the same
integers there and here; sums of floats have another order, so states differ in their last bits, and
an activation now and then falls on the other side of a rounding edge.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from endside.engine.drafts.expand import Guesses
from endside.engine.drafts.head import (
    GROUP,
    KINDS,
    PIECE,
    SIZE,
    SLACK,
    Bits,
    Head,
    Rows,
    Window,
)
from endside.formats.draft_head import LAYER, DraftHead
from endside.model.config import ModelConfig
from endside.native import draft
from endside.native.draft import BLOCK
from endside.native.packed import Packed, interleave, pack


class NativeWindow(Window):
    """As the core has it: keys in blocks (G, blocks, D, 64), values (G, blocks, 64, D)."""

    def __init__(self, core: draft.DraftHead, size: int) -> None:
        self.size, self.count = size, 0
        self.rooms = core.window()
        self._groups = core.shape.kv_heads
        self._cells = BLOCK * core.shape.head_dim  # of a block

    def _drop(self, gone: int) -> None:
        first, last = gone // BLOCK, -(-self.count // BLOCK)
        for flat in self.rooms:
            whole = len(flat) // (self._groups * self._cells)
            blocks = flat[: self._groups * whole * self._cells].reshape(self._groups, whole, -1)
            blocks[:, : last - first] = blocks[:, first:last].copy()


class NativeHead(Head):
    """A head whose layer runs in the core."""

    def __init__(
        self,
        weights: DraftHead,
        base: ModelConfig,
        *,
        embed: Callable[[np.ndarray], np.ndarray],
        rows: Callable[[np.ndarray], np.ndarray],
        context: int,
        bits: Bits = "float",
        team: draft.Team | None = None,
    ) -> None:
        """As `Head`; team: whose threads."""
        self._team = team or draft.Team()
        super().__init__(weights, base, embed=embed, rows=rows, context=context, bits=bits)

    def _load(self, weights: DraftHead, output: np.ndarray, bits: Bits) -> None:
        self.core = draft.DraftHead(
            self._shape(),
            self._weights(weights, output, bits),
            draft.Limits(rows=PIECE, blocks=(SIZE + SLACK) // BLOCK, threads=self._team.threads),
            self._team,
        )

    def _shape(self) -> draft.Shape:
        config = self.config
        return draft.Shape(
            config.hidden_size, config.num_attention_heads, config.num_key_value_heads,
            config.head_dim, -(-config.intermediate_size // 8) * 8,
            config.rms_norm_eps, self._scale, 1 / self.divisor,
        )  # fmt: skip

    def _weights(self, weights: DraftHead, output: np.ndarray, bits: Bits) -> draft.Weights:
        tensors, joined = weights.tensors, self.kind != "eagle3"
        packed: Callable[[np.ndarray], Packed] = lambda matrix: pack(
            matrix, KINDS[bits], group=weights.group
        )
        of: Callable[[str], np.ndarray] = lambda name: tensors[f"{LAYER}{name}.weight"]
        missing = -self.config.intermediate_size % 8
        gate, up = (np.pad(of(f"mlp.{one}_proj"), ((0, missing), (0, 0))) for one in ("gate", "up"))
        norm = f"{LAYER}input_layernorm.weight"
        return draft.Weights(
            joined=joined,
            embed_norm=self._vector("input_norm1.weight" if joined else norm),
            hidden_norm=self._vector(
                "input_norm2.weight" if joined else f"{LAYER}hidden_norm.weight"
            ),
            fc=packed(tensors["fc.weight"]),
            fc_bias=self._vector("fc.bias") if joined else None,
            attention_norm=self._vector(norm) if joined else None,
            qkv=packed(np.concatenate([of(f"self_attn.{one}_proj") for one in "qkv"])),
            output=packed(of("self_attn.o_proj")),
            mlp_norm=self._vector(f"{LAYER}post_attention_layernorm.weight"),
            gate_up=packed(interleave(gate, up)),
            down=packed(np.pad(of("mlp.down_proj"), ((0, 0), (0, missing)))),
            state_norm=self._vector("norm.weight") if self.kind == "mtp" else None,
            final_norm=None if joined else self._vector("norm.weight"),
            out=pack(output, KINDS[bits], group=GROUP),
            inverse_frequencies=np.ascontiguousarray(self._frequencies, np.float32),
            rope_amplitude=self._amplitude,
        )

    def _vector(self, name: str) -> np.ndarray | None:
        found = self._vectors.get(name)
        return None if found is None else np.ascontiguousarray(found, np.float32)

    def window(self) -> NativeWindow:
        """For a new sequence."""
        return NativeWindow(self.core, SIZE)

    def hidden(self, features: np.ndarray) -> np.ndarray:
        """What the model's features (n, F) are to the layer (n, C)."""
        return self.core.project(features) if self.kind == "eagle3" else features

    def run(
        self, rows: Rows, window: Window, *, guesses: int = 0, width: int = 1
    ) -> tuple[np.ndarray, Guesses]:
        """The states behind pairs (n, C); `width` tokens that may follow each of the last."""
        assert isinstance(window, NativeWindow), "the window was made by another head"
        states, tokens, chances = self.core.run(
            (self._embed(rows.tokens), rows.hidden, rows.positions),
            (rows.at, rows.seen, rows.above),
            window.rooms, guesses, min(width, self.tokens),
        )  # fmt: skip
        return states, Guesses(tokens.astype(np.int64), chances)

    def guess(self, states: np.ndarray) -> np.ndarray:
        """Not shown by the core: only the likeliest come out of it."""
        raise NotImplementedError
