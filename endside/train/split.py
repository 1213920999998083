"""Projections split over processes, as styles of PyTorch's tensor parallelism.

    ByRows      W (out, in) by rows: x whole in, y = x W^T split along its last axis out
    ByColumns   W by columns: x split in, the sum of all processes' products whole out

PyTorch's own two styles want its own Linear; these fill the model's slot.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.tensor import (
    DTensor,
    Placement,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ParallelStyle


class _Split(ParallelStyle):
    weight: Placement
    given: Placement
    wanted: Placement

    def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
        return distribute_module(module, device_mesh, self._part, self._enter, self._leave)

    def _part(self, _name: str, module: nn.Module, mesh: Any) -> None:
        # Every process holds the same whole matrix, so none has to send it.
        part = distribute_tensor(module.weight, mesh, [self.weight], src_data_rank=None)
        module.weight = nn.Parameter(part)

    def _enter(self, _module: nn.Module, inputs: tuple, mesh: Any) -> DTensor:
        return DTensor.from_local(inputs[0], mesh, [self.given], run_check=False)

    def _leave(self, _module: nn.Module, output: DTensor, _mesh: Any) -> Any:
        return output.redistribute(placements=[self.wanted]).to_local()


class ByRows(_Split):
    """Whole in, split out."""

    weight, given, wanted = Shard(0), Replicate(), Shard(-1)


class ByColumns(_Split):
    """Split in, whole out."""

    weight, given, wanted = Shard(1), Shard(-1), Replicate()
