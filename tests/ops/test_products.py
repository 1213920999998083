"""Float32 products in matrix tiles against float64, and who gets them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from endside import native
from endside.data.loader import TokenBatch
from endside.model.presets import preset
from endside.model.transformer import Transformer
from endside.ops import linear as projection
from endside.ops import passes
from endside.ops.linear import tiles
from endside.train.losses import LossConfig, next_token

needs_tiles = pytest.mark.skipif(
    native.load() is None or not passes.has_tiles(), reason="this processor has no matrix tiles"
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def errors(a: torch.Tensor, b: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Of a product, as a share of the sum of magnitudes."""
    a, b = a.double(), b.double()
    return (found - a @ b).abs() / (a.abs() @ b.abs())


@needs_tiles
@pytest.mark.parametrize("shape", [(33, 70, 100), (256, 512, 300), (40, 1100, 2050)])
@pytest.mark.parametrize("spread", [0, 30], ids=["even", "uneven"])
def test_products_are_as_exact_as_float32(shape: tuple[int, int, int], spread: int) -> None:
    """Whichever way the factors lie, also where magnitudes range over 2^60 in a sum."""
    rows, columns, depth = shape
    scale = torch.exp2(spread * normal(depth, seed=5).clamp(-1, 1))
    for lies in range(4):
        a = normal(rows, depth) if lies & 1 else normal(depth, rows).t()
        b = normal(depth, columns) if lies & 2 else normal(columns, depth).t()
        a, b = a * scale, b * scale[:, None]
        inside = a.stride(1) == 1, b.stride(1) == 1
        assert inside == (bool(lies & 1), bool(lies & 2)), "a scaled factor lies otherwise"
        out = torch.full((rows, columns + 3), 7.0)
        found = tiles.product(a, b, out[:, :columns])
        ours, usual = errors(a, b, found), errors(a, b, torch.mm(a, b))
        assert ours.max() < 2**-21, "beyond what sums of such a length lose"
        assert ours.square().mean() <= 2 * usual.square().mean() + 2**-48
        assert (out[:, columns:] == 7).all(), "wrote beside the product"


@needs_tiles
def test_bits_do_not_depend_on_threads() -> None:
    a, b = normal(130, 1500), normal(1500, 700)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            found.append(tiles.product(a, b))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], one) for one in found[1:])


@needs_tiles
def test_who_gets_tiles(every_product_in_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 with a gradient; nothing under autocast, in other dtypes, or where there are none."""
    taken = []
    product = tiles.product
    monkeypatch.setattr(tiles, "product", lambda *a, **k: taken.append(1) or product(*a, **k))
    x, weight = normal(40, 64), normal(96, 64).requires_grad_()
    projection.linear(x, weight).sum().backward()
    assert len(taken) == 2, "forward and the weight's gradient, but none for x, which wants none"
    projection.linear(x.requires_grad_(), weight).sum().backward()
    assert len(taken) == 5

    with torch.no_grad():
        projection.linear(x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert projection.linear(x, weight).dtype == torch.bfloat16
    projection.linear(x.double(), weight.double())
    monkeypatch.setattr(passes, "ISA", "avx2")
    projection.linear(x, weight)
    assert len(taken) == 5


@needs_tiles
def test_small_and_thin_products_stay_with_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> torch.Tensor:
        raise AssertionError("took it")

    monkeypatch.setattr(tiles, "product", refuse)
    for shape in ((300, 300, 300), (64, 4096, 4096)):
        rows, columns, depth = shape
        a, b = normal(rows, depth), normal(depth, columns)
        assert torch.equal(tiles.multiply(a, b), torch.mm(a, b))
    with pytest.raises(AssertionError, match="took it"):
        tiles.multiply(normal(512, 512), normal(512, 512))


@needs_tiles
def test_a_step_has_the_same_gradients(
    every_product_in_tiles: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole model's, tied and untied, to what rounding differs by."""
    for tied in (True, False):
        found = []
        for there in (True, False):
            monkeypatch.setattr(tiles, "has_tiles", lambda there=there: there)
            model = Transformer(replace(preset("tiny"), tie_word_embeddings=tied))
            model.init_weights(torch.Generator().manual_seed(0))
            shape = (2, 40)
            tokens = torch.randint(256, shape, generator=torch.Generator().manual_seed(1))
            documents = (torch.arange(40) // 17).expand(shape)
            loss = next_token(LossConfig())(model, TokenBatch(tokens, documents))
            loss.total.backward()
            found.append([loss.loss.detach(), *(p.grad for p in model.parameters())])
        apart = [(a - b).abs().max() / b.abs().max() for a, b in zip(*found, strict=True)]
        assert 0 < max(apart) < 1e-5, "the same bits would mean that tiles were not asked"
