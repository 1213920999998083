"""SwiGLU: the truth in plain PyTorch, and a version with its own gradient."""

from __future__ import annotations

import torch

from endside.ops.swiglu import fused, reference


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gate, up (..., F) -> (..., F). Fused where a gradient is needed, on plain tensors."""
    wanted = torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad)
    plain = type(gate) is torch.Tensor and type(up) is torch.Tensor
    return (fused if wanted and plain else reference).swiglu(gate, up)
