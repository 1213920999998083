"""One decoder layer: norm, attention, norm, gated feed-forward; increments times the muP scale."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from endside.model.attention import Attention
from endside.model.batch import Batch
from endside.model.cache import Cache
from endside.model.config import ModelConfig
from endside.model.linear import Linear, MakeLinear, narrow
from endside.ops.add_norm import add_norm
from endside.ops.rmsnorm import rmsnorm
from endside.ops.swiglu import swiglu


class Norm(nn.Module):
    """RMSNorm with a weight (C,)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., C) -> (..., C)."""
        return rmsnorm(x, self.weight, self.eps)

    def after(
        self, x: torch.Tensor, branch: torch.Tensor | None = None, scale: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x, branch (..., C) -> x + scale branch, and its norm as projections read it."""
        dtype = narrow(x)
        return add_norm(x, branch, self.weight, scale=scale, eps=self.eps, dtype=dtype)


class MLP(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, config: ModelConfig, make_linear: MakeLinear = Linear) -> None:
        super().__init__()
        self.gate_proj = make_linear(config.hidden_size, config.intermediate_size)
        self.up_proj = make_linear(config.hidden_size, config.intermediate_size)
        self.down_proj = make_linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., C) -> (..., C)."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    """Attention and feed-forward around one residual stream.

    With `recompute`, training keeps a block's input alone and computes the rest again in the
    backward pass: less memory for about a third more time, and the same bits.
    """

    def __init__(self, config: ModelConfig, layer: int, make_linear: MakeLinear = Linear) -> None:
        super().__init__()
        self.scale = config.residual_scale
        self.input_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer, make_linear)
        self.post_attention_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, make_linear)
        self.recompute = False

    def forward(
        self,
        x: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        batch: Batch,
        cache: Cache | None,
    ) -> torch.Tensor:
        """x (B, T, C) -> (B, T, C)."""
        if self.recompute and cache is None and torch.is_grad_enabled():
            return checkpoint(self._forward, x, rope, batch, None, use_reentrant=False)
        return self._forward(x, rope, batch, cache)

    def _forward(
        self,
        x: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        batch: Batch,
        cache: Cache | None,
    ) -> torch.Tensor:
        x, read = self.input_layernorm.after(x)
        heard = self.self_attn(read, rope, batch, cache)
        x, read = self.post_attention_layernorm.after(x, heard, self.scale)
        thought = self.mlp(read)
        return x + (thought if self.scale == 1 else thought * self.scale)
