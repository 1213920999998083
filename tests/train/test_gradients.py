"""Gradients of every operation and loss of training against finite differences in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.autograd import gradcheck

from endside.data.loader import TokenBatch
from endside.model.draft import KINDS
from endside.model.presets import preset
from endside.model.transformer import Transformer
from endside.ops import implementation
from endside.ops.cross_entropy.reference import IGNORE, cross_entropy
from endside.ops.infllm import attend, attend_packed, attend_stats
from endside.ops.infllm.config import SparseConfig
from endside.quant.pack import Scheme
from endside.quant.ternary import FakeLinear, fake_quantized
from endside.train import bita
from endside.train import draft as head_drafts
from endside.train.draft import DraftConfig
from endside.train.losses import LossConfig, next_token, square_of_log_z
from tests.ops.test_ops import (
    DIFFERENTIABLE_ONLY_IN_TORCH,
    NEEDS_CORE,
    ROWS,
    _inputs,
    need_core,
    need_kernel,
    packed_rows,
)

DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 1, 1, 1]])


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def angles() -> tuple[torch.Tensor, torch.Tensor]:
    angle = normal(2, 5, 1, 4).detach()
    return angle.cos() * 1.1, angle.sin() * 1.1


def targets() -> torch.Tensor:
    return torch.tensor([[3, IGNORE, 0], [6, 6, IGNORE]])


HEADS = [(2, 9, 4, 4), (2, 9, 2, 4), (2, 9, 2, 4)]
CASES: dict[str, tuple[Callable, list[tuple[int, ...]]]] = {
    "rmsnorm": (lambda x, w: implementation("rmsnorm", "reference")(x, w, 1e-5), [(3, 7), (7,)]),
    "rope": (lambda x: implementation("rope", "reference")(x, *angles()), [(2, 5, 3, 8)]),
    "swiglu": (implementation("swiglu", "reference"), [(2, 7), (2, 7)]),
    "swiglu-fused": (implementation("swiglu", "fused"), [(2, 7), (2, 7)]),
    "linear": (implementation("linear", "reference"), [(3, 5), (4, 5)]),
    "cross_entropy": (lambda x: cross_entropy(x, targets()), [(2, 3, 7)]),
    "z": (lambda x: square_of_log_z(x, targets()), [(2, 3, 7)]),
    "attention-reference": (implementation("attention", "reference"), HEADS),
    "attention-sdpa": (implementation("attention", "sdpa"), HEADS),
    "attention-reference-documents": (
        lambda *qkv: implementation("attention", "reference")(*qkv, DOCUMENTS), HEADS,
    ),
    "attention-sdpa-documents": (
        lambda *qkv: implementation("attention", "sdpa")(*qkv, DOCUMENTS), HEADS,
    ),
}  # fmt: skip


CASES |= {
    "rmsnorm-fused": (lambda x, w: implementation("rmsnorm", "fused")(x, w, 1e-5), [(3, 7), (7,)]),
    "rope-fused": (lambda x: implementation("rope", "fused")(x, *angles()), [(2, 5, 3, 8)]),
    "add_norm": (
        lambda x, b, w: implementation("add_norm", "reference")(x, b, w, 0.7, 1e-5),
        [(3, 7), (3, 7), (7,)],
    ),
    "head_loss": (
        lambda x, w: implementation("head_loss", "reference")(x, w, targets(), 3.0),
        [(2, 3, 5), (7, 5)],
    ),
    "head_loss-fused": (
        lambda x, w: implementation("head_loss", "fused")(x, w, targets(), 3.0),
        [(2, 3, 5), (7, 5)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_an_operation(name: str) -> None:
    function, shapes = CASES[name]
    inputs = [normal(*shape, seed=number) for number, shape in enumerate(shapes)]
    assert gradcheck(function, inputs, eps=1e-6, atol=1e-7, rtol=1e-5, fast_mode=True)


DIFFERENTIABLE = [row for row in ROWS if row not in DIFFERENTIABLE_ONLY_IN_TORCH]


@pytest.mark.parametrize(("op", "impl"), DIFFERENTIABLE, ids=map("-".join, DIFFERENTIABLE))
@pytest.mark.usefixtures("every_product_in_tiles")
def test_a_float32_gradient_has_the_slope_of_the_float64_reference(op: str, impl: str) -> None:
    """Every row of the table, through the core where it has a pass for it."""
    need_kernel(op, impl)
    tensors, rest = _inputs(op, 37)
    rest = tuple(x.float() if torch.is_tensor(x) and x.is_floating_point() else x for x in rest)
    check_slopes(
        lambda *x: implementation(op, impl)(*x, *rest),
        lambda *x: implementation(op, "reference")(*x, *(_wide(one) for one in rest)),
        tensors,
    )


@pytest.mark.parametrize("impl", ["sdpa", "segments", "tiles"])
@pytest.mark.parametrize("rows", [[[3, 30, 4]], [[2, 290, 5], [297]]], ids=["short", "long"])
def test_packed_attention_has_the_slope_of_the_float64_reference(
    impl: str, rows: list[list[int]]
) -> None:
    if impl in NEEDS_CORE:
        need_core()
    leaves, documents = packed_rows(rows)
    check_slopes(
        lambda *qkv: implementation("attention", impl)(*qkv, documents),
        lambda *qkv: implementation("attention", "reference")(*qkv, documents),
        [leaf.detach() for leaf in leaves],
    )


def _wide(x: object) -> object:
    return x.double() if torch.is_tensor(x) and x.is_floating_point() else x


def check_slopes(fast: Callable, truth: Callable, tensors: list[torch.Tensor]) -> None:
    """Gradients of `fast` in float32 against central differences of `truth` in float64."""
    exact = [x.float().double() for x in tensors]  # numbers that both types hold
    leaves = [x.float().requires_grad_() for x in exact]
    gradients = torch.autograd.grad(mixed(fast(*leaves)), leaves)
    generator, step = torch.Generator().manual_seed(11), 1e-6
    for number, (x, gradient) in enumerate(zip(exact, gradients, strict=True)):
        assert gradient.abs().max() > 0
        for _ in range(2):
            way = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            sides = [[*exact[:number], x + sign * way, *exact[number + 1 :]]
                     for sign in (step, -step)]  # fmt: skip
            slope = float((mixed(truth(*sides[0])) - mixed(truth(*sides[1]))) / (2 * step))
            part = gradient.double() * way
            # float32 keeps seven digits of every part; differences lose half of float64's sixteen
            near = 3e-6 * float(part.abs().sum()) + 1e-6
            assert float(part.sum()) == pytest.approx(slope, abs=near)


def mixed(outs: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """A fixed mixture of all that is in the outputs."""
    outs = outs if isinstance(outs, tuple) else (outs,)
    return sum(
        (one.double() * torch.linspace(-1, 1 + i, one.numel()).double().view(one.shape)).sum()
        for i, one in enumerate(outs)
    )


# A budget of 2 + 1 blocks of 4 tokens: most of 48 tokens are not seen.
SPARSE = SparseConfig(
    kernel_size=2, kernel_stride=1, block_size=4, window_size=4, topk=2, dense_len=8
)


@pytest.mark.parametrize("impl", ["reference", "vectorised"])
@pytest.mark.parametrize("selection", ["4.1", "4.0"])
def test_sparse_attention_where_the_choice_is_frozen(impl: str, selection: str) -> None:
    """A small step changes no choice, so that finite differences see a frozen one."""
    sparse = replace(SPARSE, selection=selection)
    stats = attend_stats(48, 48, sparse)
    print(f"mean visible {stats.visible:.0f} of {stats.available:.0f} tokens: {stats.ratio:.2f}")
    assert stats.ratio < 0.5
    q, k, v = normal(1, 48, 4, 4), normal(1, 48, 2, 4, seed=1), normal(1, 48, 2, 4, seed=2)
    weight = normal(1, 48, 4, 4, seed=3).detach()

    def loss(*qkv: torch.Tensor) -> torch.Tensor:
        return (attend(*qkv, sparse=sparse, impl=impl) * weight).sum()

    check_directions(loss, [q, k, v])


def test_sparse_attention_of_packed_documents() -> None:
    q, k, v = normal(48, 4, 4), normal(48, 2, 4, seed=1), normal(48, 2, 4, seed=2)
    weight = normal(48, 4, 4, seed=3).detach()

    def loss(*qkv: torch.Tensor) -> torch.Tensor:
        return (attend_packed(*qkv, lengths=[30, 18], sparse=SPARSE) * weight).sum()

    check_directions(loss, [q, k, v])


def check_directions(
    loss: Callable[..., torch.Tensor], leaves: list[torch.Tensor], count: int = 2
) -> None:
    """Slopes along random directions, one leaf at a time, are gradient times direction."""
    gradients = torch.autograd.grad(loss(*leaves), leaves)
    generator, step = torch.Generator().manual_seed(11), 1e-6
    with torch.no_grad():
        for number, (leaf, gradient) in enumerate(zip(leaves, gradients, strict=True)):
            assert gradient.abs().max() > 0
            for _ in range(count):
                way = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
                moved = [
                    [x + sign * step * way if i == number else x for i, x in enumerate(leaves)]
                    for sign in (1, -1)
                ]
                slope = float((loss(*moved[0]) - loss(*moved[1])) / (2 * step))
                size = float((gradient * way).abs().sum())
                assert float((gradient * way).sum()) == pytest.approx(slope, abs=1e-7 * size + 1e-8)


def batch() -> TokenBatch:
    tokens = torch.randint(0, 40, (2, 25), generator=torch.Generator().manual_seed(2))
    owners = torch.tensor([[0] * 9 + [1] * 16, [0] * 20 + [1] * 5])
    return TokenBatch(tokens, owners)


@pytest.mark.parametrize(
    ("config", "recompute", "sparse"),
    [
        (LossConfig(mtp_weight=0.0), False, False),
        (LossConfig(mtp_weight=0.3), False, False),
        (LossConfig(mtp_weight=0.3, z_weight=0.1), False, False),
        (LossConfig(mtp_weight=0.3, z_weight=0.1, chunk=7), True, False),
        (LossConfig(mtp_weight=0.3), False, True),
    ],
    ids=["next", "mtp", "mtp-z", "mtp-z-chunks-recomputed", "mtp-sparse"],
)
def test_a_loss_through_the_whole_model(config: LossConfig, recompute: bool, sparse: bool) -> None:
    """Every parameter of a model whose scales all bite, the MTP layer's too."""
    small = SPARSE if sparse else None
    shape = replace(
        preset("tiny"), vocab_size=40, hidden_size=24, head_dim=8, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=20, mtp_layers=1, num_hidden_layers=1,
        sparse=small,
        rope=replace(preset("tiny").rope, long_factor=(1.0, 1.2, 2.0, 4.0),
                     short_factor=(1.0, 1.2, 2.0, 4.0)),
    )  # fmt: skip
    model = Transformer(shape).double()
    model.init_weights(torch.Generator().manual_seed(4))
    for module in model.modules():
        if hasattr(module, "recompute"):
            module.recompute = recompute
    data, loss_fn = batch(), next_token(config)
    loss_fn(model, data).total.backward()
    trained = {n: p for n, p in model.named_parameters() if p.grad is not None}
    left = [n for n, p in model.named_parameters() if p.grad is None]
    assert all(n.startswith("mtp.") for n in left)
    assert bool(left) == (config.mtp_weight == 0)
    check_loss(trained, lambda: loss_fn(model, data).total)


def check_loss(trained: dict[str, torch.nn.Parameter], total: Callable[[], torch.Tensor]) -> None:
    """The gradients that parameters have are the slopes of `total` in float64."""
    generator, step = torch.Generator().manual_seed(11), 1e-6
    for _ in range(3):
        # Scaled so that every parameter has an equal part in the slope.
        ways = [
            torch.randn(p.shape, generator=generator, dtype=torch.float64) / p.grad.norm()
            for p in trained.values()
        ]
        along = sum(float((p.grad * w).sum()) for p, w in zip(trained.values(), ways, strict=True))
        with torch.no_grad():
            torch._foreach_add_(list(trained.values()), ways, alpha=step)
            ahead = float(total())
            torch._foreach_add_(list(trained.values()), ways, alpha=-2 * step)
            behind = float(total())
            torch._foreach_add_(list(trained.values()), ways, alpha=step)
        assert along == pytest.approx((ahead - behind) / (2 * step), abs=1e-5)


@pytest.mark.parametrize("kind", [*KINDS, "bita"])
def test_the_loss_of_a_draft(kind: str) -> None:
    """What guesses ahead, and nothing of the model that it guesses for."""
    shape = replace(preset("tiny"), vocab_size=40, hidden_size=32, num_hidden_layers=6)
    model = Transformer(shape).double()
    model.init_weights(torch.Generator().manual_seed(4))
    model.requires_grad_(False)
    cfg = DraftConfig(model="none", steps=200, kind=kind, unroll=3, seq_len=24)
    if kind == "bita":
        draft, loss_fn = bita.make(cfg, model), bita.loss_of(model, decay=0.7)
    else:
        draft, loss_fn = head_drafts.make(cfg, model, None), head_drafts.loss_of(model, cfg, None)
    draft, data = draft.double(), batch()
    loss_fn(draft, data).total.backward()
    trained = {name: p for name, p in draft.named_parameters() if p.requires_grad}
    assert trained and all(p.grad is not None and p.grad.any() for p in trained.values())
    check_loss(trained, lambda: loss_fn(draft, data).total)


def test_mtp_is_the_specifications_formula() -> None:
    """x_i = P [norm h_i ; norm E(t_{i+1})]; one layer; predicts t_{i+2} with the shared head."""
    model = Transformer(replace(preset("tiny"), mtp_layers=1)).double()
    model.init_weights(torch.Generator().manual_seed(4))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * normal(*parameter.shape).detach()
    tokens = torch.randint(0, 320, (1, 13), generator=torch.Generator().manual_seed(2))
    data = TokenBatch(tokens, torch.zeros_like(tokens))
    loss = next_token(LossConfig(mtp_weight=0.3))(model, data)

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return weight * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    from endside.model.batch import Batch

    inputs = Batch(tokens[:, :-1])
    hidden, mtp = model(inputs), model.mtp
    embedded = model.embed_tokens.weight[tokens[0, 1:]] * 3.0
    pair = torch.cat(
        (norm(hidden[0], mtp.hidden_norm.weight), norm(embedded, mtp.embed_norm.weight)), -1
    )
    rope = model.rope(torch.arange(12)[None])
    out = mtp.layer((pair @ mtp.proj.weight.t())[None], rope, inputs, None)[0]
    logits = norm(out, mtp.norm.weight) @ model.lm_head.weight.t() / (48 / 16)
    chosen = logits.log_softmax(-1)[torch.arange(11), tokens[0, 2:]]
    assert float(loss.parts["mtp_loss"]) == pytest.approx(-chosen.mean().item(), rel=1e-12)
    want = float(loss.loss) + 0.3 * float(loss.parts["mtp_loss"])
    assert float(loss.total.detach()) == pytest.approx(12 * want, rel=1e-12)


@pytest.mark.parametrize("kind", ["ternary", "int4"])
def test_low_bits_pass_the_gradient_straight_through(kind: str) -> None:
    """With the rounding errors held fixed, y = x (Q(W0) + W - W0)^T has the layer's gradients."""
    scheme = Scheme(kind, 32)
    layer = FakeLinear(64, 5, scheme)
    with torch.no_grad():
        layer.weight.copy_(normal(5, 64))
    x = normal(3, 64, seed=1).detach().float().requires_grad_()
    grad = normal(3, 5, seed=2).detach()
    layer(x).backward(grad.float())
    error = (fake_quantized(layer.weight, scheme) - layer.weight).detach().double()

    def frozen(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x @ (weight + error).t()

    leaves = [t.detach().double().requires_grad_() for t in (x, layer.weight)]
    assert gradcheck(frozen, leaves, eps=1e-6, fast_mode=True)
    want = torch.autograd.grad(frozen(*leaves), leaves, grad)
    for got, exact in zip((x.grad, layer.weight.grad), want, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)
