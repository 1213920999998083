"""GGUF models of the architectures `minicpm` and `llama`, read and written (formats §3.4).

The tensors are ours under other names, with one change: both architectures turn neighbouring
channels (2 i, 2 i + 1) where we turn halves (i, i + D / 2), so the rows of every query and key head
are shuffled on the way out and back on the way in. MiniCPM's three scales are keys: embedding_scale
multiplies the embedding, residual_scale is scale_depth / sqrt(L), logit_scale divides the logits.
LongRoPE lists are two tensors of factors; a list of Llama 3 is one (`rope_freqs`).

Numbers in a GGUF are float32: we read the shortest decimal of each, so that 1e-5 is 1e-5 again.
Sparse attention has no keys and is left out (`--attention sparse` brings it back). One rope
amplitude exists, `rope.scaling.attn_factor`; models that extend their context otherwise (yarn) are
refused. Tokenizers are for whoever deals in text (gguf_tokenizer.py): their keys pass through here
unread. A missing logit_scale is taken as hidden / 256, what every release has; loaders exist that
default to its inverse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from endside.errors import UserError
from endside.formats.gguf_file import (
    GgufFile,
    GgufSource,
    Typed,
    f32,
    read_gguf,
    u32,
    write_gguf,
)
from endside.formats.gguf_types import PLAIN, decode, scheme_of
from endside.formats.hf_config import FIRST_BASE, HEAD
from endside.formats.weights import Parameter, Permuted, Source, Value, shapes
from endside.model.config import ModelConfig
from endside.ops.rope.frequencies import RopeConfig, inverse_frequencies
from endside.quant.pack import QuantizedLinear

NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
OUTER = {
    "embed_tokens.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    HEAD: "output.weight",
}
PREFIX = "tokenizer.ggml."
LONG, SHORT, FREQS = "rope_factors_long.weight", "rope_factors_short.weight", "rope_freqs.weight"
END_TOKENS = "endside.eos_token_ids"  # a key of ours: GGUF has a place for one or two
SMALLEST, LARGEST = 1e-30, 1e30  # of numbers in keys; no real one comes near
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32, "TQ1_0": 36, "TQ2_0": 37}
UNREAD = ("expert_count", "attention.sliding_window", "attention.clamp_kqv")


def gguf_name(name: str) -> str:
    """The GGUF name of one of our parameters."""
    if name in OUTER:
        return OUTER[name]
    layer, inner = name.removeprefix("layers.").split(".", 1)
    return f"blk.{layer}.{NAMES[inner.removesuffix('.weight')]}.weight"


def head_order(heads: int, width: int) -> np.ndarray:
    """(heads * width,): row r of a GGUF query or key matrix is our row head_order[r]."""
    halves = np.arange(heads * width).reshape(heads, 2, width // 2)
    return halves.swapaxes(1, 2).reshape(-1)


def take_rows(value: Value, rows: np.ndarray) -> Value:
    """The value with its rows in another order."""
    if isinstance(value, np.ndarray):
        return value[rows]
    if isinstance(value, Permuted):
        return Permuted(_linear_rows(value.linear, rows), value.order)
    return _linear_rows(value, rows)


def _linear_rows(linear: QuantizedLinear, rows: np.ndarray) -> QuantizedLinear:
    zeros = None if linear.zeros is None else linear.zeros[rows]
    return QuantizedLinear(
        linear.kind, linear.codes[rows], linear.scales[rows], zeros, linear.group
    )


def row_order(name: str, config: ModelConfig) -> np.ndarray | None:
    """The order of a parameter's rows in GGUF; None when it is ours."""
    if name.endswith("self_attn.q_proj.weight"):
        return head_order(config.num_attention_heads, config.head_dim)
    if name.endswith("self_attn.k_proj.weight"):
        return head_order(config.num_key_value_heads, config.head_dim)
    return None


class _Keys:
    """Typed access to the keys of a file, below the architecture's name."""

    def __init__(self, file: GgufFile) -> None:
        self.file, self.arch = file, file.keys.get("general.architecture")
        self.used = {"general.architecture"}

    def get(self, key: str) -> Any:
        """The value, None when missing."""
        self.used.add(f"{self.arch}.{key}")
        return self.file.keys.get(f"{self.arch}.{key}")

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above zero."""
        value = self.get(key)
        value = default if value is None else value
        fine = isinstance(value, int | float) and not isinstance(value, bool)
        if not fine or not SMALLEST < value < LARGEST:
            raise UserError(
                f"{self.file.path}: key {self.arch}.{key} is {_short(value)}, it must be a number "
                "above zero: get the file again"
            )
        return value if isinstance(value, int) else _shortest(value)

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number above zero."""
        value = self.number(key, default)
        if value != int(value) or value > 1 << 31:
            raise UserError(
                f"{self.file.path}: key {self.arch}.{key} is {value}, it must be a whole number: "
                "get the file again"
            )
        return int(value)


def _shortest(value: float) -> float:
    """The shortest decimal that is this float32: 1e-5 again, not 9.99999974e-06."""
    return float(str(np.float32(value)))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def open_gguf(path: Path) -> Source:
    """The model in a .gguf file; UserError when it is damaged or of another kind."""
    file = read_gguf(path)
    keys = _Keys(file)
    if not isinstance(keys.arch, str) or keys.arch not in ("minicpm", "llama"):
        raise UserError(
            f"{path} holds the architecture {_short(keys.arch)}: minicpm and llama are read"
        )
    for key in UNREAD:
        value = keys.get(key)
        neutral = value is None or (isinstance(value, int | float) and value == 0)
        if not neutral:
            raise UserError(f"{path} has {keys.arch}.{key} {_short(value)}, not supported")
    config = _config(keys)
    notes = []
    if keys.arch == "minicpm" and keys.get("logit_scale") is None:
        notes.append(f"the file has no logit_scale: {config.hidden_size} / {FIRST_BASE} is assumed")
    text = {key: value for key, value in file.keys.items() if key.startswith("tokenizer.")}
    return Source(
        place=path,
        layout="gguf",
        config=config,
        raw={},
        parameters=_parameters(file, config),
        files={},
        text=text,
        ignored=tuple(_ignored(file, keys)),
        notes=tuple(notes),
    )


def _ignored(file: GgufFile, keys: _Keys) -> list[str]:
    """Keys of the architecture that nobody asked for."""
    own = f"{keys.arch}."
    skipped = {f"{own}vocab_size", f"{own}attention.value_length"}
    return [key for key in file.keys if key.startswith(own) and key not in keys.used | skipped]


def _config(keys: _Keys) -> ModelConfig:
    tensors, place = keys.file.tensors, keys.file.path
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise UserError(f"{place} has no token_embd.weight matrix: get the file again")
    heads, hidden = keys.whole("attention.head_count"), keys.whole("embedding_length")
    width = keys.whole("attention.key_length", max(1, hidden // heads))
    if {keys.whole("rope.dimension_count", width), keys.whole("attention.value_length", width)} != {
        width
    }:
        raise UserError(f"{place}: heads of unequal or partly turned width are not supported")
    layers = keys.whole("block_count")
    return ModelConfig(
        vocab_size=embedding.shape[0],
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys.whole("attention.head_count_kv", heads),
        head_dim=width,
        intermediate_size=keys.whole("feed_forward_length"),
        max_position_embeddings=keys.whole("context_length"),
        rms_norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        rope=_rope(keys, width),
        tie_word_embeddings="output.weight" not in tensors,
        **(_scales(keys, layers, hidden) if keys.arch == "minicpm" else {}),
        bos_token_id=_token(keys, "bos"),
        eos_token_ids=_end_tokens(keys),
        pad_token_id=_token(keys, "padding"),
    )


def _token(keys: _Keys, name: str) -> int | None:
    value = keys.file.keys.get(f"{PREFIX}{name}_token_id")
    return value if type(value) is int and 0 <= value < 1 << 31 else None


def _end_tokens(keys: _Keys) -> tuple[int, ...]:
    """Every id that ends an answer: our own list, else the two that llama.cpp names."""
    listed = keys.file.keys.get(END_TOKENS)
    if isinstance(listed, np.ndarray) and listed.dtype.kind in "iu" and len(listed) <= 64:
        return tuple(int(one) for one in listed if 0 <= one < 1 << 31)
    found = (_token(keys, name) for name in ("eos", "eot"))
    return tuple(dict.fromkeys(one for one in found if one is not None))


def _scales(keys: _Keys, layers: int, hidden: int) -> dict[str, Any]:
    """The three muP scales, as config.json spells them."""
    residual = keys.number("residual_scale", 1.4 / math.sqrt(layers))
    divisor = keys.number("logit_scale", hidden / FIRST_BASE)
    base = round(hidden / divisor) if hidden / divisor < 1 << 31 else 0
    if base < 1 or abs(hidden / base - divisor) > 1e-5 * divisor:
        raise UserError(
            f"{keys.file.path}: key minicpm.logit_scale is {divisor}, which is not the width "
            f"{hidden} over a whole number: get the file again"
        )
    return {
        "scale_emb": float(keys.number("embedding_scale", 12.0)),
        "scale_depth": float(f"{residual * math.sqrt(layers):.6g}"),
        "dim_model_base": base,
    }


def _rope(keys: _Keys, width: int) -> RopeConfig:
    kind, longest = keys.get("rope.scaling.type"), keys.whole("context_length")
    kind = "none" if kind is None else kind
    values: dict[str, Any] = {"theta": float(keys.number("rope.freq_base", 10000.0))}
    if isinstance(kind, str) and kind == "linear":
        return RopeConfig(kind="linear", factor=keys.number("rope.scaling.factor"), **values)
    if not isinstance(kind, str) or kind not in ("none", "longrope"):
        raise UserError(
            f"{keys.file.path} has rope.scaling.type {_short(kind)}: none, linear and longrope are "
            "read; convert it from the original folder"
        )
    names = (LONG, SHORT) if LONG in keys.file.tensors else (FREQS, FREQS)
    if names[0] not in keys.file.tensors:
        if kind == "longrope":
            raise UserError(f"{keys.file.path} says longrope but lacks {LONG}: get the file again")
        return RopeConfig(**values)
    long, short = (_factors(keys.file, name, width) for name in names)
    original = keys.whole("rope.scaling.original_context_length", longest)
    amplitude: float | None = float(keys.number("rope.scaling.attn_factor", 1.0))
    # the formula's own amplitude is 1 then, and the key says nothing new
    amplitude = None if amplitude == 1 and longest <= original else amplitude
    return RopeConfig(kind="longrope", original=original, long_factor=long, short_factor=short,
                      amplitude=amplitude, **values)  # fmt: skip


def _factors(file: GgufFile, name: str, width: int) -> tuple[float, ...]:
    tensor = file.tensors.get(name)
    if tensor is None or tensor.kind != "F32" or tensor.shape != (width // 2,):
        raise UserError(f"{file.path} has no {name} of {width // 2} F32 numbers: get it again")
    factors = file.raw(name).view("<f4").astype(np.float64)
    if not np.isfinite(factors).all() or (factors <= 0).any():
        raise UserError(f"{file.path}: {name} holds factors that are not above zero: get it again")
    return tuple(map(_shortest, factors.tolist()))


def _parameters(file: GgufFile, config: ModelConfig) -> dict[str, Parameter]:
    """Where each parameter lies; UserError unless the tensors are exactly this model's."""
    wanted = shapes(config, stored=len(file.tensors))
    places = {name: gguf_name(name) for name in wanted}
    known = {*places.values(), LONG, SHORT, FREQS}
    extra = [name for name in file.tensors if name not in known]
    missing = [place for place in places.values() if place not in file.tensors]
    wrong = [
        f"{places[name]} is {list(file.tensors[places[name]].shape)}, not {list(shape)}"
        for name, shape in wanted.items()
        if places[name] in file.tensors and file.tensors[places[name]].shape != shape
    ]
    for what, found in (("lacks", missing), ("has unknown tensors", extra), ("differs", wrong)):
        if found:
            raise UserError(
                f"{file.path} {what}: {', '.join(one[:80] for one in found[:6])}"
                f"{f' (and {len(found) - 6} more)' if len(found) > 6 else ''}: get the file again"
            )
    found: dict[str, Parameter] = {}
    for name, shape in wanted.items():
        place = places[name]
        read = _reader(file, place, shape, row_order(name, config))
        kind = file.tensors[place].kind
        found[name] = Parameter(shape, kind, read, scheme_of(kind) if len(shape) == 2 else None)
    return found


def _reader(
    file: GgufFile, place: str, shape: tuple[int, ...], order: np.ndarray | None
) -> Callable[[], Value]:
    def read() -> Value:
        kind = file.tensors[place].kind
        rows, columns = shape if len(shape) == 2 else (1, shape[0])
        value: Value = decode(file.raw(place), kind, rows, columns)
        if isinstance(value, np.ndarray) and len(shape) == 1:
            return value.reshape(shape)
        return value if order is None else take_rows(value, np.argsort(order))

    return read


def config_keys(config: ModelConfig) -> tuple[dict[str, Any], dict[str, GgufSource], list[str]]:
    """The keys of a shape, the tensors of rope factors, and notes on what is left out."""
    scaled = (config.scale_emb, config.scale_depth, config.dim_model_base) != (1.0, None, None)
    arch = "minicpm" if scaled else "llama"
    own: dict[str, Any] = {
        "vocab_size": u32(config.vocab_size),
        "context_length": u32(config.max_position_embeddings),
        "embedding_length": u32(config.hidden_size),
        "block_count": u32(config.num_hidden_layers),
        "feed_forward_length": u32(config.intermediate_size),
        "attention.head_count": u32(config.num_attention_heads),
        "attention.head_count_kv": u32(config.num_key_value_heads),
        "attention.key_length": u32(config.head_dim),
        "attention.value_length": u32(config.head_dim),
        "attention.layer_norm_rms_epsilon": f32(config.rms_norm_eps),
        "rope.dimension_count": u32(config.head_dim),
        "rope.freq_base": f32(config.rope.theta),
    }
    if scaled:
        own |= {
            "embedding_scale": f32(config.scale_emb),
            "residual_scale": f32(config.residual_scale),
            "logit_scale": f32(config.logit_divisor),
        }
    rope, tensors = _rope_keys(config)
    own |= rope
    notes = []
    if config.sparse is not None:
        notes.append("sparse attention left out: GGUF has no keys for it")
    if config.mtp_layers:
        notes.append("the multi-token prediction layer left out")
    named = {f"{arch}.{key}": value for key, value in own.items()}
    if config.eos_token_ids:
        named[END_TOKENS] = u32(list(config.eos_token_ids))
    return {"general.architecture": arch, **named}, tensors, notes


def _rope_keys(config: ModelConfig) -> tuple[dict[str, Any], dict[str, GgufSource]]:
    rope, longest = config.rope, config.max_position_embeddings
    if rope.kind == "default":
        return {}, {}
    if rope.kind == "linear":
        return {
            "rope.scaling.type": "linear",
            "rope.scaling.factor": f32(rope.factor),
        }, {}
    frequencies, amplitude = inverse_frequencies(rope, config.head_dim, longest, longest)
    if rope.kind == "longrope":
        keys: dict[str, Any] = {
            "rope.scaling.type": "longrope",
            "rope.scaling.original_context_length": u32(rope.original),
        }
        if amplitude != 1.0:
            keys["rope.scaling.attn_factor"] = f32(amplitude)
        return keys, {LONG: _list(rope.long_factor), SHORT: _list(rope.short_factor)}
    if rope.kind == "llama3":
        steps = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
        return {}, {FREQS: _list(tuple(rope.theta**-steps / np.asarray(frequencies, np.float64)))}
    raise UserError(
        f"positions are extended by {rope.kind}, which no GGUF key describes exactly: write a "
        "Hugging Face folder instead"
    )


def _list(factors: tuple[float, ...]) -> GgufSource:
    values = np.array(factors, np.float32)
    return GgufSource("F32", (len(factors),), lambda: values.view(np.uint8))


def save_gguf(
    source: Source,
    dst: Path,
    kinds: Mapping[str, str],
    encode: Callable[[str, Value], np.ndarray],
    *,
    text: Mapping[str, Any],
    overwrite: bool = False,
) -> list[str]:
    """Write a model as one file and return notes on what could not be kept.

    kinds: type of each of our parameters; encode(name, value) its bytes, where the value has its
    rows in GGUF's order already; text: the tokenizer.* keys.
    """
    keys, tensors, notes = config_keys(source.config)
    config = source.config
    chosen = {kind for name, kind in kinds.items() if name.endswith("_proj.weight")}
    head: dict[str, Any] = {
        "general.architecture": keys.pop("general.architecture"),
        "general.type": "model",
        "general.name": source.place.stem,
        "general.quantization_version": u32(2),
    }
    if len(chosen) == 1 and (file_type := FILE_TYPES.get(next(iter(chosen)))) is not None:
        head["general.file_type"] = u32(file_type)
    tokenizer = dict(text)
    first_end = (*config.eos_token_ids, None)[0]
    named = (("bos", config.bos_token_id), ("eos", first_end), ("padding", config.pad_token_id))
    for key, index in named:
        if index is not None:
            tokenizer.setdefault(f"{PREFIX}{key}_token_id", Typed(4, index))
    for name, parameter in source.parameters.items():
        order = row_order(name, config)

        def read(name: str = name, order: np.ndarray | None = order) -> np.ndarray:
            value = source.parameters[name].read()
            return encode(name, value if order is None else take_rows(value, order))

        tensors[gguf_name(name)] = GgufSource(kinds[name], parameter.shape, read)
    write_gguf(dst, {**head, **keys, **tokenizer}, tensors, overwrite=overwrite)
    return notes


def exact_kind(parameter: Parameter) -> str:
    """The GGUF type that holds a plain parameter without loss."""
    return parameter.stored if parameter.stored in PLAIN else "F32"
