"""A projection with weights in few bits and activations in int8: the specification of the kernels.

A row of W and the row of x it meets are cut into the same groups along K. A weight is
scale * (code - zero); within a group of x, s = max|x| / 127 and q = round(x * (127 / max|x|)), ties
to even (a group that is nearly nothing is nothing):

    y = sum over groups in order of float32(dot(q, code) - zero * sum(q)) * (scale * s)

dot and sum are exact integers and the float32 part has one order, so there is one right answer down
to the last bit; every native kernel gives it, on any instruction set, with any number of rows
beside it. Here the integers are carried in float64, which holds them exactly. Slow on purpose.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

LEVELS = 127  # of the activations, on either side of zero
NOTHING = 2.0**-100  # groups whose largest value is below this are zero: 127 / max stays finite
ZERO = {"int4": 8, "int8": 128, "ternary": 1}  # the code of weight 0 when the grid is symmetric


def quantize_rows(x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x (P, K) float32 -> q (P, K / group, group) whole numbers in float64, s (P, K / group).

    K is padded with zeros to a multiple of `group`.
    """
    rows = F.pad(x.float(), (0, -x.shape[-1] % group)).unflatten(-1, (-1, group))
    largest = rows.abs().amax(-1)
    largest = torch.where(largest < NOTHING, 0.0, largest)
    inverse = torch.where(largest > 0, LEVELS / largest, 0.0)
    return torch.round(rows * inverse[..., None]).double(), largest / LEVELS


def quantized_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
    *,
    zero: int,
) -> torch.Tensor:
    """x (..., K), codes (N, Kp) uint8, scales and zeros (N, Kp / group) -> (..., N) float32.

    Kp is K padded to a multiple of the group; `zero` stands for `zeros` where there are none.
    """
    groups = scales.shape[1]
    q, s = quantize_rows(x.reshape(-1, x.shape[-1]), codes.shape[1] // groups)
    levels = codes.double().unflatten(-1, (groups, -1))
    shift = torch.full_like(levels[..., 0], zero) if zeros is None else zeros.double()
    y = x.new_zeros(q.shape[0], codes.shape[0], dtype=torch.float32)
    for index in range(groups):
        whole = q[:, index] @ levels[:, index].T - q[:, index].sum(-1)[:, None] * shift[:, index]
        y = y + whole.float() * (s[:, index, None] * scales[:, index].float())
    return y.view(*x.shape[:-1], -1)
