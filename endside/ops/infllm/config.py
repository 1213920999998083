"""What InfLLM v2 needs to know: kernel, block, window and budget sizes, and which convention.

Two conventions were released (spec: infllmv2 §5). They attend to the same number of blocks, and
differ in one:

    4.1   blocks b-W .. b are forced (W + 1 of them) and the top-k list holds everything
    4.0   blocks b-W+1 .. b come from the window (W of them) and the list holds init + the rest

W = window_size / block_size, and both total `topk + W` blocks (64 + 32 = 96 as released), the
`init_blocks` first blocks included. The convention is a stored field, never guessed from a name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from endside.errors import UserError

COARSE = 4  # a coarse kernel spans and steps four fine ones: 128 / 64 as released


@dataclass(frozen=True)
class SparseConfig:
    """Sizes of block-sparse attention, in tokens unless said otherwise (arXiv 2509.24663).

    Raises UserError when the sizes contradict each other.
    """

    kernel_size: int = 32  # tokens averaged into one fine summary
    kernel_stride: int = 16  # tokens between two fine summaries
    init_blocks: int = 1  # blocks at the start that every query sees
    block_size: int = 64  # tokens per block of keys
    window_size: int = 2048  # local tokens that every query sees
    topk: int = 64  # blocks beside the window, the initial ones included
    use_nope: bool = False  # score keys without rotary positions: not supported
    dense_len: int = 8192  # position p is sparse iff p + 1 >= dense_len; -1: always
    selection: Literal["4.1", "4.0"] = "4.1"  # which released convention chooses the blocks
    lse: Literal["coarse", "exact"] = "coarse"  # normaliser of the scores: coarse or fine summaries
    compat: Literal["hf"] | None = None  # "hf": the switch is taken per forward, for parity tests

    def __post_init__(self) -> None:
        for field in (
            "kernel_size",
            "kernel_stride",
            "init_blocks",
            "block_size",
            "window_size",
            "topk",
        ):
            if getattr(self, field) < 1:
                raise UserError(
                    f"sparse_config.{field} is {getattr(self, field)}: it must be at least 1"
                )
        if self.kernel_size != 2 * self.kernel_stride:
            raise UserError(
                f"sparse_config.kernel_size {self.kernel_size} is not twice "
                f"kernel_stride {self.kernel_stride}: "
                "the pooling to blocks is defined for kernels that overlap by half"
            )
        if self.block_size != 4 * self.kernel_stride:
            raise UserError(
                f"sparse_config.block_size {self.block_size} is not four times "
                f"kernel_stride {self.kernel_stride}: "
                "the pooling to blocks (window 5, stride 4) is defined for that ratio"
            )
        if self.window_size % self.block_size:
            raise UserError(
                f"sparse_config.window_size {self.window_size} is not a multiple of "
                f"block_size {self.block_size}: "
                f"use {self.window_size // self.block_size * self.block_size or self.block_size}"
            )
        if self.topk <= self.init_blocks:
            raise UserError(
                f"sparse_config.topk {self.topk} leaves nothing to choose beside "
                f"{self.init_blocks} initial block(s): "
                f"raise topk to at least {self.init_blocks + 1}"
            )
        if self.use_nope:
            raise UserError(
                "sparse_config.use_nope is true: "
                "scoring unrotated keys is not supported; set it to false"
            )
        if self.dense_len < -1:
            raise UserError(
                f"sparse_config.dense_len is {self.dense_len}: "
                "use -1 (always sparse) or a length in tokens"
            )
        if self.selection not in ("4.1", "4.0"):
            raise UserError(f"sparse_config.selection is {self.selection!r}: use '4.1' or '4.0'")
        if self.lse not in ("coarse", "exact"):
            raise UserError(f"sparse_config.lse is {self.lse!r}: use 'coarse' or 'exact'")
        if self.compat not in (None, "hf"):
            raise UserError(f"sparse_config.compat is {self.compat!r}: use 'hf' or leave it out")

    @property
    def window_blocks(self) -> int:
        """W: blocks the window spans."""
        return self.window_size // self.block_size

    @property
    def total_blocks(self) -> int:
        """Blocks a query attends to at most, initial and local ones included (96 as released)."""
        return self.topk + self.window_blocks

    @property
    def budget(self) -> int:
        """Tokens a query attends to at most; a shorter history is attended densely by identity."""
        return self.total_blocks * self.block_size

    @property
    def coarse_size(self) -> int:
        """Tokens averaged into one coarse summary."""
        return COARSE * self.kernel_size

    @property
    def coarse_stride(self) -> int:
        """Tokens between two coarse summaries."""
        return COARSE * self.kernel_stride

    def fine_count(self, length: int) -> int:
        """N1: complete fine windows among `length` keys (infllmv2 §2)."""
        return max(0, (length - self.kernel_size) // self.kernel_stride + 1)

    def coarse_count(self, length: int) -> int:
        """N2: complete coarse windows among `length` keys (infllmv2 §2)."""
        return max(0, (length - self.coarse_size) // self.coarse_stride + 1)

    def first_sparse(self, length: int) -> int:
        """The first position that is sparse when the forward ends at `length` keys."""
        if self.dense_len < 0:
            return 0
        if self.compat == "hf":
            return 0 if length >= self.dense_len else length
        return self.dense_len - 1
