"""Who we are among the processes of a run; one process is the normal case, and no work.

PyTorch's launcher (torchrun) tells each process its place through three environment variables; this
is the one file that reads the environment. Everything else is handed a `World`. What the processes
do together lies in `train.parallel`.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

from endside.errors import UserError


@dataclass(frozen=True)
class World:
    """The place of this process: `rank` of `size`, and its number on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise UserError(
                f"RANK {self.rank} is not below WORLD_SIZE {self.size}: start through torchrun"
            )

    @property
    def main(self) -> bool:
        """Whether this process writes files and progress."""
        return self.rank == 0


def world() -> World:
    """The world the launcher describes; a single process where there is no launcher."""
    return World(_number("RANK", 0), _number("WORLD_SIZE", 1), _number("LOCAL_RANK", 0))


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise UserError(
            f"environment variable {name} is {text!r}: unset it, or start through torchrun"
        ) from None


def join(device: str, seconds: float) -> None:
    """Meet the other processes: gloo on CPUs, NCCL on GPUs. `seconds` to wait for one of them."""
    import torch
    from torch import distributed

    # Plain objects, such as who writes where, are told over gloo.
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    here, wait = world(), timedelta(seconds=seconds)
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = distributed.TCPStore(
        os.environ.get("MASTER_ADDR", "localhost"),
        _number("MASTER_PORT", 29500),
        here.size,
        is_master=not hosted and here.main,
        timeout=wait,
        wait_for_workers=not hosted,
        multi_tenant=True,
    )
    # The launcher's store outlives a restart, and would lead to the addresses of the dead.
    own = distributed.PrefixStore(f"endside/{_start()}/{here.size}", store)
    if device == "cuda":
        torch.cuda.set_device(here.local_rank)
    distributed.init_process_group(
        backend, store=own, rank=here.rank, world_size=here.size, timeout=wait
    )


def _start() -> int:
    """How often the launcher has started these processes anew."""
    return _number("TORCHELASTIC_RESTART_COUNT", 0)


def leave() -> None:
    """Part from the other processes."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


def first_to_fail() -> bool:
    """Whether this process is the first of its run to fail, and so the one that says why.

    The launcher's store counts; where it does not answer any more, every process speaks.
    """
    if _number("WORLD_SIZE", 1) == 1:
        return True
    from torch import distributed

    key = f"endside/failed/{_start()}"
    with suppress(distributed.DistError, OSError, KeyError):
        store = distributed.TCPStore(
            os.environ["MASTER_ADDR"],
            _number("MASTER_PORT", 0),
            is_master=False,
            timeout=timedelta(seconds=5),
        )
        return store.add(key, 1) == 1
    return True
