"""The shape of a decoder: one frozen dataclass for MiniCPM4, MiniCPM4.1 and the Llama family.

Field names are those of the published config.json. Three muP scales set MiniCPM apart from Llama;
None (or 1) leaves each neutral, so that one forward pass covers both:

    h = E[token] * scale_emb
    h = h + block(norm(h)) * residual_scale         residual_scale = scale_depth / sqrt(layers)
    logits = W (norm(h) / logit_divisor)            logit_divisor = hidden_size / dim_model_base
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from endside.errors import UserError
from endside.ops.infllm.config import SparseConfig
from endside.ops.rope.frequencies import RopeConfig


@dataclass(frozen=True)
class ModelConfig:
    """Everything the forward pass depends on. Raises UserError when numbers cannot go together."""

    vocab_size: int
    hidden_size: int  # C
    num_hidden_layers: int  # L
    num_attention_heads: int  # H
    num_key_value_heads: int  # G
    head_dim: int  # D
    intermediate_size: int  # F
    max_position_embeddings: int  # tokens
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = field(default_factory=RopeConfig)
    tie_word_embeddings: bool = False
    scale_emb: float = 1.0
    scale_depth: float | None = None  # None: residual increments are added unscaled (Llama)
    dim_model_base: int | None = None  # None: logits are not divided (Llama)
    initializer_range: float = (
        0.1  # std of the embedding; matrices: / sqrt(hidden / dim_model_base)
    )
    mtp_layers: int = 0  # 1: one multi-token prediction layer (training spec)
    sparse: SparseConfig | None = None  # None: dense attention
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in (
            "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "intermediate_size", "max_position_embeddings",
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"config {name} is {value!r}: it must be a positive whole number")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"config num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}: a key head serves a whole group"
            )
        if self.head_dim % 2:
            raise UserError(
                f"config head_dim {self.head_dim} is odd: rotary positions turn pairs of channels"
            )
        if self.mtp_layers not in (0, 1):
            raise UserError(f"config mtp_layers is {self.mtp_layers}: use 0 or 1")

    @property
    def residual_scale(self) -> float:
        """Factor of each residual increment; 1 for Llama."""
        return (
            1.0
            if self.scale_depth is None
            else self.scale_depth / math.sqrt(self.num_hidden_layers)
        )

    @property
    def logit_divisor(self) -> float:
        """m: the width over the muP base width; 1 for Llama."""
        return 1.0 if self.dim_model_base is None else self.hidden_size / self.dim_model_base

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.num_attention_heads // self.num_key_value_heads
