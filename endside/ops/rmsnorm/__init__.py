"""RMSNorm: the truth in plain PyTorch, and our first native kernel beside it."""

from __future__ import annotations

import torch

from endside.native import load
from endside.ops.rmsnorm import reference


def rmsnorm(x: torch.Tensor, weight: torch.Tensor, eps: float, impl: str = "auto") -> torch.Tensor:
    """x (..., C), weight (C,) -> (..., C). impl: "auto", "reference" or "native".

    auto takes the native kernel for float32 on a CPU where no gradient is needed.
    """
    if impl == "native" or (impl == "auto" and _native_fits(x, weight)):
        from endside.ops.rmsnorm import native as fast

        return fast.rmsnorm(x, weight, eps)
    return reference.rmsnorm(x, weight, eps)


def _native_fits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    on_cpu = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    differentiated = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return on_cpu and not differentiated and load() is not None
