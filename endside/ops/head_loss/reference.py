"""Mean next-token loss straight from hidden states: cross entropy of (h / m) W^T."""

from __future__ import annotations

import torch

from endside.ops.cross_entropy.reference import cross_entropy
from endside.ops.linear.reference import linear


def head_loss(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, divisor: float = 1.0
) -> torch.Tensor:
    """hidden (..., C), weight (V, C), targets (...) int64 -> scalar mean in nats per target."""
    return cross_entropy(linear(hidden / divisor, weight), targets)
