"""The first native kernel, in every instruction set of this machine, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from endside import native
from endside.errors import UserError
from endside.ops.rmsnorm import native as fast
from endside.ops.rmsnorm import reference

WIDTHS = [1, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 129, 1024, 4095]
EPS = 1e-5

pytestmark = pytest.mark.skipif(not native.available_isas(), reason=native.status())


def rows(count: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows of very different size, and a weight that is not one."""
    random = np.random.default_rng(seed)
    size = 10.0 ** random.integers(-3, 4, (count, 1))
    x = random.standard_normal((count, width)) * size
    weight = 1.5 + 0.4 * random.standard_normal(width)
    return x.astype(np.float32), weight.astype(np.float32)


def truth(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    wide = torch.from_numpy(x).double()
    return reference.rmsnorm(wide, torch.from_numpy(weight).double(), EPS).numpy()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("isa", native.available_isas())
def test_matches_truth(isa: str, width: int) -> None:
    x, weight = rows(5, width)
    want = truth(x, weight)
    plain = reference.rmsnorm(torch.from_numpy(x), torch.from_numpy(weight), EPS).numpy()
    got = native.rmsnorm(x, weight, EPS, isa=isa)
    allowed = 2 * np.abs(plain - want).max() + 4 * np.finfo(np.float32).eps * np.abs(want).max()
    assert np.abs(got - want).max() <= allowed, f"{isa} at width {width}"


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 200), count=st.integers(1, 9), seed=st.integers(0, 2**32 - 1))
def test_a_row_does_not_see_the_others(width: int, count: int, seed: int) -> None:
    x, weight = rows(count, width, seed)
    for isa in native.available_isas():
        together = native.rmsnorm(x, weight, EPS, isa=isa)
        for row in range(count):
            alone = native.rmsnorm(x[row : row + 1].copy(), weight, EPS, isa=isa)
            assert alone.tobytes() == together[row].tobytes(), f"{isa}, row {row} of {count}"


@pytest.mark.parametrize("width", [1, 7, 8, 63, 65])
@pytest.mark.parametrize("isa", native.available_isas())
def test_reads_and_writes_only_its_own_memory(isa: str, width: int) -> None:
    x, weight = rows(3, width)
    fence = 32
    buffers = []
    for inner in (x, weight, np.full_like(x, np.nan)):
        memory = np.full(inner.size + 2 * fence, np.nan, np.float32)
        memory[fence:-fence] = inner.ravel()
        buffers.append((memory, memory[fence:-fence].reshape(inner.shape)))
    (_, x_in), (_, weight_in), (memory, out) = buffers
    native.rmsnorm(x_in, weight_in, EPS, isa=isa, out=out)
    np.testing.assert_allclose(out, truth(x, weight), rtol=2e-6)
    assert np.isnan(memory[:fence]).all() and np.isnan(memory[-fence:]).all(), "wrote past its rows"


@pytest.mark.parametrize("isa", native.available_isas())
def test_nan_stays_in_its_row(isa: str) -> None:
    x, weight = rows(3, 65)
    clean = native.rmsnorm(x, weight, EPS, isa=isa)
    x[1, 64] = np.nan
    got = native.rmsnorm(x, weight, EPS, isa=isa)
    assert np.isnan(got[1]).all()
    assert got[[0, 2]].tobytes() == clean[[0, 2]].tobytes()


def test_eps_and_weight_matter() -> None:
    x, weight = rows(2, 33)
    x *= 1e-6
    got = native.rmsnorm(x, weight, EPS)
    assert not np.allclose(got, native.rmsnorm(x, weight, 1e-12), rtol=0.1)
    assert not np.allclose(got, native.rmsnorm(x, np.ones_like(weight), EPS), rtol=0.1)


def test_in_place_and_without_rows() -> None:
    x, weight = rows(4, 17)
    want = native.rmsnorm(x, weight, EPS)
    assert native.rmsnorm(x, weight, EPS, out=x) is x
    assert x.tobytes() == want.tobytes()
    assert native.rmsnorm(x[:0], weight, EPS).shape == (0, 17)


def test_auto_is_the_fastest_available() -> None:
    x, weight = rows(3, 65)
    best = native.available_isas()[-1]
    want = native.rmsnorm(x, weight, EPS, isa=best)
    assert native.rmsnorm(x, weight, EPS).tobytes() == want.tobytes()
    assert native.status().startswith(f"native core: {best} ")


@pytest.mark.parametrize("isa", ["mmx", "", "AVX2", "neon-of-another-world"])
def test_unknown_isa_is_refused_with_the_choices(isa: str) -> None:
    x, weight = rows(1, 8)
    with pytest.raises(UserError, match=r"not available here: use one of auto, portable"):
        native.rmsnorm(x, weight, EPS, isa=isa)


@pytest.mark.parametrize("isa", [i for i in ("avx2", "avx512", "amx", "neon")
                                 if i not in native.available_isas()])  # fmt: skip
def test_isa_this_machine_lacks_is_refused(isa: str) -> None:
    x, weight = rows(1, 8)
    with pytest.raises(UserError, match=isa):
        native.rmsnorm(x, weight, EPS, isa=isa)


def test_wrong_arrays_are_refused() -> None:
    x, weight = rows(4, 8)
    for bad in (x.astype(np.float64), x[:, ::2], x.T, x[0]):
        with pytest.raises(UserError, match="contiguous float32"):
            native.rmsnorm(bad, weight, EPS)
    with pytest.raises(UserError, match="weight"):
        native.rmsnorm(x, weight[:7], EPS)
    with pytest.raises(UserError, match="out"):
        native.rmsnorm(x, weight, EPS, out=np.empty((3, 8), np.float32))


def test_torch_side_takes_any_leading_shape() -> None:
    x, weight = rows(6, 33)
    tensor = torch.from_numpy(x).view(2, 3, 33)
    got = fast.rmsnorm(tensor.transpose(0, 1), torch.from_numpy(weight), EPS)
    want = truth(x, weight).reshape(2, 3, 33).transpose(1, 0, 2)
    assert got.shape == (3, 2, 33)
    np.testing.assert_allclose(got.numpy(), want, rtol=2e-6)


def test_torch_side_refuses_what_it_cannot_do() -> None:
    x, weight = (torch.from_numpy(a) for a in rows(2, 8))
    with pytest.raises(UserError, match="float32 on the CPU"):
        fast.rmsnorm(x.bfloat16(), weight, EPS)
    with pytest.raises(UserError, match="no gradient"):
        fast.rmsnorm(x.requires_grad_(), weight, EPS)
    with torch.no_grad():
        assert fast.rmsnorm(x, weight, EPS).isfinite().all()
