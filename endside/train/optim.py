"""AdamW with muP groups: the learning rate found on a narrow model holds on a wide one.

With m = hidden_size / dim_model_base (training spec, "muP"; arXiv 2203.03466, table 8, Adam):

    hidden matrices   every 2-D weight of the blocks, MTP's too      learning_rate / m, weight decay
    head              an untied output matrix, LoRA's B              learning_rate,     weight decay
    plain             embedding (and the head tied to it), norms     learning_rate,     no decay

The logits are already divided by m in the forward pass, so the head needs no rate of its own. The
state leaves as named tensors, never as a pickle: `state_tensors` and `load_state_tensors` use the
parameters' names, so a reordered model still finds its moments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from endside.errors import UserError
from endside.train.parallel import local, placed, spread_over

Group = Literal["hidden", "head", "plain"]
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW. `learning_rate` is the peak, in muP units: it does not change with the width."""

    learning_rate: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1  # times the group's learning rate, per step
    clip: float = 1.0  # largest global gradient norm; 0: no clipping

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise UserError(f"optim.learning_rate is {self.learning_rate}: it must be above 0")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise UserError(f"optim.beta1 {self.beta1} and beta2 {self.beta2} must be in [0, 1)")
        if not (self.epsilon > 0 and self.weight_decay >= 0 and self.clip >= 0):
            raise UserError(
                f"optim.epsilon {self.epsilon} must be above 0, weight_decay {self.weight_decay} "
                f"and clip {self.clip} at least 0"
            )


def group_of(name: str, parameter: torch.Tensor) -> Group:
    """Which muP group a parameter of the Transformer belongs to, from its exact name and rank."""
    if parameter.dim() < 2 or name == "embed_tokens.weight":
        return "plain"
    whole = name == "lm_head.weight" or name.endswith(".lora_b")
    return "head" if whole else "hidden"


def make_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW over `model`'s trainable parameters; `model.config.logit_divisor` is m.

    Each group also carries "name" and "peak", its learning rate where the schedule's share is 1.
    """
    m = model.config.logit_divisor
    groups = []
    for name in ("hidden", "head", "plain"):
        members = [
            (n, p)
            for n, p in model.named_parameters()
            if p.requires_grad and group_of(n, p) == name
        ]
        peak = optim.learning_rate / m if name == "hidden" else optim.learning_rate
        decay = 0.0 if name == "plain" else optim.weight_decay
        # One fused step takes tensors of one mesh: those that are split otherwise stand apart.
        for mesh in dict.fromkeys(spread_over(p) for _, p in members):
            same = [(n, p) for n, p in members if spread_over(p) == mesh]
            groups.append(
                {"params": same, "name": name, "lr": peak, "peak": peak, "weight_decay": decay}
            )
    return torch.optim.AdamW(
        groups, betas=(optim.beta1, optim.beta2), eps=optim.epsilon, weight_decay=0.0, fused=True
    )


def set_share(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Set every group's learning rate to `share` of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share


def state_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The moments as {"<parameter>.exp_avg": tensor, ...}; empty before the first step."""
    return {
        f"{name}.{moment}": optimizer.state[parameter][moment]
        for name, parameter in _named(optimizer)
        if parameter in optimizer.state
        for moment in _MOMENTS
    }


def load_state_tensors(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Put back what `state_tensors` gave; raises UserError when it belongs to another model."""
    named = dict(_named(optimizer))
    expected = {f"{name}.{moment}" for name in named for moment in _MOMENTS} if tensors else set()
    if expected != set(tensors):
        odd = sorted(expected ^ set(tensors))[0]
        raise UserError(
            f"optimizer state does not fit this model ({odd}): resume with the model that wrote it"
        )
    for name, parameter in named.items() if tensors else ():
        state = {moment: tensors[f"{name}.{moment}"] for moment in _MOMENTS}
        if state["exp_avg"].shape != parameter.shape:
            raise UserError(
                f"optimizer state of {name} has shape {tuple(state['exp_avg'].shape)}, the "
                f"parameter {tuple(parameter.shape)}: resume with the model that wrote it"
            )
        optimizer.state[parameter] = {
            moment: placed(tensor, parameter if tensor.dim() else local(parameter))
            for moment, tensor in state.items()
        }


def _named(optimizer: torch.optim.Optimizer) -> list[tuple[str, torch.Tensor]]:
    return [
        pair
        for group in optimizer.param_groups
        for pair in zip(group["param_names"], group["params"], strict=True)
    ]
