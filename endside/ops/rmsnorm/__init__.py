"""RMSNorm: the truth in plain PyTorch; native kernel for inference, own gradient for training."""

from __future__ import annotations

import torch

from endside.native import load
from endside.ops.rmsnorm import fused, reference


def rmsnorm(x: torch.Tensor, weight: torch.Tensor, eps: float, impl: str = "auto") -> torch.Tensor:
    """x (..., C), weight (C,) -> (..., C). impl: "auto", "reference", "fused", "native".

    auto takes the native kernel for float32 on a CPU where no gradient is needed, and the fused one
    where one is, on plain tensors (not on spread ones).
    """
    if impl == "native" or (impl == "auto" and _native_fits(x, weight)):
        from endside.ops.rmsnorm import native as fast

        return fast.rmsnorm(x, weight, eps)
    if impl == "fused" or (impl == "auto" and _differentiated(x, weight) and _plain(x, weight)):
        return fused.rmsnorm(x, weight, eps)
    return reference.rmsnorm(x, weight, eps)


def _native_fits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    on_cpu = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    return on_cpu and not _differentiated(x, weight) and load() is not None


def _differentiated(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)


def _plain(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return type(x) is torch.Tensor and type(weight.data) is torch.Tensor
