"""What a layer's inputs look like on real text: second moments, mean sizes, peaks.

Text enters as equal rows of tokens, each starting as a text starts, because the first positions of
a text are where massive activations sit: an initial token is looked at by all others and carries
values far above the rest. In a sum of squares, H = X^T X, a few such rows outweigh all others. With
`prefix` = n the first n positions of every row stay out of H (P-GPTQ, arXiv 2506.07900, section 5).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from endside.errors import UserError

FIRST = 4  # positions whose peak is reported beside that of the others
WIDE = 4096  # inputs up to which second moments are kept in float64
STRIPE = 2048  # columns of H per product: only its upper half is computed


class Moments:
    """Sums over the inputs of one projection; rows are added, the first `prefix` positions not."""

    def __init__(self, width: int, prefix: int = 0) -> None:
        dtype = torch.float64 if width <= WIDE else torch.float32
        self.prefix = prefix
        self.count = 0
        self.hessian = torch.zeros(width, width, dtype=dtype)
        self.size = torch.zeros(width, dtype=torch.float64)  # sum of |x|
        self.peak_first = 0.0  # largest |x| in the first FIRST positions
        self.peak_rest = 0.0

    def add(self, x: torch.Tensor) -> None:
        """x (B, T, K): whole rows, from their first position on."""
        size = x.abs()
        self.peak_first = max(self.peak_first, size[:, :FIRST].max().item())
        if size.shape[1] > FIRST:
            self.peak_rest = max(self.peak_rest, size[:, FIRST:].max().item())
        kept = x[:, self.prefix :].flatten(0, 1)
        self.count += len(kept)
        self.size += size[:, self.prefix :].sum((0, 1), dtype=torch.float64)
        for start in range(0, x.shape[-1], STRIPE):
            stripe = kept[:, start : start + STRIPE]
            self.hessian[start : start + STRIPE, start:] += stripe.T @ kept[:, start:]

    def close(self) -> None:
        """Fill the lower half of H, once all rows are in."""
        for start in range(0, len(self.hessian), STRIPE):
            stop = start + STRIPE
            self.hessian[stop:, start:stop] = self.hessian[start:stop, stop:].T

    @property
    def mean(self) -> torch.Tensor:
        """Mean |x| of each channel, (K,)."""
        return self.size / max(1, self.count)

    def rescale(self, factors: torch.Tensor) -> None:
        """Become the moments of x / factors, factors (K,)."""
        inverse = (1.0 / factors).to(self.hessian.dtype)
        self.hessian *= inverse[:, None]
        self.hessian *= inverse
        self.size *= inverse.double()


@contextmanager
def watched(module: nn.Module, moments: dict[str, Moments]) -> Iterator[None]:
    """While open, what enters the submodules named in `moments` is added there."""

    def watch(name: str) -> Callable:
        return lambda _, inputs: moments[name].add(inputs[0])

    handles = [
        module.get_submodule(name).register_forward_pre_hook(watch(name)) for name in moments
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def rows(
    texts: Iterable[list[int]], samples: int, length: int, bos: int | None = None
) -> torch.Tensor:
    """Token rows (samples, length) int64, spread evenly over all that the texts give.

    The texts are joined and cut into pieces; every row starts as the model's texts do, with `bos`
    where it has one. UserError when there is too little text.
    """
    room = length - (bos is not None)
    pieces: list[list[int]] = []
    left: list[int] = []
    for text in texts:
        left += text
        while len(left) >= room:
            pieces.append(left[:room])
            left = left[room:]
    if len(pieces) < samples:
        raise UserError(
            f"the text gives {len(pieces)} rows of {length} tokens, {samples} are asked for: give "
            "more text, or lower --samples or --length"
        )
    chosen = [pieces[i * len(pieces) // samples] for i in range(samples)]
    start = [] if bos is None else [bos]
    return torch.tensor([start + piece for piece in chosen])
