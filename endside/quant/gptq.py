"""GPTQ: rounding a matrix to few bits, where every rounding error is repaired as it is made.

Round-to-nearest (`pack`) treats every weight alone. GPTQ (arXiv 2210.17323) minimises what the
layer's outputs lose on real inputs X (P, K), tr(dW H dW^T) with H = X^T X: columns are rounded one
after the other, and the error of each is passed on to those still free. With U upper triangular and
U^T U = H^-1,

    e_j = (w_j - q_j) / U_jj          w_k -= e_j U_jk   for all k > j

    columns, K ->   | done |  block of 128  |        still free         |
                           |g|g|g|g|          <- E U[block, free] once per block

Inside a block the sums are taken when a column is reached, so that memory is read once. The scale
of a group is chosen when its first column is reached, from weights that carry the repairs so far.
With `act_order` columns go by falling H_jj; groups then keep the original columns, with scales
chosen beforehand ("static groups"), so that codes need no index.

P-GPTQ (MiniCPM4, arXiv 2506.07900) is the same algorithm with another H: the first positions of
each text, where massive activations sit, are left out (`calibrate`).

U comes from one Cholesky factorisation and one triangular inverse: with J the reversal of the
columns, J H J = L L^T, so U = (J L J)^-1. Damping adds a share of the mean of H's diagonal. A
column that no input reached (H_jj = 0) is rounded to nearest; zeroing it, as is often done, would
be wrong here, since the positions that were left out may reach it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from endside.errors import UserError
from endside.quant.pack import REACH, TOP, ZERO, QuantizedLinear, Scheme

BLOCK = 128  # columns whose repairs are gathered before the rest of the matrix is touched
LEAF = 512  # columns of a triangular matrix that are inverted at once
JUDGED = 512  # rows of a matrix whose error is measured
DAMP_TRIES = 4  # each with ten times the damping, before a Hessian is given up


@dataclass(frozen=True)
class Grid:
    """Scales and zeros, both (N, groups); scales hold values that 16 bits can hold."""

    scales: torch.Tensor
    zeros: torch.Tensor

    def nearest(self, columns: torch.Tensor, groups: torch.Tensor, largest: int) -> torch.Tensor:
        """Codes (N, k) of columns (N, k) that belong to `groups` (k,), in the columns' dtype."""
        scale, zero = self.scales[:, groups], self.zeros[:, groups]
        return (torch.round(columns / scale) + zero).clamp(0, largest)

    def values(self, codes: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
        """What codes (N, k) stand for."""
        return self.scales[:, groups] * (codes - self.zeros[:, groups])


def fit(columns: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero, each (N, 1), of a group of columns (N, k): the rule of `pack`, in 16 bits."""
    if scheme.symmetric:
        scale = columns.abs().amax(1, keepdim=True) / REACH[scheme.kind]
    else:
        low, high = (edge(columns, 1, keepdim=True) for edge in (torch.amin, torch.amax))
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = (high - low) / TOP[scheme.kind]
    scale = scale.half().to(columns.dtype)
    if not scale.isfinite().all():
        raise UserError("a weight is too large for 16-bit scales, or no number: check the model")
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    if scheme.symmetric:
        return scale, torch.full_like(scale, ZERO[scheme.kind])
    return scale, torch.round(-low / scale).clamp(0, TOP[scheme.kind])


def gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    scheme: Scheme,
    *,
    damp: float = 0.01,
    act_order: bool = False,
) -> QuantizedLinear:
    """weight (N, K), hessian (K, K) = X^T X of its inputs -> codes. Computes in H's dtype."""
    work = weight.to(hessian.dtype)
    owners = torch.arange(work.shape[1]) // scheme.group
    if not act_order:
        upper = inverse_factor(hessian, damp)
        return _linear(*_sweep(work.clone(), upper, owners, scheme), scheme)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    upper = inverse_factor(hessian[order][:, order], damp)
    pairs = [fit(columns, scheme) for columns in work.split(scheme.group, 1)]
    grid = Grid(*(torch.cat(parts, 1) for parts in zip(*pairs, strict=True)))
    codes, grid = _sweep(work[:, order], upper, owners[order], scheme, static=grid)
    return _linear(codes[:, torch.argsort(order)], grid, scheme)


def inverse_factor(hessian: torch.Tensor, damp: float) -> torch.Tensor:
    """U (K, K), upper triangular with U^T U = (H + damping)^-1."""
    mean = hessian.diagonal().mean()
    step = torch.where(mean > 0, mean, torch.ones_like(mean))
    for power in range(DAMP_TRIES):
        damped = hessian.flip(0, 1)
        damped.diagonal().add_(step * (damp * 10**power))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            del damped
            _invert(lower)
            return lower.flip(0, 1)
    raise UserError(
        f"the inputs of a layer give no positive Hessian even with {DAMP_TRIES - 1} powers of ten "
        f"more than damping {damp}: use more calibration text, or a larger --damp"
    )


def values(linear: QuantizedLinear, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The matrix (N, K) that the codes stand for, exactly."""
    return torch.from_numpy(linear.dequantize()).to(dtype)


def _invert(lower: torch.Tensor) -> None:
    """Invert a lower triangular matrix in place, by halves: all but the leaves is products."""
    half = len(lower) // 2
    if len(lower) <= LEAF:
        unit = torch.eye(len(lower), dtype=lower.dtype)
        lower.copy_(torch.linalg.solve_triangular(lower, unit, upper=False))
        return
    for part in (lower[:half, :half], lower[half:, half:]):
        _invert(part)
    lower[half:, :half] = -(lower[half:, half:] @ lower[half:, :half]) @ lower[:half, :half]


def relative_error(
    weight: torch.Tensor, rounded: QuantizedLinear, hessian: torch.Tensor | None
) -> float:
    """tr(dW H dW^T) / tr(W H W^T): the share of the layer's output energy that rounding costs.

    hessian None stands for the identity. Of a tall matrix about `JUDGED` rows are looked at, spread
    evenly, since the products would otherwise cost as much as the rounding.
    """

    def energy(matrix: torch.Tensor) -> float:
        seen = matrix if hessian is None else matrix @ hessian
        return (seen * matrix).sum(dtype=torch.float64).item()

    every = slice(None, None, max(1, len(weight) // JUDGED))
    exact = weight[every] if hessian is None else weight[every].to(hessian.dtype)
    lost = exact - values(rounded, exact.dtype)[every]
    return energy(lost) / energy(exact) if exact.any() else 0.0


def _sweep(
    work: torch.Tensor,
    upper: torch.Tensor,
    owners: torch.Tensor,
    scheme: Scheme,
    static: Grid | None = None,
) -> tuple[torch.Tensor, Grid]:
    """Codes of the columns of work (N, K), which is overwritten; static None: grids are fitted."""
    rows, width = work.shape
    grid = static or Grid(*(work.new_ones(rows, int(owners.max()) + 1) for _ in range(2)))
    codes = torch.empty(rows, width, dtype=torch.uint8)
    for start in range(0, width, BLOCK):
        stop = min(start + BLOCK, width)
        block = work[:, start:stop].T.contiguous()  # (k, N): a column is then read in one stretch
        errors = torch.zeros_like(block)
        square = upper[start:stop, start:stop]
        for j in range(stop - start):
            group = owners[start + j : start + j + 1]
            if static is None and (start + j) % scheme.group == 0:
                ahead = slice(j, j + scheme.group)
                scale, zero = fit((block[ahead] - square[:j, ahead].T @ errors[:j]).T, scheme)
                grid.scales[:, group], grid.zeros[:, group] = scale, zero
            column = (block[j] - square[:j, j] @ errors[:j])[:, None]
            code = grid.nearest(column, group, TOP[scheme.kind])
            errors[j] = (column - grid.values(code, group))[:, 0] / square[j, j]
            codes[:, start + j] = code[:, 0].to(torch.uint8)
        work[:, stop:] -= errors.T @ upper[start:stop, stop:]
    return codes, grid


def _linear(codes: torch.Tensor, grid: Grid, scheme: Scheme) -> QuantizedLinear:
    zeros = None if scheme.symmetric else grid.zeros.to(torch.uint8).numpy()
    scales = grid.scales.half().numpy()
    return QuantizedLinear(scheme.kind, codes.contiguous().numpy(), scales, zeros, scheme.group)
