"""SwiGLU with its own gradient: kept for the backward pass are the two inputs alone.

PyTorch's chain keeps silu(gate) too, a tensor as large. The core does each way in one pass; where
it does not fit, the operations are those of PyTorch's chain, with its bits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from endside.ops.passes import able, address, narrow, run


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gate, up (..., F) -> (..., F)."""
    in_core = gate.dtype == up.dtype and able(gate, up)
    return _Swiglu.apply(gate.contiguous(), up.contiguous(), in_core)


class _Swiglu(torch.autograd.Function):
    """gate, up (..., F) -> (..., F)."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, in_core: bool) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.in_core = in_core
        if not in_core:
            return F.silu(gate) * up
        out = torch.empty_like(gate)
        places = [address(t) for t in (gate, up, out)]
        run("gate_forward", *places, gate.numel(), narrow(gate))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        if not ctx.in_core:
            return torch.ops.aten.silu_backward(dout * up, gate), dout * F.silu(gate), None
        dout = dout.contiguous()
        to_gate, to_up = torch.empty_like(gate), torch.empty_like(up)
        places = [address(t) for t in (gate, up, dout, to_gate, to_up)]
        run("gate_backward", *places, gate.numel(), narrow(gate))
        return to_gate, to_up, None
