"""Who we are among the processes of a run; one process is the normal case, and no work.

PyTorch's launcher (torchrun) tells each process its place through three environment variables; this
is the one file that reads the environment. Everything else is handed a `World`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

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
