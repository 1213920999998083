"""Next-token loss: -log softmax(logits)[target], averaged over the targets that count."""

from __future__ import annotations

import torch
import torch.nn.functional as F

IGNORE = -100  # a target with this value does not count


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """logits (..., V), targets (...) int64 -> scalar mean in fp32, in nats per counted token.

    Where no target counts, the loss is 0 (and so is its gradient), not NaN. float64 stays float64.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    flat = wide.reshape(-1, logits.shape[-1])
    total = F.cross_entropy(flat, targets.reshape(-1), ignore_index=IGNORE, reduction="sum")
    return total / (targets != IGNORE).sum().clamp(min=1)
