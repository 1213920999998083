"""The low-bit projection's specification against Python integers, and what rounding x loses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from endside.model.quantized import QuantizedLinear
from endside.ops.linear.quantized import ZERO, quantize_rows, quantized_linear

TOP = {"int4": 16, "int8": 256, "ternary": 3}


def _case(kind: str, group: int, width: int, *, symmetric: bool) -> tuple[torch.Tensor, ...]:
    rng = np.random.default_rng(7)
    padded = -(-width // group) * group
    codes = rng.integers(0, TOP[kind], (9, padded), dtype=np.uint8)
    scales = (0.01 + 0.05 * rng.random((9, padded // group))).astype(np.float16)
    zeros = None if symmetric else rng.integers(0, TOP[kind], scales.shape, dtype=np.uint8)
    x = rng.standard_normal((5, width)).astype(np.float32) * 3
    x[2] = 0
    parts = (x, codes, scales, zeros)
    return tuple(None if part is None else torch.from_numpy(part) for part in parts)


def _by_hand(x, codes, scales, zeros, zero: int) -> np.ndarray:
    """The same sums with Python integers and numpy scalars, one weight at a time."""
    x, codes, scales = x.numpy(), codes.numpy(), scales.numpy()
    groups = scales.shape[1]
    group = codes.shape[1] // groups
    x = np.pad(x, ((0, 0), (0, codes.shape[1] - x.shape[1])))
    y = np.zeros((x.shape[0], codes.shape[0]), np.float32)
    for p, row in enumerate(x):
        for n in range(codes.shape[0]):
            for g in range(groups):
                part = row[g * group : (g + 1) * group]
                top = np.abs(part).max()
                s = np.float32(top / np.float32(127))
                q = [round(float(v * (np.float32(127) / top))) if top else 0 for v in part]
                z = zero if zeros is None else int(zeros[n, g])
                dot = sum(
                    a * (int(c) - z)
                    for a, c in zip(q, codes[n, g * group : (g + 1) * group], strict=True)
                )
                y[p, n] += np.float32(dot) * np.float32(s * np.float32(scales[n, g]))
    return y


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(("group", "width"), [(32, 96), (64, 65), (128, 300)])
@pytest.mark.parametrize("kind", ["int4", "int8", "ternary"])
def test_equals_integers_by_hand(kind: str, group: int, width: int, symmetric: bool) -> None:
    x, codes, scales, zeros = _case(kind, group, width, symmetric=symmetric)
    got = quantized_linear(x, codes, scales, zeros, zero=ZERO[kind])
    assert np.array_equal(got.numpy(), _by_hand(x, codes, scales, zeros, ZERO[kind]))


@pytest.mark.parametrize("group", [32, 64, 128])
def test_activations_lose_under_one_percent(group: int) -> None:
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(3))
    q, s = quantize_rows(x, group)
    back = (q * s[..., None]).flatten(1)
    error = (back - x).norm() / x.norm()
    assert q.abs().max() == 127, "the largest of a group is a full step"
    assert 0.001 < error < 0.01


def test_the_slot_holds_what_it_is_given() -> None:
    x, codes, scales, zeros = _case("int4", 64, 130, symmetric=False)
    layer = QuantizedLinear(130, 9, kind="int4", group=64, symmetric=False)
    layer.load_state_dict({"codes": codes, "scales": scales, "zeros": zeros})
    assert torch.equal(layer(x[None])[0], quantized_linear(x, codes, scales, zeros, zero=8))
