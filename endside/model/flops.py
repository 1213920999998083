"""What a shape costs: parameters, bytes and operations per token, from the configuration alone.

A multiply-add counts as two operations. Attention over S keys costs 4 S H D per token and layer;
block-sparse attention replaces S by what a query sees and adds the scoring of the summaries,
1.25 S / 16 keys' worth with the coarse normaliser, 2 S / 16 with the exact one (infllmv2 §14).
"""

from __future__ import annotations

from dataclasses import dataclass

from endside.model.config import ModelConfig


@dataclass(frozen=True)
class Parameters:
    """Numbers of weights; `total` counts a tied head once."""

    embedding: int
    attention: int
    feed_forward: int
    norms: int
    head: int
    mtp: int

    @property
    def total(self) -> int:
        """All weights stored."""
        parts = (self.embedding, self.attention, self.feed_forward, self.norms, self.head, self.mtp)
        return sum(parts)


def parameters(config: ModelConfig) -> Parameters:
    """The weights of a shape, by kind."""
    width, layers = config.hidden_size, config.num_hidden_layers
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    attention, feed_forward = width * heads * config.head_dim, 3 * width * config.intermediate_size
    mtp = attention + feed_forward + 2 * width * width + 5 * width
    return Parameters(
        embedding=config.vocab_size * width,
        attention=layers * attention,
        feed_forward=layers * feed_forward,
        norms=(2 * layers + 1) * width,
        head=0 if config.tie_word_embeddings else config.vocab_size * width,
        mtp=config.mtp_layers * mtp,
    )


def visible_keys(config: ModelConfig, length: int) -> int:
    """Keys the last of `length` tokens attends to."""
    sparse = config.sparse
    if sparse is None or length - 1 < sparse.first_sparse(length):
        return length
    unfilled = -length % sparse.block_size
    return min(length, sparse.budget - unfilled)


def attention_flops(config: ModelConfig, length: int) -> float:
    """Operations of attention for one new token behind `length` - 1 others, all layers."""
    seen = float(visible_keys(config, length))
    sparse = config.sparse
    if sparse is not None and seen < length:
        passes = 0.625 if sparse.lse == "coarse" else 1.0
        seen += passes * length / sparse.kernel_stride
    return 4 * seen * config.num_attention_heads * config.head_dim * config.num_hidden_layers


def forward_flops(config: ModelConfig, length: int) -> float:
    """Operations of one forward pass for one token at context `length`, the head included."""
    counted = parameters(config)
    matrices = counted.attention + counted.feed_forward + config.vocab_size * config.hidden_size
    return 2 * matrices + attention_flops(config, length)


def training_flops(config: ModelConfig, length: int) -> float:
    """Operations per trained token at sequence length `length`: forward and twice that backward."""
    return 3 * forward_flops(config, max(1, length // 2))


def cache_bytes_per_token(config: ModelConfig, element_bytes: int) -> float:
    """Bytes of keys, values and summaries per token of context."""
    per_key = config.num_key_value_heads * config.head_dim * element_bytes
    keys = 2.0 + (0 if config.sparse is None else 1 / 16 + 1 / 64)
    return config.num_hidden_layers * per_key * keys


def decode_bytes(config: ModelConfig, length: int, element_bytes: int) -> float:
    """Bytes one decoded token reads: every matrix once, the keys and values it sees, summaries."""
    counted = parameters(config)
    head = config.vocab_size * config.hidden_size
    weights = (counted.attention + counted.feed_forward + counted.norms + head) * element_bytes
    seen, per_key = visible_keys(config, length), config.num_key_value_heads * config.head_dim
    keys = 2.0 * seen
    if seen < length:
        keys += length / 16 + length / 64
    return weights + keys * per_key * element_bytes * config.num_hidden_layers
