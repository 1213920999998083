"""int4 linears as CPM.cu lays them out for Marlin kernels, read (formats §3.2).

Projections are fused along their outputs first (q|k|v and gate|up), then the codes (K, N) are cut
into tiles of 16 x 16, and every four tiles (1024 codes) are shuffled so that each of 32 GPU lanes
finds its eight tensor-core operands in one word: lane i holds, of each tile, column i // 4 (and
that plus 8) of rows 2 (i mod 4) + {0, 1, 8, 9}. Inside a word the eight nibbles stand in the order
0 2 4 6 1 3 5 7. Scales are shuffled too: within 64 columns, index 8 i + j holds column i + 8 j;
with one group over all inputs, within 32 columns, 2 i + {0, 1, 8, 9, 16, 17, 24, 25}.

    qweight int32 (K / 16, 2 N)      scales float16 (K / g, N)      zero 8 everywhere, no act-order

All of it is a permutation, which we write down as an index table and invert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np

from endside.errors import UserError
from endside.formats.gptq import check_finite, unpack_words
from endside.formats.weights import Part, Value
from endside.quant.pack import QuantizedLinear, Scheme

NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Marlin:
    """The layout of CPM.cu's model_gptq.safetensors; `rows`: outputs of each fused projection."""

    group: int  # -1: one group over all inputs
    rows: dict[str, tuple[str, int, int, int]]  # base -> fused base, first row, rows, rows in all
    name: str = "marlin"

    def parts(self, base: str, shape: tuple[int, int]) -> dict[str, Part]:
        """The fused linear's two tensors."""
        fused, _, _, total = self.rows.get(base, (base, 0, shape[0], shape[0]))
        columns = shape[1]
        group = columns if self.group == -1 else self.group
        if total % 64 or columns % 16 or columns % group:
            raise UserError(
                f"linear {fused} is {total} x {columns}, which Marlin cannot tile: outputs must be "
                f"a multiple of 64, inputs of 16 and of the group {group}"
            )
        return {
            f"{fused}.qweight": (("I32",), (columns // 16, 2 * total)),
            f"{fused}.scales": (("F16",), (columns // group, total)),
        }

    def scheme_of(self, base: str, columns: int) -> Scheme:
        """Symmetric int4."""
        return Scheme("int4", columns if self.group == -1 else self.group)

    def read(self, arrays: Mapping[str, np.ndarray], base: str, shape: tuple[int, int]) -> Value:
        """The rows of the fused linear that are this one's."""
        fused, first, rows, _ = self.rows.get(base, (base, 0, shape[0], shape[0]))
        group = shape[1] if self.group == -1 else self.group
        codes = untile(arrays[f"{fused}.qweight"])[:, first : first + rows]
        stored = arrays[f"{fused}.scales"]
        check_finite(stored, f"{fused}.scales")
        scales = unshuffle_scales(stored, single=group >= shape[1])[:, first : first + rows]
        return QuantizedLinear(
            "int4", np.ascontiguousarray(codes.T), np.ascontiguousarray(scales.T), None, group
        )


@cache
def tile_order() -> np.ndarray:
    """(1024,): place p of four shuffled tiles holds their code tile_order()[p], row-major each."""
    places = []
    for lane in range(32):
        column, row = lane // 4, 2 * (lane % 4)
        one = [16 * (row + down) + column + right for right in (0, 8) for down in (0, 1, 8, 9)]
        places += [256 * tile + code for tile in range(4) for code in one]
    words = np.array(places).reshape(-1, 8)
    return words[:, NIBBLES].reshape(-1)


@cache
def scale_order(single: bool) -> np.ndarray:
    """(64,) or, for a single group, (32,): stored index -> column."""
    if single:
        return np.array([2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)])
    return np.array([i + 8 * j for i in range(8) for j in range(8)])


def untile(words: np.ndarray) -> np.ndarray:
    """qweight int32 (K / 16, 2 N) -> codes (K, N) uint8."""
    tall, wide = len(words), words.shape[1] // 2
    shuffled = unpack_words(words, 4).reshape(-1, 1024)
    codes = np.empty_like(shuffled)
    codes[:, tile_order()] = shuffled
    tiles = codes.reshape(tall, wide // 16, 16, 16)
    return tiles.transpose(0, 2, 1, 3).reshape(tall * 16, wide)


def unshuffle_scales(stored: np.ndarray, *, single: bool) -> np.ndarray:
    """(groups, N) as stored -> in the order of the columns."""
    order = scale_order(single)
    blocks = stored.reshape(-1, len(order))
    scales = np.empty_like(blocks)
    scales[:, order] = blocks
    return scales.reshape(stored.shape)
