"""Foreign low-bit layouts against unpackers written straight from their definitions.

Everything here is done one code at a time, with Python integers, so it shares no code and no idea
with the readers.
"""

from __future__ import annotations

import numpy as np
import pytest

from endside.errors import UserError
from endside.formats.awq import Awq
from endside.formats.gptq import Gptq
from endside.formats.marlin import Marlin
from endside.formats.weights import Permuted, to_float
from endside.quant.pack import QuantizedLinear

BASE = "model.layers.0.mlp.up_proj"


def word(nibbles: list[int], bits: int = 4) -> int:
    """Codes into one 32-bit word, first code lowest, as a signed number."""
    value = sum(code << (bits * i) for i, code in enumerate(nibbles))
    return value - (1 << 32) if value >= 1 << 31 else value


def random_linear(
    rows: int, columns: int, group: int, *, bits: int = 4, symmetric: bool = True, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """codes (K, N), zeros (groups, N), scales (groups, N), as those formats count."""
    rng = np.random.default_rng(seed)
    groups = -(-columns // group)
    codes = rng.integers(0, 1 << bits, (columns, rows))
    middle = np.full((groups, rows), 1 << (bits - 1))
    zeros = middle if symmetric else rng.integers(0, 1 << bits, (groups, rows))
    return codes, zeros, rng.normal(size=(groups, rows)).astype(np.float16)


def gptq_arrays(codes, zeros, scales, index, *, bits: int, version: int) -> dict:
    """The four tensors by the book: 32 / bits codes along K (weights) or along N (zeros)."""
    per = 32 // bits
    columns, rows = codes.shape
    stored = (zeros - 1) % (1 << bits) if version == 1 else zeros
    packed = [[word([int(c) for c in codes[r * per : (r + 1) * per, n]], bits)
               for n in range(rows)] for r in range(columns // per)]  # fmt: skip
    packed_zeros = [[word([int(z) for z in stored[g, n * per : (n + 1) * per]], bits)
                     for n in range(rows // per)] for g in range(len(zeros))]  # fmt: skip
    return {
        f"{BASE}.qweight": np.array(packed, np.int32),
        f"{BASE}.qzeros": np.array(packed_zeros, np.int32),
        f"{BASE}.scales": scales,
        f"{BASE}.g_idx": np.array(index, np.int32),
    }


def expect(codes, zeros, scales, index) -> np.ndarray:
    """w[n, k] by the definition."""
    group = np.asarray(index)
    return (scales.astype(np.float32)[group] * (codes - zeros[group]).astype(np.float32)).T


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (4, 128), (4, -1), (8, 32)])
def test_gptq(version: int, symmetric: bool, act_order: bool, bits: int, group: int) -> None:
    rows, columns = 24, 256
    real = columns if group == -1 else group
    codes, zeros, scales = random_linear(rows, columns, real, bits=bits, symmetric=symmetric)
    index = np.arange(columns) // real
    if act_order:
        index = np.random.default_rng(9).permutation(index)
    layout = Gptq(bits, group, version)
    arrays = gptq_arrays(codes, zeros, scales, index, bits=bits, version=version)
    for name, (dtypes, shape) in layout.parts(BASE, (rows, columns)).items():
        array = arrays[name.removesuffix("?")]
        assert array.shape == shape and array.dtype.str[1:].upper().replace("I4", "I32") \
            .replace("F2", "F16") in dtypes  # fmt: skip
    value = layout.read(arrays, BASE, (rows, columns))
    assert np.array_equal(to_float(value), expect(codes, zeros, scales, index))
    linear = value.linear if isinstance(value, Permuted) else value
    assert isinstance(linear, QuantizedLinear) and linear.symmetric == symmetric
    assert isinstance(value, Permuted) == (act_order and group != -1)
    again = layout.write(value, BASE)
    for name, array in arrays.items():
        assert np.array_equal(again[name], array) and again[name].dtype == array.dtype, name


def test_gptq_without_index_and_with_a_wrong_one() -> None:
    codes, zeros, scales = random_linear(8, 64, 32)
    arrays = gptq_arrays(codes, zeros, scales, np.arange(64) // 32, bits=4, version=1)
    layout = Gptq(4, 32, 1)
    want = to_float(layout.read(arrays, BASE, (8, 64)))
    index = arrays.pop(f"{BASE}.g_idx")
    assert np.array_equal(to_float(layout.read(arrays, BASE, (8, 64))), want)
    for bad in (np.zeros_like(index), index - 5, index + 2**30):
        with pytest.raises(UserError, match="g_idx does not give each group"):
            layout.read({**arrays, f"{BASE}.g_idx": bad}, BASE, (8, 64))
    arrays[f"{BASE}.scales"][1, 3] = np.inf
    with pytest.raises(UserError, match="infinite scale"):
        layout.read(arrays, BASE, (8, 64))


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"bits": 3}, "bits is 3"),
        ({"bits": 4, "group_size": 0}, "group_size is 0"),
        ({"bits": 4, "checkpoint_format": "marlin"}, "'marlin'"),
    ],
)
def test_gptq_refuses(block: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Gptq.from_config(block)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 128, -1])
def test_awq(symmetric: bool, group: int) -> None:
    """Nibble i of a word is output 8 c + (0 2 4 6 1 3 5 7)[i]."""
    rows, columns = 24, 128
    real = columns if group == -1 else group
    codes, zeros, scales = random_linear(rows, columns, real, symmetric=symmetric)
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def packed(values: np.ndarray) -> np.ndarray:
        return np.array([[word([int(line[8 * c + o]) for o in order]) for c in range(rows // 8)]
                         for line in values], np.int32)  # fmt: skip

    arrays = {f"{BASE}.qweight": packed(codes), f"{BASE}.qzeros": packed(zeros),
              f"{BASE}.scales": scales}  # fmt: skip
    layout = Awq(group)
    assert {n: a.shape for n, a in arrays.items()} == {
        name: shape for name, (_, shape) in layout.parts(BASE, (rows, columns)).items()
    }
    value = layout.read(arrays, BASE, (rows, columns))
    assert np.array_equal(to_float(value), expect(codes, zeros, scales, np.arange(columns) // real))
    assert isinstance(value, QuantizedLinear) and value.symmetric == symmetric


def test_awq_refuses() -> None:
    for block, words in [({"bits": 3}, "bits is 3"), ({"bits": 4, "version": "gemv"}, "'gemv'"),
                         ({"w_bit": 4, "q_group_size": "x"}, "group_size is 'x'")]:  # fmt: skip
        with pytest.raises(UserError, match=words):
            Awq.from_config(block)
    assert Awq.from_config({"w_bit": 4, "q_group_size": 64, "version": "GEMM"}).group == 64
    with pytest.raises(UserError, match="cannot pack"):
        Awq(32).parts(BASE, (12, 64))


def marlin_arrays(codes: np.ndarray, scales: np.ndarray, group: int) -> dict[str, np.ndarray]:
    """As gptq2marlin.py does it: tiles, lanes, nibbles; scales by their own table."""
    columns, rows = codes.shape
    words = []
    for tile_row in range(columns // 16):
        line: list[int] = []
        for tile_column in range(rows // 16):
            block = codes[16 * tile_row :, 16 * tile_column :][:16, :16]
            line += [int(c) for c in block.reshape(-1)]
        shuffled: list[int] = []
        for start in range(0, len(line), 1024):
            four = line[start : start + 1024]
            for lane in range(32):
                for tile in range(4):
                    eight = []
                    for block_column in (0, 1):
                        for row in (2 * (lane % 4), 2 * (lane % 4) + 1, 2 * (lane % 4 + 4),
                                    2 * (lane % 4 + 4) + 1):  # fmt: skip
                            column = lane // 4 + 8 * block_column
                            eight.append(four[256 * tile + 16 * row + column])
                    shuffled += [eight[i] for i in (0, 2, 4, 6, 1, 3, 5, 7)]
        words.append([word(shuffled[i : i + 8]) for i in range(0, len(shuffled), 8)])
    if len(scales) > 1:
        table = [i + 8 * j for i in range(8) for j in range(8)]
    else:
        table = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
    stored = scales.reshape(-1, len(table))[:, table].reshape(scales.shape)
    return {f"{BASE}.qweight": np.array(words, np.int32), f"{BASE}.scales": stored}


@pytest.mark.parametrize("group", [32, 128, -1])
def test_marlin(group: int) -> None:
    rows, columns = 192, 128
    real = columns if group == -1 else group
    codes, zeros, scales = random_linear(rows, columns, real)
    arrays = marlin_arrays(codes, scales, real)
    want = expect(codes, zeros, scales, np.arange(columns) // real)
    layout = Marlin(group, {})
    assert {n: a.shape for n, a in arrays.items()} == {
        name: shape for name, (_, shape) in layout.parts(BASE, (rows, columns)).items()
    }
    assert np.array_equal(to_float(layout.read(arrays, BASE, (rows, columns))), want)
    # a part of a fused projection: rows 64 .. 96 of it
    part = Marlin(group, {"model.k_proj": (BASE, 64, 32, rows)})
    assert np.array_equal(to_float(part.read(arrays, "model.k_proj", (32, columns))), want[64:96])
    with pytest.raises(UserError, match="cannot tile"):
        layout.parts(BASE, (96, columns))
