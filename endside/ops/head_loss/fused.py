"""The same loss with its gradient made on the way forward, while a piece of the logits is in cache.

    p = softmax(l)      loss_i = log Z_i - l_it,  log Z = max l - log max p      dl = p - onehot(t)

PyTorch's chain writes (N, V) logits in fp32, their logarithms, a gradient of each and the casts
between them. Here `PIECE` logits at a time become their own gradient in place; what stays is one
buffer of at most `HELD` gradients in the dtype of the product, from which the two products of the
backward pass are taken. log Z comes from the largest p, which is at least 1 / V, so nothing
underflows. Backward only multiplies by a scalar, or does nothing where that is 1 (the sum over
targets). Products follow autocast; softmax and loss are fp32 (float64 stays float64).

No second derivative, and the gradients exist from the forward pass on: (V, C) of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from endside.ops.cross_entropy.reference import IGNORE
from endside.ops.linear import tiles
from endside.ops.passes import DTYPES, able, address, narrow, run

LARGE = 1 << 28  # both of the following on a GPU, which wants few large kernels
PIECE = 1 << 21  # logits that softmax handles at once: 8 MiB in fp32, some of which stays in cache
HELD = 1 << 25  # gradients of logits held at once
Multiply = Callable[..., torch.Tensor]  # as torch.mm: two matrices, perhaps `out`
_BUFFER = threading.local()


def head_loss(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, divisor: float = 1.0
) -> torch.Tensor:
    """hidden (..., C), weight (V, C), targets (...) int64 -> scalar mean in nats per target."""
    device = hidden.device.type
    dtype = hidden.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    flat = hidden.reshape(-1, hidden.shape[-1])
    in_core = able(hidden, weight) and dtype in DTYPES
    multiply = tiles.multiply if tiles.takes(flat, weight) else torch.mm
    return _HeadLoss.apply(flat, weight, targets.reshape(-1), divisor, dtype, in_core, multiply)


class _HeadLoss(torch.autograd.Function):
    """hidden (N, C), weight (V, C), targets (N) -> scalar; its gradients are made forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor,
        divisor: float, dtype: torch.dtype, in_core: bool, multiply: Multiply,
    ) -> torch.Tensor:  # fmt: skip
        scaled = hidden if divisor == 1 else hidden / divisor
        states, matrix = scaled.to(dtype), weight.to(dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        counted = targets != IGNORE
        wanted = any(ctx.needs_input_grad[:2])
        to_states = torch.empty_like(states) if wanted else None
        to_matrix = None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        rows = max(1, (HELD if hidden.device.type == "cpu" else LARGE) // len(matrix))
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(states), rows):
                part = slice(start, start + rows)
                logits = _in_core if in_core else _in_torch
                given = (states[part], matrix, targets[part])
                losses, gradient = logits(*given, wanted=wanted, multiply=multiply)
                total += losses.sum()
                if wanted:
                    multiply(gradient, matrix, out=to_states[part])
                    product = multiply(gradient.t(), states[part])
                    if to_matrix is None:
                        to_matrix = product.to(weight.dtype)
                    else:
                        to_matrix += product
        count = counted.sum().clamp(min=1)
        ctx.save_for_backward(to_states, to_matrix, count)
        ctx.divisor, ctx.like = divisor, hidden.dtype
        return (total / count).to(wide)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        to_states, to_matrix, count = ctx.saved_tensors
        scale = upstream / count
        to_hidden = to_states.to(ctx.like)
        # on a CPU asking for the value waits for nothing
        if scale.device.type != "cpu" or scale.item() != ctx.divisor:
            to_hidden = to_hidden * (scale / ctx.divisor).to(ctx.like)
        if scale.device.type != "cpu" or scale.item() != 1:
            to_matrix = to_matrix * scale.to(to_matrix.dtype)
        return to_hidden, to_matrix, None, None, None, None, None


def _in_core(
    states: torch.Tensor, matrix: torch.Tensor, targets: torch.Tensor, *, wanted: bool,
    multiply: Multiply,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """As below; the logits become the gradients in place, in one buffer kept for the next call."""
    logits = _kept(len(states) * len(matrix), states.dtype).view(len(states), len(matrix))
    multiply(states, matrix.t(), out=logits)
    losses, targets = torch.empty(len(states)), targets.contiguous()
    if int(targets.max()) >= len(matrix):
        raise IndexError(f"target {int(targets.max())} is outside of {len(matrix)} logits")
    places = (address(logits), address(targets), address(losses))
    run("head_rows", *places, *logits.shape, wanted, narrow(logits))
    return losses, logits


def _kept(numbers: int, dtype: torch.dtype) -> torch.Tensor:
    """The buffer, at least as large: the system clears fresh pages, which here is half a pass."""
    held = getattr(_BUFFER, "held", None)
    if held is None or held.dtype != dtype or held.numel() < numbers:
        held = _BUFFER.held = torch.empty(numbers, dtype=dtype)
    return held[:numbers]


def _in_torch(
    states: torch.Tensor, matrix: torch.Tensor, targets: torch.Tensor, *, wanted: bool,
    multiply: Multiply,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """states (n, C), matrix (V, C) -> losses (n), d loss / d logits (n, V), zero where ignored."""
    wide = torch.float64 if states.dtype == torch.float64 else torch.float32
    losses = torch.empty(len(states), dtype=wide, device=states.device)
    held = (len(states), len(matrix)) if wanted else (0, 0)
    gradient = torch.empty(held, dtype=states.dtype, device=states.device)
    rows = max(1, (PIECE if states.device.type == "cpu" else LARGE) // len(matrix))
    for start in range(0, len(states), rows):
        part = slice(start, start + rows)
        counted = targets[part] != IGNORE
        goals = torch.where(counted, targets[part], 0)[:, None]
        logits = multiply(states[part], matrix.t()).to(wide)
        p = logits.softmax(-1)
        top, where = logits.max(-1, keepdim=True)
        log_z = top - p.gather(1, where).log()
        losses[part] = torch.where(counted, (log_z - logits.gather(1, goals))[:, 0], 0)
        if wanted:
            p.scatter_add_(1, goals, torch.full_like(log_z, -1))
            p *= counted[:, None]
            gradient[part] = p
    return losses, gradient if wanted else None
