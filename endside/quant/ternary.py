"""Training in low bits: a projection whose forward pass sees rounded weights (BitCPM, BitNet).

    forward    y = Q(W) x^T, Q = the rule by which `pack` rounds to nearest
    backward   as if Q were the identity (straight-through estimator, arXiv 1308.3432)

The latent weight W stays in full precision and collects what single steps are too small to show; a
weight moves to another code when the sum of them carries it over a border. Ternary: per row and
group scale = mean|w|, code = rint(w / scale) in {-1, 0, 1}; int4: scale = max|w| / 7. Scales are
rounded to float16 before codes are chosen, so what training saw is exactly what is packed: the
export is lossless. Activations are not touched.

The slot fills the blocks only; embedding and head stay as they are.
"""

from __future__ import annotations

import torch
from torch import nn

from endside.errors import UserError
from endside.model.config import ModelConfig
from endside.model.linear import Linear
from endside.model.transformer import Transformer
from endside.ops.linear import linear
from endside.quant.pack import REACH, Scheme

SMALLEST = 2.0**-24  # the smallest float16 above zero


def fake_quantized(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """weight (N, K) float32 -> the value of each weight's code, bit for bit as `pack` has it."""
    return torch.cat([_rounded(part, scheme.kind) for part in weight.split(scheme.group, 1)], 1)


def _rounded(columns: torch.Tensor, kind: str) -> torch.Tensor:
    size = columns.abs()
    peak = size.amax(1, keepdim=True)
    if kind == "ternary":
        mean = size.mean(1, keepdim=True, dtype=torch.float64).float()
        exact = ((size == 0) | (size == peak)).all(1, keepdim=True)
        wanted, reach = torch.where(exact, peak, mean), 1
    else:
        wanted, reach = peak / REACH[kind], REACH[kind] + 1
    scale = wanted.half().float()
    steps = torch.round(columns / scale.clamp(min=SMALLEST)).clamp(-reach, REACH.get(kind, 1))
    return scale * steps


class _StraightThrough(torch.autograd.Function):
    """Q forward, the identity backward."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, weight: torch.Tensor, scheme: Scheme):
        return fake_quantized(weight, scheme)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor):
        return grad, None


class FakeLinear(nn.Module):
    """A filling of the linear slot: trained in full precision, seen in low bits."""

    def __init__(self, inputs: int, outputs: int, scheme: Scheme) -> None:
        super().__init__()
        self.scheme = scheme
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.product = linear  # of activations and rounded weights; training may fill in FP8's

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) -> (..., out)."""
        return self.product(x, _StraightThrough.apply(self.weight, self.scheme))


def fake_transformer(config: ModelConfig, scheme: Scheme) -> Transformer:
    """A model whose blocks train in low bits; parameter names are those of the plain one."""
    if scheme.kind not in ("ternary", "int4") or not scheme.symmetric:
        raise UserError(f"cannot train in {scheme.kind}: use ternary or int4, both symmetric")
    if config.mtp_layers:
        raise UserError("a model with an MTP layer cannot be packed: set model.mtp_layers = 0")
    model = Transformer(
        config, make_linear=lambda inputs, outputs: FakeLinear(inputs, outputs, scheme)
    )
    if not config.tie_word_embeddings:
        model.lm_head = Linear(config.hidden_size, config.vocab_size)
    return model
