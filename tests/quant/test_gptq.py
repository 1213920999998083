"""GPTQ against the textbook, in float64; its grids against `pack`; act-order; damping."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from endside.errors import UserError
from endside.quant.gptq import fit, gptq, inverse_factor, relative_error, values
from endside.quant.pack import Scheme, round_to_nearest


def problem(rows: int, width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """weight (rows, width) and H (width, width) of strongly correlated inputs, float64."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=draw, dtype=torch.float64)
    mix *= torch.logspace(0, 0.7, width, dtype=torch.float64)
    inputs = torch.randn(4 * width, width, generator=draw, dtype=torch.float64) @ mix
    weight = torch.randn(rows, width, generator=draw, dtype=torch.float64) / width**0.5
    return weight, inputs.T @ inputs


def textbook(
    weight: torch.Tensor, hessian: torch.Tensor, scheme: Scheme, damp: float, act_order: bool
) -> np.ndarray:
    """GPTQ as the paper writes it: explicit inverse, one column at a time, no blocks."""
    top, half = (15, 7) if scheme.kind == "int4" else (255, 127)
    middle = half + 1

    def grid(columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if scheme.symmetric:
            scale = (columns.abs().max(1).values / half).half().double()
            return scale, torch.full_like(scale, middle)
        low = columns.min(1).values.clamp(max=0)
        high = columns.max(1).values.clamp(min=0)
        scale = ((high - low) / top).half().double()
        return scale, torch.round(-low / scale).clamp(0, top)

    width = weight.shape[1]
    order = list(range(width))
    if act_order:
        order.sort(key=lambda k: -hessian[k, k].item())
    work = weight[:, order].clone()
    h = hessian[order][:, order] + damp * hessian.diagonal().mean() * torch.eye(width).double()
    factor = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    static = [grid(columns) for columns in weight.split(scheme.group, 1)]
    codes = np.zeros(weight.shape, np.uint8)
    for place, column in enumerate(order):
        if act_order:
            scale, zero = static[column // scheme.group]
        elif place % scheme.group == 0:
            scale, zero = grid(work[:, place : place + scheme.group])
        code = (torch.round(work[:, place] / scale) + zero).clamp(0, top)
        codes[:, column] = code.numpy()
        error = (work[:, place] - scale * (code - zero)) / factor[place, place]
        work[:, place:] -= torch.outer(error, factor[place, place:])
    return codes


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("kind", "group"), [("int4", 128), ("int4", 32), ("int8", 64)])
@pytest.mark.parametrize("width", [63, 128, 289])
def test_codes_are_the_textbooks(
    kind: str, group: int, width: int, symmetric: bool, act_order: bool
) -> None:
    weight, hessian = problem(33, width, seed=width)
    scheme = Scheme(kind, group, symmetric)
    ours = gptq(weight, hessian, scheme, damp=0.02, act_order=act_order)
    theirs = textbook(weight, hessian, scheme, 0.02, act_order)
    np.testing.assert_array_equal(ours.codes, theirs)
    nearest = round_to_nearest(weight.numpy(), kind, group, symmetric=symmetric)
    assert (ours.codes != nearest.codes).mean() > 0.05, "the repairs change nothing: no test"


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [False, True])
def test_the_factor_and_the_error_beat_rounding(symmetric: bool, act_order: bool) -> None:
    weight, hessian = problem(65, 129, seed=1)
    scheme = Scheme("int4", 32, symmetric)
    rounded = gptq(weight, hessian, scheme, act_order=act_order)
    nearest = round_to_nearest(weight.numpy(), "int4", 32, symmetric=symmetric)
    ours, plain = (relative_error(weight, one, hessian) for one in (rounded, nearest))
    assert 0 < ours < 0.8 * plain
    lost = weight - values(rounded, torch.float64)
    expected = torch.trace(lost @ hessian @ lost.T) / torch.trace(weight @ hessian @ weight.T)
    assert ours == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("width", [1, 65, 1301])
def test_inverse_factor(width: int) -> None:
    _, hessian = problem(1, width, seed=2)
    upper = inverse_factor(hessian, 0.01)
    unit = torch.eye(width).double()
    damped = hessian + 0.01 * hessian.diagonal().mean() * unit
    torch.testing.assert_close(upper.triu(), upper, rtol=0, atol=0)
    torch.testing.assert_close(upper.T @ upper @ damped, unit, rtol=0, atol=1e-9)


@pytest.mark.parametrize("symmetric", [True, False])
def test_grids_are_those_of_pack(symmetric: bool) -> None:
    weight = torch.randn(17, 97, generator=torch.Generator().manual_seed(3))
    weight[4, :32] = 0
    packed = round_to_nearest(weight.numpy(), "int4", 32, symmetric=symmetric)
    identity = torch.eye(97)
    ours = gptq(weight, identity, Scheme("int4", 32, symmetric))
    np.testing.assert_array_equal(ours.dequantize(), packed.dequantize())
    scale, _ = fit(weight[:, 64:96], Scheme("int4", 32, symmetric))
    np.testing.assert_array_equal(scale[:, 0].half().numpy(), packed.scales[:, 2])


def test_a_column_no_input_reached_is_rounded_to_nearest() -> None:
    weight, hessian = problem(9, 64, seed=4)
    hessian[5], hessian[:, 5] = 0, 0
    rounded = gptq(weight, hessian, Scheme("int4", 64), act_order=True)
    nearest = round_to_nearest(weight.numpy(), "int4", 64)
    np.testing.assert_array_equal(rounded.codes[:, 5], nearest.codes[:, 5])


def test_damping_grows_until_the_factor_exists_and_then_says_so() -> None:
    weight, _ = problem(9, 40, seed=5)
    one = torch.randn(1, 40, generator=torch.Generator().manual_seed(6))
    inverse_factor((one.T @ one).float(), 1e-9)  # rank one: the first tries fail in float32
    with pytest.raises(UserError, match="no positive Hessian"):
        gptq(weight, -1e6 * torch.eye(40).double(), Scheme("int4", 32))


def test_numbers_that_cannot_be_stored() -> None:
    weight = torch.tensor([[1e9] * 32])
    with pytest.raises(UserError, match="too large for 16-bit scales"):
        gptq(weight, torch.eye(32), Scheme("int4", 32))
