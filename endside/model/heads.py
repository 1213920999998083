"""Heads beside the main one. Multi-token prediction: one more layer that looks one token further.

At position i the layer reads the final hidden state h_i and the embedding of the next token,
and predicts the token after it (training spec, "Multi-token prediction"):

    x_i = P [norm(h_i) ; norm(E[t_{i+1}] * scale_emb)]
    logits of t_{i+2} = W norm(layer(x)_i) / m

Embedding and output head are the main model's own. After training the layer drafts for speculation.
"""

from __future__ import annotations

import torch
from torch import nn

from endside.model.batch import Batch
from endside.model.block import Block, Norm
from endside.model.config import ModelConfig
from endside.model.linear import Linear, MakeLinear


class MTP(nn.Module):
    """One transformer layer on pairs of (hidden state, next token)."""

    def __init__(self, config: ModelConfig, make_linear: MakeLinear = Linear) -> None:
        super().__init__()
        width = config.hidden_size
        self.hidden_norm = Norm(width, config.rms_norm_eps)
        self.embed_norm = Norm(width, config.rms_norm_eps)
        self.proj = make_linear(2 * width, width)
        self.layer = Block(config, config.num_hidden_layers, make_linear)
        self.norm = Norm(width, config.rms_norm_eps)

    def forward(
        self,
        hidden: torch.Tensor,
        next_embeds: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        batch: Batch,
    ) -> torch.Tensor:
        """hidden, next_embeds (B, T, C) -> (B, T, C), ready for the main model's head."""
        pair = torch.cat((self.hidden_norm(hidden), self.embed_norm(next_embeds)), dim=-1)
        return self.norm(self.layer(self.proj(pair), rope, batch, None))
