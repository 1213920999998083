"""Low-rank adaptation (LoRA, arXiv 2106.09685): weights stay, a thin product learns beside them.

    y = W x + (alpha / rank) B A x        A (rank, in) drawn, B (out, rank) zero at the start

so step 0 is the base model exactly. `attach` fills the slots of the named projections and freezes
everything else. A follows the width, so its learning rate is divided by m like that of matrices; B
keeps the full rate, as LoRA+ (arXiv 2402.12354) derives (`train.optim.group_of`).

The model's state becomes its adapters alone, so checkpoints are small; the reader's position beside
them names the weights they belong to (`fingerprint`), and another base is refused.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from endside.atomic import atomic_folder
from endside.errors import UserError
from endside.model.transformer import Transformer
from endside.ops.linear import linear

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraConfig:
    """Which projections get how much."""

    rank: int = 0  # 0: all weights are trained
    alpha: float = 16.0  # scale of the product: alpha / rank
    dropout: float = 0.0  # of the product's input, while training
    targets: tuple[str, ...] = PROJECTIONS

    def __post_init__(self) -> None:
        if self.rank < 0 or not self.alpha > 0 or not 0 <= self.dropout < 1:
            raise UserError(
                f"lora.rank {self.rank}, alpha {self.alpha} and dropout {self.dropout}: rank is at "
                "least 0, alpha above 0, dropout a share below 1"
            )
        unknown = [name for name in self.targets if name not in PROJECTIONS]
        if unknown or not self.targets:
            raise UserError(
                f"lora.targets has {unknown or 'nothing'}: use some of {', '.join(PROJECTIONS)}"
            )


class LoraLinear(nn.Module):
    """A frozen projection and its product."""

    def __init__(self, base: nn.Module, config: LoraConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = base.weight.requires_grad_(False)
        outputs, inputs = self.weight.shape
        drawn = torch.randn(config.rank, inputs, generator=generator) / (3 * inputs) ** 0.5
        self.lora_a = nn.Parameter(drawn.to(self.weight))
        self.lora_b = nn.Parameter(self.weight.new_zeros(outputs, config.rank))
        self.scale, self.dropout = config.alpha / config.rank, config.dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) -> (..., out)."""
        thin = nn.functional.dropout(x, self.dropout, self.training and self.dropout > 0)
        return linear(x, self.weight) + self.scale * linear(linear(thin, self.lora_a), self.lora_b)

    def merged(self) -> torch.Tensor:
        """The weight (out, in) that does the same, its sum taken in float64."""
        product = self.lora_b.detach().double() @ self.lora_a.detach().double()
        return (self.weight.double() + self.scale * product).to(self.weight.dtype)


def attach(model: Transformer, config: LoraConfig, generator: torch.Generator) -> Transformer:
    """Freeze the model and fill the named slots of its blocks with adapters, in place."""
    model.requires_grad_(False)
    for block in model.layers:
        for part in (block.self_attn, block.mlp):
            for name, module in list(part.named_children()):
                if name in config.targets:
                    setattr(part, name, LoraLinear(module, config, generator))
    model.register_state_dict_post_hook(_only_adapters)
    model.register_load_state_dict_post_hook(lambda module, keys: keys.missing_keys.clear())
    return model


def _only_adapters(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name in [name for name in state if not _is_adapter(name)]:
        del state[name]


def _is_adapter(name: str) -> bool:
    return name.rpartition(".")[2] in ("lora_a", "lora_b")


def fingerprint(model: nn.Module) -> str:
    """sha256 over names and bytes of all parameters."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode() + parameter.detach().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def merge(model: Transformer) -> Transformer:
    """A plain model that computes the same; its parameters are shared where nothing was added."""
    with torch.device("meta"):
        plain = Transformer(model.config, context=model.context)
    modules = dict(model.named_modules())
    state = {}
    for name, parameter in model.named_parameters():
        owner = modules[name.rpartition(".")[0]]
        if not _is_adapter(name):
            state[name] = owner.merged() if isinstance(owner, LoraLinear) else parameter.data
    plain.load_state_dict(state, strict=True, assign=True)
    return plain.train(model.training)


def write_peft(model: Transformer, config: LoraConfig, base: str, folder: Path) -> Path:
    """adapter_config.json and adapter_model.safetensors; base: where the base model lies."""
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
        "r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout,
        "target_modules": list(config.targets), "bias": "none", "fan_in_fan_out": False,
        "inference_mode": True, "init_lora_weights": True,
    }  # fmt: skip
    tensors = {
        f"base_model.model.model.{name[:-1]}{name[-1].upper()}.weight": tensor.detach().cpu()
        for name, tensor in model.state_dict().items()
    }
    with atomic_folder(folder) as part:
        (part / "adapter_config.json").write_text(json.dumps(settings, indent=1) + "\n")
        save_file(tensors, part / "adapter_model.safetensors")
    return folder
