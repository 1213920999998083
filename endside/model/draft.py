"""The trainable draft head: `engine/drafts/head.py` in PyTorch, over whole sequences.

Training unrolls the head on itself, as it will run: at step 0 the pair at position t has the
model's own hidden state, at step k the state that step k - 1 left at t - 1. A query of step k
stands on a path of k guesses behind position t - k, so it sees the pairs of step 0 up to t - k and
one pair of each later step (EAGLE-3's training-time test, arXiv 2503.01840, section 3.2). Without
it a head is only ever right once in a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from endside.model.block import MLP, Norm
from endside.model.config import ModelConfig
from endside.model.linear import Linear, MakeLinear
from endside.ops.rope.frequencies import inverse_frequencies
from endside.ops.rope.reference import rotate, tables

KINDS = ("eagle2", "eagle3", "mtp")


def feature_layers(kind: str, layers: int) -> tuple[int, ...]:
    """The residual streams a head reads, by the layer they enter; `layers`: the normed last one."""
    return (2, layers // 2, layers - 3) if kind == "eagle3" else (layers,)


@dataclass(frozen=True)
class Pairs:
    """embeds (B, T, C) of each next token, features (B, T, F), positions and documents (B, T)."""

    embeds: torch.Tensor
    features: torch.Tensor
    positions: torch.Tensor
    documents: torch.Tensor


class _Projections(nn.Module):
    """q, k, v, o of a layer whose input may be twice as wide as the model."""

    def __init__(self, config: ModelConfig, taken: int, make_linear: MakeLinear) -> None:
        super().__init__()
        width = config.head_dim
        self.q_proj = make_linear(taken, config.num_attention_heads * width)
        self.k_proj = make_linear(taken, config.num_key_value_heads * width)
        self.v_proj = make_linear(taken, config.num_key_value_heads * width)
        self.o_proj = make_linear(config.num_attention_heads * width, config.hidden_size)


class _Layer(nn.Module):
    def __init__(self, config: ModelConfig, kind: str, make_linear: MakeLinear) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = Norm(width, eps)
        if kind == "eagle3":
            self.hidden_norm = Norm(width, eps)
        taken = 2 * width if kind == "eagle3" else width
        self.self_attn = _Projections(config, taken, make_linear)
        self.post_attention_layernorm = Norm(width, eps)
        self.mlp = MLP(config, make_linear)


class DraftHead(nn.Module):
    """One head; parameter names are those of EAGLE-2's files. `config` is the model's."""

    def __init__(
        self, config: ModelConfig, kind: str, *, rows: int = 0, make_linear: MakeLinear = Linear
    ) -> None:
        """rows: of eagle3's own output head."""
        super().__init__()
        self.config, self.kind = config, kind
        width, eps = config.hidden_size, config.rms_norm_eps
        self.fc = make_linear((3 if kind == "eagle3" else 2) * width, width)
        if kind != "eagle3":
            self.input_norm1, self.input_norm2 = Norm(width, eps), Norm(width, eps)
        self.layers = nn.ModuleList([_Layer(config, kind, make_linear)])
        if kind != "eagle2":
            self.norm = Norm(width, eps)
        if kind == "eagle3":
            self.lm_head = Linear(width, rows or config.vocab_size)
        self.scale = self._residual_scale()

    def _residual_scale(self) -> float:
        config = self.config
        if self.kind == "mtp":
            return config.residual_scale
        if self.kind == "eagle3" or config.scale_depth is None:
            return 1.0
        return config.scale_depth / (config.num_hidden_layers + 1) ** 0.5

    def init_weights(self, generator: torch.Generator) -> None:
        """As the model's own start; eagle3's head as a head."""
        deep = self.config.initializer_range / self.config.logit_divisor**0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                nn.init.ones_(parameter)
                continue
            std = self.config.initializer_range if name == "lm_head.weight" else deep
            nn.init.normal_(parameter, std=std, generator=generator)

    def forward(self, pairs: Pairs, steps: int = 1) -> list[torch.Tensor]:
        """States (B, T, C) after each step; those of step k count from position k on."""
        hidden = self.fc(pairs.features) if self.kind == "eagle3" else pairs.features
        rope = self._rope(pairs.positions)
        states: list[torch.Tensor] = []
        keys: list[tuple[torch.Tensor, torch.Tensor]] = []
        for step in range(steps):
            if step:
                hidden = F.pad(states[-1][:, :-1], (0, 0, 1, 0))
            states.append(self._step(pairs, hidden, rope, keys))
        return states

    def guess(self, states: torch.Tensor, head: torch.Tensor | None) -> torch.Tensor:
        """states (..., C) -> logits (..., Vd) in float32 (float64 stays).

        head (Vd, C): the model's, for lack of its own.
        """
        if self.kind == "eagle3":
            logits = self.lm_head(self.norm(states))
        else:
            assert head is not None, f"{self.kind} guesses with the model's head"
            logits = states / self.config.logit_divisor @ head.T
        return logits if logits.dtype == torch.float64 else logits.float()

    def _step(
        self,
        pairs: Pairs,
        hidden: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        keys: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> torch.Tensor:
        layer = self.layers[0]
        if self.kind == "eagle3":
            stream = hidden
            x = torch.cat((layer.input_layernorm(pairs.embeds), layer.hidden_norm(hidden)), -1)
        else:
            both = self.input_norm1(pairs.embeds), self.input_norm2(hidden)
            stream = self.fc(torch.cat(both, -1))
            x = layer.input_layernorm(stream)
        stream = stream + self._attend(x, rope, pairs.documents, keys) * self.scale
        stream = stream + layer.mlp(layer.post_attention_layernorm(stream)) * self.scale
        return self.norm(stream) if self.kind == "mtp" else stream

    def _attend(
        self,
        x: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        documents: torch.Tensor,
        keys: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> torch.Tensor:
        """x (B, T, ·) -> (B, T, C); keys of the steps so far, this one's are added."""
        rows, new, _ = x.shape
        part = self.layers[0].self_attn
        q, k, v = (
            project(x).view(rows, new, -1, self.config.head_dim)
            for project in (part.q_proj, part.k_proj, part.v_proj)
        )
        q, k = rotate(q, *rope), rotate(k, *rope)
        keys.append((k, v))
        seen = torch.cat([_seen(documents, len(keys) - 1, at) for at in range(len(keys))], -1)
        all_k, all_v = (torch.cat(parts, 1).transpose(1, 2) for parts in zip(*keys, strict=True))
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), all_k, all_v, attn_mask=seen[:, None], enable_gqa=True
        )
        return part.o_proj(out.transpose(1, 2).reshape(rows, new, -1))

    def _rope(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        config = self.config
        frequencies, amplitude = inverse_frequencies(
            config.rope, config.head_dim, config.max_position_embeddings,
            config.max_position_embeddings,
        )  # fmt: skip
        return tables(positions, torch.from_numpy(frequencies).to(positions.device), amplitude)


def _seen(documents: torch.Tensor, step: int, at: int) -> torch.Tensor:
    """(B, T, T) bool: which pairs of step `at` the queries of `step` see, within a document."""
    places = torch.arange(documents.shape[1], device=documents.device)
    back = places[:, None] - places[None]  # how far the key lies behind the query
    allowed = back >= step if at == 0 else back == step - at
    return allowed & (documents[:, :, None] == documents[:, None])
