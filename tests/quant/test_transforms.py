"""Rotation and smoothing change no logit; calibration leaves out what it should."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from endside.errors import UserError
from endside.model.batch import Batch
from endside.model.transformer import Transformer
from endside.quant.calibrate import Moments, rows, watched
from endside.quant.pack import Scheme
from endside.quant.rotate import rotate_block, rotation
from endside.quant.smooth import SITES, Shared, smooth
from tests.quant.text import rows as text


@pytest.mark.parametrize("width", [1, 2, 12, 48, 64, 224, 256, 1024, 1536])
def test_rotations_are_orthogonal_and_flat(width: int) -> None:
    turned = rotation(width, seed=1)
    matrix = turned.turn(torch.eye(width, dtype=torch.float64))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(width).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, width**-0.5))


def test_a_width_without_a_hadamard_matrix() -> None:
    with pytest.raises(UserError, match="width of 18"):
        rotation(18)


@torch.no_grad()
def rotated(model: Transformer) -> Transformer:
    turned = rotation(model.config.hidden_size)
    head = model.lm_head.weight.data * model.norm.weight.data
    model.lm_head.weight.data = turned.turn(head)
    model.norm.weight.data.fill_(1.0)
    model.embed_tokens.weight.data = turned.turn(model.embed_tokens.weight.data)
    for block in model.layers:
        rotate_block(block, turned)
    return model


@torch.no_grad()
def smoothed(model: Transformer, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """Smooth every layer; how far the alphas went."""
    tokens = text(4, 64, 9)
    alphas = {}
    for index, block in enumerate(model.layers):
        moments = {
            s.readers[0]: Moments(block.get_submodule(s.readers[0]).weight.shape[1]) for s in SITES
        }
        with watched(block, moments):
            model(Batch(tokens))
        for one in moments.values():
            one.close()
        found = smooth(block, moments, Scheme("int4", 32), dtype)
        alphas |= {f"{index}.{name}": alpha for name, alpha in found.items()}
    return alphas


@torch.no_grad()
def logits(model: Transformer) -> torch.Tensor:
    return model.logits(model(Batch(text(3, 65, 11))))


def test_rotation_preserves_the_function(make_model: Callable[..., Transformer]) -> None:
    before, after = logits(make_model()), rotated(make_model())
    torch.testing.assert_close(logits(after), before, rtol=0, atol=1e-4)
    moved = after.layers[1].mlp.down_proj.weight - make_model().layers[1].mlp.down_proj.weight
    assert moved.abs().max() > 0.01, "nothing was rotated"


@pytest.mark.parametrize("turn", [False, True])
def test_smoothing_preserves_the_function(
    make_model: Callable[..., Transformer], turn: bool
) -> None:
    model = rotated(make_model()) if turn else make_model()
    before, norm = logits(model), model.layers[1].input_layernorm.weight.clone()
    alphas = smoothed(model)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-4)
    assert sum(alpha > 0 for alpha in alphas.values()) >= len(alphas) // 2, "nothing was smoothed"
    assert (model.layers[1].input_layernorm.weight - norm).abs().max() > 1e-3


def test_smoothing_is_exact_under_norms_in_16_bits(make_model: Callable[..., Transformer]) -> None:
    model = make_model(dtype=torch.bfloat16).float()
    before = logits(model)
    smoothed(model, torch.bfloat16)
    for block in model.layers:
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            assert torch.equal(norm.weight.bfloat16().float(), norm.weight)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-4)


@torch.no_grad()
def test_moments_after_smoothing_are_those_of_the_smoothed_layer(
    make_model: Callable[..., Transformer],
) -> None:
    model, name = make_model(), "self_attn.o_proj"
    block, states = model.layers[0], model.embed(text(2, 63, 4))

    def gather() -> dict[str, Moments]:
        found = {
            s.readers[0]: Moments(block.get_submodule(s.readers[0]).weight.shape[1], 4)
            for s in SITES
        }
        with watched(block, found):
            block(states, model.rope(torch.arange(63)[None]), Batch(torch.empty(2, 63)), None)
        for one in found.values():
            one.close()
        return found

    moments = gather()
    alphas = smooth(block, moments, Scheme("int4", 32), torch.float32)
    again = gather()
    assert alphas[name] > 0
    for site, one in moments.items():
        scale = one.hessian.abs().max().item()
        torch.testing.assert_close(one.hessian, again[site].hessian, rtol=1e-4, atol=1e-6 * scale)
        torch.testing.assert_close(one.mean, again[site].mean, rtol=1e-4, atol=1e-6)


def test_heads_of_a_key_group_share_factors() -> None:
    shared = Shared(times=2, width=3)
    sizes = torch.arange(12.0)
    torch.testing.assert_close(shared.gather(sizes), torch.tensor([1.5, 2.5, 3.5, 7.5, 8.5, 9.5]))
    spread = shared.spread(torch.arange(6.0))
    assert spread.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]


@pytest.mark.parametrize("prefix", [0, 4])
@pytest.mark.parametrize("width", [33, 2100])
def test_moments_leave_out_the_prefix_of_every_row(prefix: int, width: int) -> None:
    x = torch.randn(3, 9, width, generator=torch.Generator().manual_seed(7))
    x[:, 1] *= 50
    moments = Moments(width, prefix)
    moments.add(x[:2])
    moments.add(x[2:])
    moments.close()
    kept = x[:, prefix:].reshape(-1, width).double()
    assert moments.count == len(kept) == 3 * (9 - prefix)
    expected = kept.T @ kept
    torch.testing.assert_close(moments.hessian.double(), expected, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(moments.mean, kept.abs().mean(0), rtol=1e-5, atol=1e-6)
    assert moments.peak_first == x[:, :4].abs().max()
    assert moments.peak_rest == x[:, 4:].abs().max() < moments.peak_first


def test_rows_start_as_texts_do_and_are_spread_over_the_text() -> None:
    texts = [[*range(10, 20)], [*range(30, 35)], [*range(40, 55)]]
    assert rows(texts, 6, 6, bos=1).tolist() == [
        [1, 10, 11, 12, 13, 14], [1, 15, 16, 17, 18, 19], [1, 30, 31, 32, 33, 34],
        [1, 40, 41, 42, 43, 44], [1, 45, 46, 47, 48, 49], [1, 50, 51, 52, 53, 54],
    ]  # fmt: skip
    assert rows(texts, 2, 10).tolist() == [[*range(10, 20)], [*range(45, 55)]][:1] + [
        [30, 31, 32, 33, 34, 40, 41, 42, 43, 44]
    ]
    with pytest.raises(UserError, match="gives 6 rows of 6 tokens, 7 are asked"):
        rows(texts, 7, 6, bos=1)
