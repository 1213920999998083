"""A running average of the weights, which follows the noise of single steps less.

    average = average + (1 - decay) (weights - average)          after every step

It starts as the weights are before the first step. `endside pretrain` exports it with
`export = "ema"`; the weights that are trained never see it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from endside.errors import UserError
from endside.train.parallel import local, placed


def check(decay: float, export: str) -> None:
    """UserError where `ema` is no decay, or where an average is exported that is not kept."""
    if not 0 <= decay < 1:
        raise UserError(f"ema is {decay}: give a decay from 0 (none) to below 1")
    if export == "ema" and not decay:
        raise UserError('export is "ema" but none is kept: set ema, for example to 0.999')


class Averages:
    """One tensor beside every parameter that is trained, in its precision."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._tensors = {name: p.detach().clone() for name, p in _trained(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the weights after a step."""
        weights = [local(parameter.detach()) for parameter in _trained(model).values()]
        averages = [local(average) for average in self._tensors.values()]
        torch._foreach_lerp_(averages, weights, 1 - self.decay)

    @contextmanager
    def in_place(self, model: nn.Module) -> Iterator[None]:
        """The model with the average as its weights; they are put back afterwards."""
        own = {name: parameter.detach().clone() for name, parameter in _trained(model).items()}
        put(model, self._tensors)
        try:
            yield
        finally:
            put(model, own)

    def tensors(self) -> dict[str, torch.Tensor]:
        """{parameter: average}, to save."""
        return dict(self._tensors)

    def load(self, source: Mapping[str, torch.Tensor] | nn.Module) -> None:
        """Continue from what `tensors` gave, or start from a model's weights."""
        given = _trained(source) if isinstance(source, nn.Module) else source
        if given.keys() != self._tensors.keys():
            odd = sorted(given.keys() ^ self._tensors.keys())[0]
            raise UserError(
                f"the averaged weights do not fit this model ({odd}): resume with the model that "
                "wrote them"
            )
        same = isinstance(source, nn.Module)
        for name, tensor in self._tensors.items():
            value = given[name].detach()
            tensor.copy_(value if same else placed(value, tensor))


@torch.no_grad()
def put(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy averaged weights into the parameters they belong to."""
    for name, parameter in _trained(model).items():
        parameter.copy_(tensors[name])


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
