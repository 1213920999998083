"""Many processes, one training: what is split, and how the parts meet.

    torchrun --nproc-per-node 8 -m endside pretrain runs/8b_fsdp.toml

Processes form a mesh ("data", "tensor"). Along `data` each sees other rows of the batch; along
`tensor` each holds a part of every projection and all see the same rows.

    shard = "replicate"   every process holds all weights; gradients are summed once per step
    shard = "fsdp"        weights, gradients and moments are split over `data` by PyTorch's FSDP2,
                          a block at a time gathered as it is needed
    tensor = N            q, k, v, gate and up are split by rows of their matrices (heads, F), o and
                          down by columns: one sum per half block, by PyTorch's DTensor

`batch` counts rows of all processes together, and the gradient is the sum over all rows divided by
all their targets, so a run gives the same losses on any number of processes, up to the order of
sums. All of it is applied from outside; the transformer knows nothing of it. `ALONE`, the team of
one process, does nothing, to the bit.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from endside import dist
from endside.dist import World
from endside.errors import UserError
from endside.model.block import MLP, Attention, Block
from endside.model.config import ModelConfig
from endside.model.linear import Linear
from endside.train import sharded

T = TypeVar("T")
BUCKET = 1 << 24  # elements summed in one message: large enough to be bound by bandwidth


@dataclass(frozen=True)
class ParallelConfig:
    """How the processes that torchrun starts share the work; may change between two starts."""

    shard: Literal["replicate", "fsdp"] = "replicate"
    tensor: int = 1  # processes that share each projection
    checkpoint: Literal["whole", "sharded"] = "whole"  # one file, or one per process
    wait: float = 1800.0  # seconds a process waits for another before all give up

    def __post_init__(self) -> None:
        if self.tensor < 1 or self.wait <= 0:
            raise UserError(
                f"parallel.tensor {self.tensor} must be at least 1 and parallel.wait {self.wait} "
                "above 0"
            )


class Team:
    """The processes of a run. A team of one is the identity in every method."""

    def __init__(self, cfg: ParallelConfig, world: World, device: str = "cpu") -> None:
        self.config, self.world, self.device = cfg, world, device
        check_shares(cfg, world)
        self.data = World(world.rank // cfg.tensor, world.size // cfg.tensor, world.local_rank)
        self._mesh: Any = None
        if world.size > 1:
            from torch.distributed.device_mesh import init_device_mesh

            shape = (self.data.size, cfg.tensor)
            self._mesh = init_device_mesh(device, shape, mesh_dim_names=("data", "tensor"))

    @property
    def alone(self) -> bool:
        """Whether this is the only process."""
        return self.world.size == 1

    @property
    def main(self) -> bool:
        """Whether this process writes files and progress."""
        return self.world.main

    def rows(self, batch: int) -> int:
        """How many of a batch's rows are this process's."""
        check_shares(self.config, self.world, batch)
        return batch // self.data.size

    def spread(self, model: nn.Module, precision: str = "float32") -> nn.Module:
        """Split the model as the configuration says; every process gives the same whole one."""
        if self.alone:
            return model
        if self.config.tensor > 1 and precision == "fp8":
            raise UserError("precision fp8 needs whole projections: use parallel.tensor = 1")
        if self.config.tensor > 1:
            _split_projections(model, self._mesh["tensor"])
        if self.config.shard == "fsdp":
            _shard(model, self._mesh["data"], precision)
        return model

    def settle(self, model: Any) -> None:
        """After a forward pass without a backward one: let go of gathered weights."""
        if not self.alone and self.config.shard == "fsdp":
            model.reshard()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over processes that see different rows."""
        if self.data.size > 1:
            torch.distributed.all_reduce(values, group=self._mesh["data"].get_group())
        return values

    def sum_gradients(self, model: nn.Module) -> list[torch.Tensor]:
        """Sum the gradients over all rows (fsdp has done so) -> those of this process."""
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if self.config.shard == "replicate" and self.data.size > 1:
            for bucket in _buckets([local(gradient) for gradient in gradients]):
                flat = self.sum(torch.cat([part.flatten() for part in bucket]))
                parts = flat.split([part.numel() for part in bucket])
                for part, summed in zip(bucket, parts, strict=True):
                    part.copy_(summed.view_as(part))
        return gradients

    def norm(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        """The norm of all gradients together, those of other processes' shards included."""
        if self.alone:
            return nn.utils.get_total_norm(gradients)
        kinds: dict[Any, list[torch.Tensor]] = {}
        for gradient in gradients:
            kinds.setdefault(spread_over(gradient), []).append(gradient)
        norms = [whole(nn.utils.get_total_norm(group)) for group in kinds.values()]
        return torch.linalg.vector_norm(torch.stack(norms))

    def gather(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Whole tensors in the main process's memory, one gathered at a time; elsewhere nothing."""
        if self.alone:
            return dict(tensors)
        kept = {}
        for name, tensor in tensors.items():
            full = whole(tensor.detach())
            if self.main:
                kept[name] = full.cpu()
        return kept

    @property
    def splits_checkpoints(self) -> bool:
        """Whether every process writes its own parts."""
        return not self.alone and self.config.checkpoint == "sharded"

    def write(self, parts: Mapping[str, Mapping[str, torch.Tensor]], folder: Path | None) -> None:
        """Write every process's own parts of tensors below the main process's `folder`."""
        place = self.agree(lambda: folder)
        for name, tensors in parts.items():
            sharded.write(tensors, place / name)

    def agree(self, decide: Callable[[], T]) -> T:
        """What `decide` gives in the main process, everywhere; its UserError too."""
        if self.alone:
            return decide()
        answer: list[Any] = [None, None]
        if self.main:
            try:
                answer[0] = decide()
            except UserError as error:
                answer[1] = error
        torch.distributed.broadcast_object_list(answer, src=0)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def first(self, act: Callable[[], T]) -> T:
        """Run `act` in the main process, then in the others, which find what it has written."""
        result: list[T] = []

        def once() -> None:
            result.append(act())

        self.agree(once)
        return result[0] if result else act()


def check_shares(cfg: ParallelConfig, world: World, batch: int | None = None) -> None:
    """Raise UserError unless processes, and the rows of a batch, can be dealt out evenly."""
    if world.size % cfg.tensor:
        raise UserError(
            f"parallel.tensor {cfg.tensor} does not divide the {world.size} processes of this "
            "run: start a multiple of it, or lower it"
        )
    data = world.size // cfg.tensor
    if batch is not None and batch % data:
        raise UserError(
            f"batch {batch} cannot be split evenly over {data} processes: make it a multiple, or "
            "start fewer"
        )


ALONE = Team(ParallelConfig(), World())


@contextmanager
def team(cfg: ParallelConfig, device: str) -> Iterator[Team]:
    """The processes that the launcher started, joined; the one alone without a launcher.

    A process that loses the others raises UserError: the first to fail has told why.
    """
    world = dist.world()
    if world.size == 1:
        yield Team(cfg, world, device)
        return
    dist.join(device, cfg.wait)
    try:
        yield Team(cfg, world, device)
    except RuntimeError as error:
        if not _lost(error):
            raise
        raise UserError(
            f"process {world.rank} of {world.size} lost the others: one has died or hangs; start "
            "again to resume from the last checkpoint (torchrun --max-restarts does so itself)"
        ) from error
    finally:
        dist.leave()


def _lost(error: RuntimeError) -> bool:
    # gloo's errors carry no type of their own, only the place in its source.
    known = isinstance(error, torch.distributed.DistError)
    return known or "gloo/" in str(error) or "NCCL" in str(error)


def spread_over(tensor: Any) -> Any:
    """The mesh a tensor is split over; None for a plain one."""
    # Where no process is beside this one, nothing has imported DTensor, and nothing need to.
    if "torch.distributed.tensor" not in sys.modules:
        return None
    from torch.distributed.tensor import DTensor

    return tensor.device_mesh if isinstance(tensor, DTensor) else None


def local(tensor: Any) -> torch.Tensor:
    """This process's part of a tensor, sharing its memory."""
    return tensor if spread_over(tensor) is None else tensor.to_local()


def whole(tensor: Any) -> torch.Tensor:
    """The tensor gathered from all processes of its mesh, which must all ask."""
    return tensor if spread_over(tensor) is None else tensor.full_tensor()


def placed(full: torch.Tensor, like: Any) -> torch.Tensor:
    """A copy of `full` on the device and with the split of `like`; no process needs another."""
    mesh = spread_over(like)
    if mesh is None:
        # Fresh memory: a view of the mapped file is not aligned, and sums could round otherwise.
        return full.clone().to(like.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full.to(like.device), mesh, like.placements, src_data_rank=None)


def _buckets(parts: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Consecutive tensors of one type, about BUCKET elements at a time."""
    bucket: list[torch.Tensor] = []
    for part in parts:
        full = sum(other.numel() for other in bucket) + part.numel() > BUCKET
        if bucket and (full or bucket[0].dtype != part.dtype):
            yield bucket
            bucket = []
        bucket.append(part)
    if bucket:
        yield bucket


def _shard(model: nn.Module, mesh: Any, precision: str) -> None:
    """FSDP2 around every block and what is left of the model.

    bfloat16 gathers blocks in half the bytes, since their products are made in it anyway; what is
    outside the blocks stays float32, gradients are summed in float32.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    gathered = torch.bfloat16 if precision == "bfloat16" else None
    inner = MixedPrecisionPolicy(gathered, torch.float32, cast_forward_inputs=False)
    for module in model.modules():
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh, mp_policy=inner)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Losses are sums over targets: gradients are summed, and divided by the loop.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def check_split(config: ModelConfig, tensor: int) -> None:
    """Raise UserError unless heads and feed-forward channels can be dealt to `tensor` processes."""
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(config, name) % tensor:
            raise UserError(
                f"parallel.tensor {tensor} does not divide model.{name} {getattr(config, name)}: "
                "every process needs whole heads and as many channels; use a divisor of all three"
            )


def _split_projections(model: Any, mesh: Any) -> None:
    from torch.distributed.tensor.parallel import parallelize_module

    from endside.train.split import ByColumns, ByRows

    check_split(model.config, mesh.size())
    plan = {
        Attention: {"q_proj": ByRows, "k_proj": ByRows, "v_proj": ByRows, "o_proj": ByColumns},
        MLP: {"gate_proj": ByRows, "up_proj": ByRows, "down_proj": ByColumns},
    }
    for module in model.modules():
        styles = plan.get(type(module), {})
        for name in styles:
            if type(getattr(module, name)) is not Linear:
                raise UserError(
                    f"parallel.tensor splits plain projections, and {name} is a "
                    f"{type(getattr(module, name)).__name__}: use parallel.tensor = 1"
                )
        if styles:
            parallelize_module(module, mesh, {name: style() for name, style in styles.items()})
