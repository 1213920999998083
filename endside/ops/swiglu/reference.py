"""SwiGLU's gate: silu(gate) * up (arXiv 2002.05202)."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gate, up (..., F) -> (..., F)."""
    return F.silu(gate) * up
