"""What this machine's processor does in a second, asked with the shapes of the run itself.

    products     those of a block and of the head: forward, and the gradients of both inputs
    attention    forward and backward over some rows, through the operation that the run takes
    memory       bytes that a pass between products moves: SwiGLU, forward and backward

A rate falls for small matrices, short rows and what lies in no cache, so nothing else would do for
the forecast: the projections of a block are multiplied one after another, each with tensors of its
own. Times are processor time over the number of threads: other programs do not make the machine
look slower.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

import torch

from endside.model.config import ModelConfig
from endside.ops import attention, infllm
from endside.ops.linear import linear
from endside.ops.swiglu import swiglu
from endside.train.forecast import Work, attention_operations
from endside.train.pages import keep_pages
from endside.train.precision import Precision

LONGEST = 2048  # tokens that attention and passes are asked with
LARGEST = 1e11  # operations of one call at most, which fewer tokens keep to
LEAST = 0.3  # seconds of calls, behind one that is not counted


@dataclass(frozen=True)
class Rates:
    """Operations and bytes per second."""

    products: float
    attention: float
    memory: float


def measure(work: Work, precision: Precision) -> Rates:
    """The rates of a run on this processor, with PyTorch's number of threads."""
    keep_pages()  # as training does
    # fp8 is emulated here: its products are float32, what is between them bfloat16
    products = torch.bfloat16 if precision == "bfloat16" else torch.float32
    between = torch.float32 if precision == "float32" else torch.bfloat16
    tokens = work.batch * work.seq_len
    return Rates(
        products=_products(work.model, tokens, products),
        attention=_attention(work, between),
        memory=_passes(work.model.intermediate_size, min(tokens, LONGEST), between),
    )


def _products(model: ModelConfig, tokens: int, dtype: torch.dtype) -> float:
    """As many blocks as there are, and the head."""
    block = list(_projections(model))
    head = [(model.hidden_size, model.vocab_size)]
    spent = done = 0.0
    for sizes, times in ((block, model.num_hidden_layers), (head, 1)):
        operations = 6.0 * sum(inputs * outputs for inputs, outputs in sizes)
        rows = max(1, min(tokens, int(LARGEST / operations)))
        calls = [_product(rows, *size, dtype) for size in sizes]
        spent += times * _seconds(lambda calls=calls: [call() for call in calls]) / rows
        done += times * operations
    return done / spent


def _product(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> Callable[[], object]:
    """One projection, forward and backward."""
    x, weight, above = (
        torch.full(size, 0.5, dtype=dtype, requires_grad=True)
        for size in ((rows, inputs), (outputs, inputs), (rows, outputs))
    )
    return _gradients(linear, [x, weight], above.detach())


def _projections(model: ModelConfig) -> Iterator[tuple[int, int]]:
    """(inputs, outputs) of every projection of a block."""
    width, head = model.hidden_size, model.head_dim
    query, keys = model.num_attention_heads * head, model.num_key_value_heads * head
    inner = model.intermediate_size
    yield from ((width, query), (width, keys), (width, keys), (query, width))
    yield from ((width, inner), (width, inner), (inner, width))


def _attention(work: Work, dtype: torch.dtype) -> float:
    """One layer over rows of one text each."""
    model, length = work.model, min(work.seq_len, LONGEST)
    rows = max(1, min(work.batch, LONGEST // length))
    make = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(rows, length, heads, model.head_dim, generator=make).to(dtype).requires_grad_()
        for heads in (model.num_attention_heads, *[model.num_key_value_heads] * 2)
    ]

    def attend(*qkv: torch.Tensor) -> torch.Tensor:
        if model.sparse is not None:
            return infllm.attend(*qkv, sparse=model.sparse)
        return attention.attend(*qkv, torch.zeros(rows, length, dtype=torch.int64))

    done = rows * length * attention_operations(model, length) / model.num_hidden_layers
    return done / _seconds(_gradients(attend, leaves, torch.randn_like(leaves[0])))


def _passes(width: int, rows: int, dtype: torch.dtype) -> float:
    """Three tensors pass forward and five backward."""
    gate, up = (torch.randn(rows, width).to(dtype).requires_grad_() for _ in range(2))
    moved = 8 * gate.nbytes
    return moved / _seconds(_gradients(swiglu, [gate, up], torch.randn_like(gate)))


def _gradients(
    function: Callable[..., torch.Tensor], leaves: list[torch.Tensor], above: torch.Tensor
) -> Callable[[], object]:
    return lambda: torch.autograd.grad(function(*leaves), leaves, above)


def _seconds(act: Callable[[], object]) -> float:
    """Of the median call."""
    threads, times = torch.get_num_threads(), []
    act()
    while sum(times) < LEAST:
        begun = time.process_time()
        act()
        times.append((time.process_time() - begun) / threads)
    return median(times)
