"""In which numbers the products of training are computed; weights and moments stay float32.

    float32     as they are
    bfloat16    PyTorch's autocast, for held-out text too: sharded weights are gathered in it
    fp8         autocast, and the projections of the blocks in FP8 (`quant/fp8.py`)

The output head stays out of FP8, as embedding and norms do: its products are few and its rounding
is what the loss sees first. Held-out text is read without FP8, because the weights that are
exported are not rounded to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch
from torch import nn

from endside.quant import fp8

Precision = Literal["float32", "bfloat16", "fp8"]


class Products:
    """Puts a precision into a model's projections, for the loop that trains it."""

    def __init__(
        self, model: nn.Module, precision: Precision, *, note: Callable[[str], None]
    ) -> None:
        self._precision = precision
        self._device = next(model.parameters()).device
        self._slots: list[nn.Module] = []
        self._plain: list[Callable] = []
        if precision == "fp8":
            product, how = fp8.product_for(self._device)
            note(f"precision fp8: {how}")
            self._slots = [
                module
                for name, module in model.named_modules()
                if hasattr(module, "product") and name != "lm_head"
            ]
            self._plain = [module.product for module in self._slots]
            self._fill([product] * len(self._slots))

    def forward(self) -> AbstractContextManager:
        """The context of a forward pass whose gradient will be taken."""
        if self._precision == "float32":
            return nullcontext()
        return torch.autocast(self._device.type, torch.bfloat16)

    @contextmanager
    def exact(self) -> Iterator[None]:
        """The context of a forward pass over held-out text: no FP8."""
        trained = [module.product for module in self._slots]
        self.remove()
        try:
            with self.forward():
                yield
        finally:
            self._fill(trained)

    def remove(self) -> None:
        """Put the plain products back."""
        self._fill(self._plain)

    def _fill(self, products: list[Callable]) -> None:
        for module, product in zip(self._slots, products, strict=True):
            module.product = product
