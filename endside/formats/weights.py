"""The parameters of a stored model, in whatever form it stores them, one at a time.

    Source      a model's shape and, for each of our parameter names, a `Parameter`
    Parameter   its shape, how it is stored, and a function that reads it
    Value       what that gives: a plain array, a matrix in low bits (quant/pack.py), or that with
                its columns in another order (act-order of GPTQ)

Readers of formats make Sources; writers take them. So every format is written once in each
direction, and a model passes through one tensor at a time. For a folder the reader of a low-bit
layout says which tensors a linear consists of (`Layout.parts`) and how to read them; everything
else (plain tensors, fused rows, what is missing or too many) is checked here, for all of them.

Plain arrays are float64, float32, float16, or uint16 that hold the bits of bfloat16.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from endside.checkpoint import Checkpoint
from endside.errors import UserError
from endside.formats.hf_config import EMBEDDING, HEAD, STORED, hf_name
from endside.model.config import ModelConfig
from endside.quant.pack import QuantizedLinear, Scheme, bf16_to_float

log = logging.getLogger(__name__)

SAFE = {name: kind for kind, name in STORED.items()}  # config.json's name -> safetensors' name
# what is copied beside the weights: tokenizer, template, sampling defaults, the original's code
COMPANIONS = (
    "tokenizer*", "*.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.*",
    "merges.txt", "generation_config.json", "*.py", "LICENSE*",
)  # fmt: skip
Part = tuple[tuple[str, ...], tuple[int, ...]]  # allowed safetensors dtypes, shape


@dataclass(frozen=True, eq=False)
class Permuted:
    """A low-bit matrix whose column k belongs at place order[k] of the real one (act-order)."""

    linear: QuantizedLinear
    order: np.ndarray  # (K,) a permutation

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.linear.shape

    def dequantize(self) -> np.ndarray:
        """The weights (N, K) float32 with columns in their real order, exact."""
        weights = np.empty(self.shape, np.float32)
        weights[:, self.order] = self.linear.dequantize()
        return weights


Value = np.ndarray | QuantizedLinear | Permuted


@dataclass(frozen=True)
class Parameter:
    """One parameter as it lies in a file."""

    shape: tuple[int, ...]
    stored: str  # F64, F32, F16, BF16, or the name of a low-bit type
    read: Callable[[], Value]
    scheme: Scheme | None = None  # of a QuantizedLinear that `read` gives, as headers promise it

    @property
    def plain(self) -> bool:
        """Whether `read` gives a plain array of the stored type."""
        return self.stored in STORED


@dataclass(frozen=True)
class Source:
    """A stored model: its shape, and where each parameter lies. Holds no weights."""

    place: Path
    layout: str  # hf, gptq, awq, marlin, endside or gguf
    config: ModelConfig
    raw: dict[str, Any]  # the foreign config.json without quantization_config, {} without one
    parameters: dict[str, Parameter]  # by our names
    files: dict[str, bytes | Path]  # tokenizer, template, sampling defaults
    text: dict[str, Any] = field(default_factory=dict)  # a GGUF's tokenizer.* keys
    ignored: tuple[str, ...] = ()  # configuration keys that were not used
    notes: tuple[str, ...] = ()  # what a reader of the conversion's report should know


class Layout(Protocol):
    """How a low-bit format stores one linear of shape (N, K), called `base` (no ".weight")."""

    name: str

    def parts(self, base: str, shape: tuple[int, int]) -> dict[str, Part]:
        """Tensor name -> allowed dtypes and shape; a name that ends in "?" may be missing."""
        ...

    def scheme_of(self, base: str, columns: int) -> Scheme:
        """Kind and group of the linear; asymmetric where the headers do not rule that out."""
        ...

    def read(self, arrays: Mapping[str, np.ndarray], base: str, shape: tuple[int, int]) -> Value:
        """The linear, from the arrays of `parts` that are there."""
        ...


def to_float(value: Value) -> np.ndarray:
    """Any value as float32 (float64 stays)."""
    if not isinstance(value, np.ndarray):
        return value.dequantize()
    if value.dtype == np.uint16:
        return bf16_to_float(value)
    return value if value.dtype == np.float64 else value.astype(np.float32)


def is_linear(name: str) -> bool:
    """Whether our parameter name is a projection inside a block, the part stored in low bits."""
    return name.endswith("_proj.weight")


def shapes(config: ModelConfig, *, stored: int) -> dict[str, tuple[int, ...]]:
    """Our parameter names and shapes. `stored` tensors are there, so no more layers can be."""
    if config.num_hidden_layers > stored:
        raise UserError(
            f"{config.num_hidden_layers} layers are named but only {stored} tensors are stored: "
            "get the file again"
        )
    width, ff = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    block = {
        "input_layernorm": (width,), "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width), "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries), "post_attention_layernorm": (width,),
        "mlp.gate_proj": (ff, width), "mlp.up_proj": (ff, width), "mlp.down_proj": (width, ff),
    }  # fmt: skip
    found: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (config.vocab_size, width)}
    for layer in range(config.num_hidden_layers):
        found |= {f"layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    found["norm.weight"] = (width,)
    if not config.tie_word_embeddings:
        found[HEAD] = (config.vocab_size, width)
    return found


def from_checkpoint(
    checkpoint: Checkpoint, config: ModelConfig, layout: Layout | None
) -> dict[str, Parameter]:
    """The parameters of a folder. layout: of its low-bit linears, None when all are plain.

    Raises UserError unless the folder holds exactly the tensors of this model; what inference does
    not need (rotary tables, a multi-token prediction layer, biases of zero) is left out.
    """
    wanted = shapes(config, stored=len(checkpoint.tensors))
    found: dict[str, Parameter] = {}
    expected: dict[str, tuple[int, ...]] = {}
    for fused, parts in fused_groups(wanted):
        if f"{hf_name(fused)}.weight" in checkpoint.tensors:
            found |= _fused(checkpoint, f"{hf_name(fused)}.weight", parts, wanted, expected)
    for name, shape in wanted.items():
        if name not in found:
            found[name] = _locate(checkpoint, hf_name(name), shape, layout, expected)
    _leave_out(checkpoint, config, expected)
    checkpoint.require(expected)
    return {name: found[name] for name in wanted}


def fused_groups(names: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Fused linears (no ".weight") and the parameters whose rows they stack, in order."""
    groups = []
    for name in names:
        for first, rest, fused in (
            ("q_proj", ("k_proj", "v_proj"), "qkv_proj"),
            ("gate_proj", ("up_proj",), "gate_up_proj"),
        ):
            if f".{first}." in name:
                parts = [name.replace(first, other) for other in (first, *rest)]
                groups.append((name.replace(first, fused).removesuffix(".weight"), parts))
    return groups


def _fused(
    checkpoint: Checkpoint,
    stored: str,
    parts: list[str],
    shapes: Mapping[str, tuple[int, ...]],
    expected: dict[str, tuple[int, ...]],
) -> dict[str, Parameter]:
    """Parameters that are rows of one plain tensor."""
    found, at = {}, 0
    kind = _plain_kind(checkpoint, stored)
    for part in parts:
        begin, end = at, at + shapes[part][0]
        read = lambda begin=begin, end=end: checkpoint.numpy(stored)[begin:end]
        found[part] = Parameter(shapes[part], kind, read)
        at = end
    expected[stored] = (at, shapes[parts[0]][1])
    return found


def _locate(
    checkpoint: Checkpoint,
    name: str,
    shape: tuple[int, ...],
    layout: Layout | None,
    expected: dict[str, tuple[int, ...]],
) -> Parameter:
    """The parameter called `name` in the folder; the tensors it consists of go to `expected`."""
    base = name.removesuffix(".weight")
    plain = layout is None or not is_matrix(name) or name in checkpoint.tensors
    parts = {} if plain else layout.parts(base, (shape[0], shape[1]))
    present = {part.removesuffix("?"): want for part, want in parts.items()
               if not part.endswith("?") or part[:-1] in checkpoint.tensors}  # fmt: skip
    if not any(part in checkpoint.tensors for part in present):
        expected[name] = shape
        return Parameter(shape, _plain_kind(checkpoint, name), lambda: checkpoint.numpy(name))
    for part, (dtypes, size) in present.items():
        expected[part] = size
        if part in checkpoint.tensors and checkpoint.tensors[part].dtype not in dtypes:
            raise UserError(
                f"tensor {part} in {checkpoint.folder} is stored as "
                f"{checkpoint.tensors[part].dtype}: {layout.name} uses {' or '.join(dtypes)}"
            )

    def read() -> Value:
        arrays = {part: checkpoint.numpy(part) for part in present}
        return layout.read(arrays, base, (shape[0], shape[1]))

    return Parameter(shape, layout.name, read, layout.scheme_of(base, shape[1]))


def is_matrix(name: str) -> bool:
    """Whether a low-bit layout may hold this tensor: the linears and the head."""
    return is_linear(name) or name == HEAD


def _plain_kind(checkpoint: Checkpoint, name: str) -> str:
    """The stored type of a plain tensor; one that is missing is reported later, with all others."""
    if name not in checkpoint.tensors:
        return "F32"
    info = checkpoint.tensors[name]
    if info.dtype not in STORED:
        raise UserError(
            f"tensor {name} in {checkpoint.folder / info.file} is stored as {info.dtype}: a plain "
            f"weight is one of {', '.join(STORED)}; use another export of the model"
        )
    return info.dtype


def _leave_out(
    checkpoint: Checkpoint, config: ModelConfig, expected: dict[str, tuple[int, ...]]
) -> None:
    """Accept tensors that change nothing: a prediction layer, zero biases, a tied head again."""
    linears = {part.rpartition(".")[0] for part in expected}
    for name, info in checkpoint.tensors.items():
        base, _, last = name.rpartition(".")
        if name in expected:
            continue
        if config.mtp_layers and name.startswith("model.mtp."):
            log.info("left out of %s: %s, not used to generate", checkpoint.folder, name)
            expected[name] = info.shape
        elif last == "bias" and base in linears:
            if np.any(checkpoint.numpy(name)):
                raise UserError(
                    f"tensor {name} in {checkpoint.folder / info.file} is a bias that is not "
                    "zero, not supported: use a model without biases"
                )
            expected[name] = info.shape
        elif name == HEAD and config.tie_word_embeddings:
            _check_tied(checkpoint)
            expected[name] = info.shape


def _check_tied(checkpoint: Checkpoint) -> None:
    head, embedding = checkpoint.info(HEAD), checkpoint.info(EMBEDDING)
    same = (head.dtype, head.shape) == (embedding.dtype, embedding.shape)
    if not same or not np.array_equal(checkpoint.numpy(HEAD), checkpoint.numpy(EMBEDDING)):
        raise UserError(
            f"tensor {HEAD} in {checkpoint.folder / head.file} differs from the embedding although "
            "config.json ties them: set tie_word_embeddings to false"
        )


def companions(folder: Path | None) -> dict[str, Path]:
    """The files beside the weights that are copied as they are, by name."""
    if folder is None:
        return {}
    found = {file for pattern in COMPANIONS for file in Path(folder).glob(pattern)}
    return {file.name: file for file in sorted(found) if file.is_file()}
