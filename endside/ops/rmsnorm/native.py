"""RMSNorm on the CPU through the native core: inference only, float32, no copies.

The equation is the reference's. Rows are independent of each other bit for bit, whatever the batch.
"""

from __future__ import annotations

import numpy as np
import torch

from endside import native
from endside.errors import UserError


def rmsnorm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x (..., C), weight (C), both float32 on the CPU -> (..., C). No gradient flows through."""
    if x.dtype != torch.float32 or weight.dtype != torch.float32 or x.device.type != "cpu":
        raise UserError(
            f"native rmsnorm got {x.dtype} on {x.device} with a {weight.dtype} weight: "
            "give float32 on the CPU, or use the reference"
        )
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        raise UserError("native rmsnorm has no gradient: use the reference, or torch.no_grad()")
    rows = x.detach().contiguous().view(-1, x.shape[-1])
    out = torch.empty_like(rows)
    # Not .numpy(): it would fix the weight's storage for ever, and sharded training frees it.
    scale = np.from_dlpack(weight.detach().contiguous())
    native.rmsnorm(rows.numpy(), scale, eps, out=out.numpy())
    return out.view(x.shape)
