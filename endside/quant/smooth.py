"""Activation-aware smoothing: channels that carry large inputs get a finer share of the grid.

A projection computes W x = (W diag(s)) (x / s). Scaling up the columns that meet large inputs makes
their rounding errors smaller relative to what they carry, at the price of a coarser grid for their
group (AWQ, arXiv 2306.00978). The division goes into whatever produces x, so that nothing is left
to do at run time:

    x is the output of ...                        1/s goes into
    a norm                (q, k, v), (gate, up)   the norm's weight
    the attention         (o)                     rows of v, shared by the heads of a key group
    silu(gate) * up       (down)                  rows of up

s = mean|x|^alpha, normalised, with alpha from a grid: the one that loses least under
round-to-nearest by the calibration moments, tr(dW H dW^T). Where the norm is stored in 16 bits, s
is taken from its rounded new weight, so that smoothing itself changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from endside.model.block import Block
from endside.quant.calibrate import Moments
from endside.quant.pack import Scheme, round_to_nearest

STEPS = 20  # alphas tried in [0, 1)
SEARCHED_ROWS = 128  # of a matrix, spread evenly: enough to rank the alphas


@dataclass(frozen=True)
class Site:
    """Projections that share an input, and what produces it."""

    source: str  # submodule that takes 1/s
    readers: tuple[str, ...]  # submodules whose columns take s


SITES = (
    Site("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    Site("self_attn.v_proj", ("self_attn.o_proj",)),
    Site("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    Site("mlp.up_proj", ("mlp.down_proj",)),
)


def smooth(
    block: Block, moments: dict[str, Moments], scheme: Scheme, dtype: torch.dtype
) -> dict[str, float]:
    """Smooth a layer in place, moments included; the alpha of each site, by its first reader.

    moments: by the first reader of each site; dtype: in which norms will be stored.
    """
    chosen = {}
    for site in SITES:
        seen = moments[site.readers[0]]
        weights = [block.get_submodule(name).weight.data for name in site.readers]
        shared = _shared(block, site)
        alpha, factors = _search(weights, seen, shared, scheme)
        across = shared.spread(_fold(block.get_submodule(site.source), factors, dtype))
        for weight in weights:
            weight *= across
        seen.rescale(across)
        chosen[site.readers[0]] = alpha
    return chosen


def _shared(block: Block, site: Site) -> Shared:
    """How channels of the source meet those of its readers."""
    config = block.self_attn.config
    if site.source != "self_attn.v_proj":
        return Shared(1, 1)
    return Shared(config.group, config.head_dim)


@dataclass(frozen=True)
class Shared:
    """Runs of `width` source channels that `times` consecutive runs of the readers' share."""

    times: int
    width: int

    def gather(self, sizes: torch.Tensor) -> torch.Tensor:
        """Per reader channel (K,) -> per source channel, the mean of those that share it."""
        return sizes.view(-1, self.times, self.width).mean(1).flatten()

    def spread(self, factors: torch.Tensor) -> torch.Tensor:
        """Per source channel -> per reader channel (K,)."""
        runs = factors.view(-1, 1, self.width)
        return runs.expand(-1, self.times, -1).flatten()


def _search(
    weights: list[torch.Tensor], seen: Moments, shared: Shared, scheme: Scheme
) -> tuple[float, torch.Tensor]:
    """The best alpha and its factors per source channel."""
    mean = shared.gather(seen.mean).clamp(min=1e-8)
    looked_at = [weight[:: max(1, len(weight) // SEARCHED_ROWS)] for weight in weights]
    best = (float("inf"), 0.0, torch.ones(len(mean)))
    for step in range(STEPS):
        factors = mean ** (step / STEPS)
        factors = (factors / (factors.max() * factors.min()).sqrt()).float()
        across = shared.spread(factors)
        loss = sum(_lost(weight, across, seen.hessian, scheme) for weight in looked_at)
        if loss < best[0]:
            best = (loss, step / STEPS, factors)
    return best[1:]


def _lost(
    weight: torch.Tensor, across: torch.Tensor, hessian: torch.Tensor, scheme: Scheme
) -> float:
    """tr(dW H dW^T) of rounding weight (N, K) in smoothed coordinates."""
    scaled = (weight * across).numpy()
    rounded = round_to_nearest(scaled, scheme.kind, scheme.group, symmetric=scheme.symmetric)
    lost = (torch.from_numpy(rounded.dequantize()) / across - weight).to(hessian.dtype)
    return ((lost @ hessian) * lost).sum().item()


def _fold(source: nn.Module, factors: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Divide the source's outputs by factors; what they were divided by, after rounding."""
    old = source.weight.data
    if old.dim() == 2:
        source.weight.data = old / factors[:, None]
        return factors
    new = (old / factors).to(dtype).to(old.dtype)
    source.weight.data = torch.where(new == 0, old, new)
    return torch.where(new == 0, torch.ones_like(old), old / new)
