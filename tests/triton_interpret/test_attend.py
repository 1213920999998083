"""Forward and every gradient of the Triton path against the reference."""

from __future__ import annotations

import pytest
import torch

from endside.errors import UserError
from endside.ops.infllm import attend_packed, attend_stats, reference
from endside.ops.infllm import triton as fast
from tests.triton_interpret.cases import LARGE, SMALL, close, compare, gradients, small, tensors

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

# (B, T, S, G, group, D), configuration, dtype
CASES = [
    ((1, 1, 1, 1, 1, 16), SMALL, FP32),
    ((1, 63, 63, 1, 2, 16), SMALL, FP32),
    ((1, 65, 65, 2, 4, 16), SMALL, BF16),
    ((1, 129, 129, 1, 16, 16), SMALL, FP32),
    ((2, 17, 303, 2, 4, 16), SMALL, FP32),
    ((1, 17, 303, 1, 16, 16), small(selection="4.0"), BF16),
    ((1, 24, 239, 1, 8, 64), small(lse="exact"), FP32),
    ((1, 20, 208, 2, 1, 16), small(lse="exact", selection="4.0"), FP32),
    ((1, 20, 206, 1, 6, 16), small(init_blocks=2), FP16),
    ((1, 30, 149, 1, 16, 16), small(dense_len=150), FP32),
    ((1, 30, 150, 1, 16, 16), small(dense_len=150), FP32),
    ((1, 30, 151, 1, 16, 16), small(dense_len=150), BF16),
    ((1, 30, 170, 1, 16, 16), small(dense_len=150, compat="hf"), FP32),
    ((1, 9, 903, 1, 16, 128), LARGE, BF16),
]


@pytest.mark.parametrize("shape,sparse,dtype", CASES, ids=str)
def test_forward_and_gradients(shape, sparse, dtype) -> None:
    compare(fast.attend, *tensors(shape, dtype), sparse=sparse)


def test_sparsity_acts() -> None:
    """Unchosen keys are missing from the result: the cases above are not dense by identity."""
    shape = (1, 17, 303, 1, 8, 16)
    ratio = attend_stats(shape[1], shape[2], SMALL).ratio
    print(f"visible / available {ratio:.2f}")
    assert ratio < 0.5, "sparsity does not act"
    q, k, v = tensors(shape, FP32)
    everything = small(dense_len=1000)
    dense = reference.attend(q, k, v, sparse=everything)
    assert (fast.attend(q, k, v, sparse=SMALL) - dense).abs().max() > 0.05, "sparse equals dense"
    truth = reference.attend(q.double(), k.double(), v.double(), sparse=everything)
    close(fast.attend(q, k, v, sparse=everything), dense, truth)


def test_unseen_keys_get_no_gradient() -> None:
    q, k, v = tensors((1, 2, 400, 1, 4, 16), FP32)
    seen = reference.chosen_blocks(q, k, sparse=SMALL)
    _, _, dk, dv = gradients(fast.attend, q, k, v, torch.ones_like(q), sparse=SMALL)
    for block in set(range(25)) - set(seen.flatten().tolist()):
        part = slice(block * 16, block * 16 + 16)
        assert not dk[:, part].any() and not dv[:, part].any(), f"block {block} got a gradient"


def test_packed_documents() -> None:
    lengths = [1, 150, 63, 128]
    q, k, v = (x[0] for x in tensors((1, 342, 342, 1, 8, 16), FP32))

    def packed(q, k, v, *, sparse):
        return fast.attend_packed(q, k, v, lengths=lengths, sparse=sparse)

    def truth(q, k, v, *, sparse):
        return attend_packed(q, k, v, lengths=lengths, sparse=sparse, impl="reference")

    weight = torch.linspace(-1, 1, q.numel()).view_as(q)
    found = gradients(packed, q, k, v, weight, sparse=SMALL)
    slow = gradients(truth, q, k, v, weight, sparse=SMALL)
    wide = gradients(truth, *(x.double() for x in (q, k, v, weight)), sparse=SMALL)
    for one, two, three in zip(found, slow, wide):
        close(one, two, three)


def test_rows_of_different_length() -> None:
    q, k, v = tensors((2, 12, 230, 1, 8, 16), FP32)
    weight = torch.ones_like(q)
    rest = dict(sparse=SMALL, lengths=[230, 141])
    found = gradients(fast.attend, q, k, v, weight, **rest)
    slow = gradients(reference.attend, q, k, v, weight, **rest)
    for one, two in zip(found, slow):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize(
    "sparse", [SMALL, small(dense_len=280, selection="4.0", lse="exact")], ids=str
)
def test_decode(new, sparse) -> None:
    """A few new tokens over views of a larger cache, with summaries that have room left."""
    q, k, v = tensors((2, new, 340, 2, 4, 16), FP32)
    k1, k2 = reference.summarise(k, sparse)
    k, v = k[:, :300], v[:, :300]
    lengths = [300, 259]
    for row, length in enumerate(lengths):
        k1[row, sparse.fine_count(length) :] = torch.nan
        k2[row, sparse.coarse_count(length) :] = torch.nan
    rest = dict(sparse=sparse, summaries=(k1, k2))
    truth = reference.attend(q, k, v, lengths=lengths, **rest)
    on_device = torch.tensor(lengths, dtype=torch.int32)
    torch.testing.assert_close(
        fast.attend(q, k, v, lengths=on_device, **rest), truth, rtol=1e-5, atol=2e-6
    )


def test_strided_queries() -> None:
    """q, k and v cut from one projection are read in place."""
    qkv = torch.randn(2, 20, 6, 16, generator=torch.Generator().manual_seed(3))
    q, k, v = qkv.split([4, 1, 1], dim=2)
    found = fast.attend(q, k, v, sparse=SMALL)
    torch.testing.assert_close(found, reference.attend(q, k, v, sparse=SMALL), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    "width,sparse,dtype,word",
    [
        (48, SMALL, FP32, "head width 48"),
        (
            16,
            small(kernel_size=6, kernel_stride=3, block_size=12, window_size=24),
            FP32,
            "block_size 12",
        ),
        (16, SMALL, torch.float64, "float64"),
    ],
)
def test_unsupported_sizes_are_refused(width, sparse, dtype, word) -> None:
    q, k, v = tensors((1, 1, 20, 1, 1, width), dtype)
    with pytest.raises(UserError, match=word):
        fast.attend(q, k, v, sparse=sparse)
