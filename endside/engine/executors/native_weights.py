"""From a stored model to the matrices of the native core, one at a time.

The core multiplies by four matrices a layer and a head: q, k and v stacked, gate and up in
alternating blocks of 8 rows, so that one pass over the input serves each pair. `matrices` lists
them with the parameters whose rows they hold; `pack` turns stored rows into packed ones:

    float weights    rounded to the kind asked for, a few rows at a time
    low-bit weights  (quant/pack.py) keep their codes, scales and zeros: nothing is rounded
    other bits       (K-quants of GGUF, rows of different kinds in one matrix) have no exact form
                     here: int8 in groups of 32, which `rounded` tells

so the memory needed beside the result is one packed matrix and a slab of rows per thread (of other
bits: the matrix as float32).

What we chose not to do: columns in another order (act-order of GPTQ); the activations would have to
be permuted in every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from endside.errors import UserError
from endside.native.model import Layer, Shape, Sparse, Weights
from endside.native.packed import Packed, interleave
from endside.ops.rope.frequencies import inverse_frequencies
from endside.quant.pack import ZERO, QuantizedLinear, bf16_to_float, float_to_bf16

if TYPE_CHECKING:
    from endside.formats.weights import Parameter, Value
    from endside.model.config import ModelConfig

GROUPS = (32, 64, 128)  # weights per scale that the kernels know
ROUND = 32  # weights per scale of what is rounded because its bits have no form here
SLAB = 8 << 20  # bytes of stored rows handled at a time
RANDOM_BLOCK = 1 << 20  # numbers of noise that random weights repeat
TILE = 16  # rows: slabs are cut at multiples of the core's tiles
NATIVE_KIND = {"int4": "int4", "int8": "int8", "ternary": "ternary2"}
FLOAT_KIND = {"BF16": "bf16"}  # stored as that; every other float becomes f32, which holds it


@dataclass(frozen=True)
class Bits:
    """How a matrix is packed: the core's kind, weights per scale (0: float), kind of scales."""

    kind: str
    group: int = 0
    asymmetric: bool = False
    scale_type: str = "f16"

    def shape(self, rows: int, columns: int) -> Packed:
        """An (N, K) matrix of that kind, without memory."""
        return Packed(
            self.kind, rows, columns, group=self.group,
            asymmetric=self.asymmetric, scale_type=self.scale_type,
        )  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """The low bits of floats: "none", "int8", "int4" or "ternary", for the blocks and the head.

    stored: blocks in low bits already keep their own kinds and groups; then `body` names that kind,
    or is "mixed" where there are several, and plain matrices among them stay. A head in low bits
    already is called "stored".
    """

    body: str
    head: str
    group: int
    stored: bool = False

    @property
    def name(self) -> str:
        """Short, for a folder."""
        group = f"-g{self.group}"
        if self.stored:
            own = group if self.head not in ("none", "stored") else ""
            return f"{self.body}-stored-head-{self.head}{own}"
        rounded = {self.body, self.head} - {"none", "stored"}
        return f"{self.body}{group if rounded else ''}-head-{self.head}"

    def bits(self, name: str, stored: str) -> Bits:
        """What float weights, stored as `stored` (safetensors dtype), become in matrix `name`."""
        asked = self.head if name == "head" else self.body
        if asked not in NATIVE_KIND:
            return Bits(FLOAT_KIND.get(stored, "f32"))
        return Bits(NATIVE_KIND[asked], self.group)


@dataclass(frozen=True)
class Matrix:
    """One matrix of the core: the parameters whose rows it holds, in order."""

    name: str
    parts: tuple[str, ...]
    rows: tuple[int, ...]  # of each part
    columns: int
    interleaved: bool = False  # blocks of 8 rows of each part in turn, filled up with zero rows

    @property
    def height(self) -> int:
        """N."""
        return 2 * in_eights(self.rows[0]) if self.interleaved else sum(self.rows)


def in_eights(count: int) -> int:
    """The next multiple of 8: the core's feed-forward width; what is added holds zeros."""
    return -(-count // 8) * 8


def matrices(config: ModelConfig) -> Iterator[Matrix]:
    """Every matrix of a model, in the order in which a decode step reads them."""
    width, ff = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    for layer in range(config.num_hidden_layers):
        stem = f"layers.{layer}"
        q, k, v, o = (f"{stem}.self_attn.{one}_proj.weight" for one in "qkvo")
        gate, up, down = (f"{stem}.mlp.{one}_proj.weight" for one in ("gate", "up", "down"))
        yield Matrix(f"{stem}.qkv", (q, k, v), (queries, keys, keys), width)
        yield Matrix(f"{stem}.output", (o,), (width,), queries)
        yield Matrix(f"{stem}.gate_up", (gate, up), (ff, ff), width, interleaved=True)
        yield Matrix(f"{stem}.down", (down,), (width,), in_eights(ff))
    tied = "embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    yield Matrix("head", (tied,), (config.vocab_size,), width)


def norms(config: ModelConfig) -> dict[str, str]:
    """Name of each norm here -> the parameter that holds it."""
    found = {}
    for layer in range(config.num_hidden_layers):
        stem = f"layers.{layer}"
        found[f"{stem}.attention_norm"] = f"{stem}.input_layernorm.weight"
        found[f"{stem}.mlp_norm"] = f"{stem}.post_attention_layernorm.weight"
    return {**found, "final_norm": "norm.weight"}


def shapes(
    config: ModelConfig, recipe: Recipe, parameters: Mapping[str, Parameter] | None = None
) -> dict[str, Packed]:
    """What `pack` will make of every matrix, without memory; None: of plain bfloat16 weights."""
    found = {}
    for matrix in matrices(config):
        stored = None if parameters is None else [parameters[part] for part in matrix.parts]
        bits = recipe.bits(matrix.name, "BF16") if stored is None else _bits(matrix, stored, recipe)
        found[matrix.name] = bits.shape(matrix.height, matrix.columns)
    return found


def rounded(config: ModelConfig, parameters: Mapping[str, Parameter]) -> list[str]:
    """The matrices whose stored bits have no exact form in the core."""
    return [
        one.name for one in matrices(config) if _other([parameters[part] for part in one.parts])
    ]


def _bits(matrix: Matrix, stored: Sequence[Parameter], recipe: Recipe) -> Bits:
    """How a matrix will be packed, from what headers say."""
    if all(one.plain for one in stored):
        kinds = {one.stored for one in stored}
        return recipe.bits(matrix.name, kinds.pop() if len(kinds) == 1 else "F32")
    if _other(stored):
        return Bits("int8", ROUND)
    schemes = [one.scheme for one in stored if one.scheme is not None]
    group = _native_group(matrix, schemes[0].group, stored[0].shape[1])
    asymmetric = any(not one.symmetric for one in schemes)
    return Bits(NATIVE_KIND[schemes[0].kind], group, asymmetric)


def _other(stored: Sequence[Parameter]) -> bool:
    """Neither all plain nor all in low bits of one kind and group."""
    schemes = {None if one.scheme is None else (one.scheme.kind, one.scheme.group)
               for one in stored if not one.plain}  # fmt: skip
    plain = any(one.plain for one in stored)
    return None in schemes or len(schemes) > 1 or (plain and bool(schemes))


def pack(
    matrix: Matrix, parameters: Mapping[str, Parameter], recipe: Recipe, threads: int
) -> Packed:
    """The packed matrix, from stored rows."""
    found = [parameters[part] for part in matrix.parts]
    if all(one.plain for one in found) or _other(found):
        shape = _bits(matrix, found, recipe).shape(matrix.height, matrix.columns)
        return _pack_floats(matrix, found, shape, threads)
    return _pack_codes(matrix, [one.read() for one in found])


def _pack_floats(
    matrix: Matrix, parameters: Sequence[Parameter], shape: Packed, threads: int
) -> Packed:
    from concurrent.futures import ThreadPoolExecutor

    from endside.formats.weights import to_float

    packed = shape.allocate()
    step = max(TILE, SLAB // (4 * matrix.columns) // TILE * TILE)
    decoded = {at: to_float(one.read()) for at, one in enumerate(parameters) if not one.plain}

    def write(start: int) -> None:
        # read anew for every slab: pages of a mapped file are given back with their mapping
        rows = [
            decoded[at] if at in decoded else _float_rows(one.read())
            for at, one in enumerate(parameters)
        ]
        slab = _slab(matrix, rows, start, start + step)
        packed.write(_extended(slab, matrix.columns), row=start)

    with ThreadPoolExecutor(threads) as team:
        for _ in team.map(write, range(0, matrix.height, step)):
            pass
    return packed


def _float_rows(value: Value) -> np.ndarray:
    assert isinstance(value, np.ndarray), "a plain parameter reads as an array"
    return value


def _slab(
    matrix: Matrix, parts: Sequence[np.ndarray], start: int, end: int, pad: int = 0
) -> np.ndarray:
    """Rows start .. end (multiples of 16) of the matrix, from its parts (rows, any)."""
    if matrix.interleaved:
        gate, up = (_filled(part[start // 2 : end // 2], pad) for part in parts)
        return interleave(gate, up)
    found, at = [], 0
    for part in parts:
        found.append(part[max(start - at, 0) : max(end - at, 0)])
        at += len(part)
    found = [part for part in found if len(part)]
    if len({part.dtype for part in found}) > 1:
        found = [_widened(part) for part in found]
    return _plain(found[0] if len(found) == 1 else np.concatenate(found))


def _filled(rows: np.ndarray, pad: int) -> np.ndarray:
    """Rows filled up to whole eights."""
    missing = in_eights(len(rows)) - len(rows)
    return np.pad(_plain(rows), ((0, missing), (0, 0)), constant_values=pad)


def _extended(rows: np.ndarray, columns: int, pad: int = 0) -> np.ndarray:
    """Columns filled up: the ones that meet the zeros of a filled-up feed-forward width."""
    missing = columns - rows.shape[1]
    return np.pad(rows, ((0, 0), (0, missing)), constant_values=pad) if missing else rows


def _plain(rows: np.ndarray) -> np.ndarray:
    """Contiguous rows of a type that the core reads."""
    return np.ascontiguousarray(rows, np.float32 if rows.dtype == np.float64 else None)


def _widened(rows: np.ndarray) -> np.ndarray:
    return bf16_to_float(rows) if rows.dtype == np.uint16 else rows.astype(np.float32)


def _pack_codes(matrix: Matrix, values: Sequence[Value]) -> Packed:
    linears = _alike([_regrouped(matrix, value) for value in values])
    first = linears[0]
    kinds = {(one.kind, one.group, one.bf16) for one in linears}
    if len(kinds) > 1:
        raise UserError(
            f"{', '.join(matrix.parts)} are stored in different low bits, which one pass cannot "
            "multiply by: use --executor torch, or quantize the original model again"
        )
    bits = Bits(
        NATIVE_KIND[first.kind], first.group, not first.symmetric, "bf16" if first.bf16 else "f16"
    )
    packed = bits.shape(matrix.height, matrix.columns).allocate()
    step = max(TILE, SLAB // matrix.columns // TILE * TILE)
    for start in range(0, matrix.height, step):
        span = (start, start + step)
        codes = _slab(matrix, [one.codes for one in linears], *span, pad=ZERO[first.kind])
        scales = _slab(matrix, [one.scales for one in linears], *span)
        zeros = None
        if not first.symmetric:
            zeros = _slab(matrix, [one.zeros for one in linears], *span, pad=0)
        codes = _extended(codes, matrix.columns, ZERO[first.kind])
        packed.write_codes(codes, scales, zeros, row=start)
    return packed


def _alike(linears: Sequence[QuantizedLinear]) -> list[QuantizedLinear]:
    """The same weights, all with zeros of their own where one has them, int4 where one is."""
    found = list(linears)
    if {one.kind for one in found} == {"ternary", "int4"}:
        found = [
            QuantizedLinear("int4", one.codes + np.uint8(7), one.scales, None, one.group)
            if one.kind == "ternary"
            else one
            for one in found
        ]
    if all(one.symmetric for one in found):
        return found
    return [
        replace(one, zeros=np.full(one.scales.shape, ZERO[one.kind], np.uint8))
        if one.zeros is None
        else one
        for one in found
    ]


def _native_group(matrix: Matrix, group: int, columns: int) -> int:
    """The largest group of the kernels that divides a stored one; UserError where none does."""
    fitting = [one for one in GROUPS[::-1] if group >= columns or group % one == 0]
    if group in GROUPS or not fitting:
        fitting = [group]
    if fitting[0] not in GROUPS:
        raise UserError(
            f"{matrix.parts[0]} has groups of {group} weights, the native executor knows "
            f"{', '.join(map(str, GROUPS))} and their multiples: use --executor torch"
        )
    return fitting[0]


def _regrouped(matrix: Matrix, value: Value) -> QuantizedLinear:
    """The same weights in groups that the kernels know."""
    if not isinstance(value, QuantizedLinear):
        raise UserError(
            f"{', '.join(matrix.parts)}: columns in another order (desc_act), which the native "
            "executor does not multiply by: use --executor torch, or quantize the original model "
            "again"
        )
    columns = value.shape[1]
    group = _native_group(matrix, value.group, columns)
    if value.group == group:
        return value
    whole = value.group >= columns  # one scale for the row
    count = -(-columns // group)
    repeats = count if whole else value.group // group

    def spread(per_group: np.ndarray) -> np.ndarray:
        return np.repeat(per_group, repeats, axis=1)[:, :count]

    zeros = None if value.zeros is None else spread(value.zeros)
    return QuantizedLinear(value.kind, value.codes, spread(value.scales), zeros, group)


def plain_vector(value: Value) -> np.ndarray:
    """A norm's weights as float32 (C)."""
    assert isinstance(value, np.ndarray), "norms are stored plain"
    return np.ascontiguousarray(_widened(value))


def random_matrix(shape: Packed, noise: np.random.Generator) -> Packed:
    """The matrix filled with noise of about the size that training starts from, 0.05."""
    packed = shape.allocate()
    assert packed.codes is not None, "allocated"
    if shape.kind == "bf16":
        _repeat(packed.codes.view(np.uint16), random_floats(RANDOM_BLOCK, noise))
        return packed
    if shape.kind == "f32":
        _repeat(packed.codes.view(np.float32), bf16_to_float(random_floats(RANDOM_BLOCK, noise)))
        return packed
    if shape.kind == "ternary2":
        trits = noise.integers(0, 3, (4, RANDOM_BLOCK), dtype=np.uint8)
        _repeat(packed.codes, trits[0] | trits[1] << 2 | trits[2] << 4 | trits[3] << 6)
    else:
        _repeat(packed.codes, noise.integers(0, 256, RANDOM_BLOCK, dtype=np.uint8))
    assert packed.scales is not None, "low bits have scales"
    spread = {"int4": 4.6, "int8": 73.9, "ternary2": 0.82}[shape.kind]  # deviation of the codes
    packed.scales[:] = np.float16(0.05 / spread).view(np.uint16)
    return packed


def random_floats(count: int, noise: np.random.Generator) -> np.ndarray:
    """Bits of bfloat16 (count,), normal with deviation 0.05."""
    return float_to_bf16(noise.standard_normal(count, np.float32) * np.float32(0.05))


def _repeat(target: np.ndarray, block: np.ndarray) -> None:
    for start in range(0, len(target), len(block)):
        part = target[start : start + len(block)]
        part[:] = block[: len(part)]


def native_shape(config: ModelConfig) -> Shape:
    """Sizes and muP scales as the core wants them."""
    return Shape(
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        ff=in_eights(config.intermediate_size),
        vocab=config.vocab_size,
        norm_eps=config.rms_norm_eps,
        embed_scale=config.scale_emb,
        residual_scale=config.residual_scale,
        logit_scale=1 / config.logit_divisor,
    )


def native_sparse(config: ModelConfig) -> Sparse | None:
    """The sparse convention as the core wants it; None: dense."""
    sparse = config.sparse
    if sparse is None:
        return None
    return Sparse(
        init_blocks=sparse.init_blocks,
        window_blocks=sparse.window_blocks,
        topk=sparse.topk,
        dense_len=sparse.dense_len,
        selection_41=sparse.selection == "4.1",
        coarse_lse=sparse.lse == "coarse",
    )


def join(
    config: ModelConfig,
    context: int,
    packed: Mapping[str, Packed],
    vectors: Mapping[str, np.ndarray | None],
    embed: np.ndarray | None,
) -> Weights:
    """Everything the core is given. Shapes without memory make a plan, full ones a model."""
    frequencies, amplitude = inverse_frequencies(
        config.rope, config.head_dim, context, config.max_position_embeddings
    )
    layers = []
    for layer in range(config.num_hidden_layers):
        of: Callable[[str], str] = f"layers.{layer}.{{}}".format
        layers.append(
            Layer(
                attention_norm=vectors[of("attention_norm")],
                qkv=packed[of("qkv")],
                output=packed[of("output")],
                mlp_norm=vectors[of("mlp_norm")],
                gate_up=packed[of("gate_up")],
                down=packed[of("down")],
            )
        )
    return Weights(
        embed=embed,
        layers=layers,
        final_norm=vectors["final_norm"],
        head=packed["head"],
        inverse_frequencies=frequencies,
        rope_amplitude=amplitude,
    )
