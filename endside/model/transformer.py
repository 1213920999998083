"""The decoder: MiniCPM4, MiniCPM4.1 and the Llama family in one class, all muP scales on this page.

    h = E[token] * scale_emb                                    embed
    h = h + attention(norm(h)) * scale_depth / sqrt(L)          Block, L times
    h = h + mlp(norm(h))       * scale_depth / sqrt(L)
    logits = W_head norm(h) / (C / dim_model_base)              logits; W_head = E when tied

Llama is the case where every scale is one (formats §1.1). `forward` returns hidden states: logits
are computed only where somebody asks for them.
"""

from __future__ import annotations

import torch
from torch import nn

from endside.model.batch import Batch
from endside.model.block import Block, Norm
from endside.model.cache import Cache
from endside.model.config import ModelConfig
from endside.model.heads import MTP
from endside.model.linear import Linear, MakeLinear
from endside.ops.cross_entropy.reference import cross_entropy
from endside.ops.head_loss.fused import head_loss as fused_head_loss
from endside.ops.linear import linear
from endside.ops.rope.frequencies import inverse_frequencies
from endside.ops.rope.reference import tables


class Transformer(nn.Module):
    """A decoder of the given shape; `context` is the length it is built for (rope list choice)."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        context: int | None = None,
        make_linear: MakeLinear = Linear,
    ) -> None:
        super().__init__()
        self.config = config
        self.context = context or config.max_position_embeddings
        # undrawn: init_weights or a checkpoint fills it, and a draw on "meta" takes seconds
        empty = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(empty, freeze=False)
        self.layers = nn.ModuleList(
            Block(config, i, make_linear) for i in range(config.num_hidden_layers)
        )
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = make_linear(config.hidden_size, config.vocab_size)
        self.mtp = MTP(config, make_linear) if config.mtp_layers else None

    def init_weights(self, generator: torch.Generator) -> None:
        """muP start: embedding, head std 0.1; matrices 0.1 / sqrt(m); norms 1 (training spec)."""
        deep = self.config.initializer_range / self.config.logit_divisor**0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                nn.init.ones_(parameter)
                continue
            outer = name.startswith(("embed_tokens", "lm_head"))
            std = self.config.initializer_range if outer else deep
            nn.init.normal_(parameter, std=std, generator=generator)

    def forward(self, batch: Batch, cache: Cache | None = None) -> torch.Tensor:
        """batch of (B, T) tokens -> hidden states (B, T, C) after the final norm.

        With a cache, each row's keys and values are stored and its length advances by T.
        """
        hidden = self.embed(batch.tokens, batch.inputs)
        rope = self.rope(self._positions(batch, cache))
        for layer in self.layers:
            hidden = layer(hidden, rope, batch, cache)
        if cache is not None:
            for seq in batch.seqs:
                cache.advance(seq, batch.tokens.shape[1])
        return self.norm(hidden)

    def embed(self, tokens: torch.Tensor, inputs: torch.Tensor | None = None) -> torch.Tensor:
        """tokens (B, T) -> scaled embeddings (B, T, C); inputs (I, C): tokens behind them."""
        if inputs is None:
            return self.embed_tokens(tokens) * self.config.scale_emb
        behind = (tokens - self.config.vocab_size).clamp(min=0)
        known = self.embed(tokens.clamp(max=self.config.vocab_size - 1))
        return torch.where((tokens < self.config.vocab_size)[..., None], known, inputs[behind])

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden (..., C) after the final norm -> logits (..., V) in float32 (float64 stays)."""
        scaled = hidden / self.config.logit_divisor
        tied = self.config.tie_word_embeddings
        logits = linear(scaled, self.embed_tokens.weight) if tied else self.lm_head(scaled)
        return logits if logits.dtype == torch.float64 else logits.float()

    def head_loss(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """hidden (B, T, C), targets (B, T) -> cross entropy of `logits`, mean over the targets.

        Where the head is one plain matrix the logits are never all there at once.
        """
        head = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        plain = type(head) is nn.Embedding or (type(head) is Linear and head.product is linear)
        if plain and type(self) is Transformer and type(head.weight.data) is torch.Tensor:
            return fused_head_loss(hidden, head.weight, targets, self.config.logit_divisor)
        return cross_entropy(self.logits(hidden), targets)

    def predict_further(
        self, hidden: torch.Tensor, next_tokens: torch.Tensor, batch: Batch
    ) -> torch.Tensor:
        """hidden (B, T, C), next_tokens (B, T) -> logits (B, T, V) of the token after the next."""
        return self.logits(self.look_further(hidden, next_tokens, batch))

    def look_further(
        self, hidden: torch.Tensor, next_tokens: torch.Tensor, batch: Batch
    ) -> torch.Tensor:
        """hidden (B, T, C), next_tokens (B, T) -> the MTP layer's states (B, T, C)."""
        rope = self.rope(self._positions(batch, None))
        return self.mtp(hidden, self.embed(next_tokens), rope, batch)

    def rope(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """positions (B, T) -> cos and sin, each (B, T, 1, D/2) float32."""
        config = self.config
        frequencies, amplitude = inverse_frequencies(
            config.rope, config.head_dim, self.context, config.max_position_embeddings
        )
        return tables(positions, torch.from_numpy(frequencies).to(positions.device), amplitude)

    def _positions(self, batch: Batch, cache: Cache | None) -> torch.Tensor:
        if batch.positions is not None:
            return batch.positions
        rows, new = batch.tokens.shape
        steps = torch.arange(new, device=batch.tokens.device)
        if cache is None:
            return steps.expand(rows, new)
        starts = torch.tensor([cache.length(seq) for seq in batch.seqs], device=steps.device)
        return starts[:, None] + steps
