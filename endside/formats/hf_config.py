"""config.json of MiniCPM and Llama checkpoints to ModelConfig, and back.

Two spellings of rotary positions are read: `rope_theta` beside `rope_scaling` (with `rope_type` or
`type`), and `rope_parameters`, which holds both. We write the first: every release reads it.

`Reader` hands out keys and remembers which were asked for; what is left over is what we ignore.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal

from endside.errors import UserError
from endside.model.config import ModelConfig
from endside.ops.infllm.config import SparseConfig
from endside.ops.rope.frequencies import RopeConfig, inverse_frequencies

if TYPE_CHECKING:
    from endside.checkpoint import Checkpoint

log = logging.getLogger(__name__)

# Keys that change the forward pass, and the only values for which it is the one we have.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1, None),
    "sliding_window": (None,),
    "num_experts": (0, None),
    "mixer_types": (None,),
    "attn_use_rope": (True, None),
    "qk_norm": (False, None),
    "use_output_gate": (False, None),
    "use_output_norm": (False, None),
    "attn_use_output_gate": (False, None),
}
STORED = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
Attention = Literal["auto", "dense", "sparse"]
LOW_BITS = ("endside", "gptq", "awq")  # quant_methods that are read
REMOTE = "openbmb/MiniCPM4-8B"  # whose code reads the configs we write without a base
REMOTE_CLASSES = {
    "AutoConfig": "configuration_minicpm.MiniCPMConfig",
    "AutoModel": "modeling_minicpm.MiniCPMModel",
    "AutoModelForCausalLM": "modeling_minicpm.MiniCPMForCausalLM",
}
# Keys whose presence changes what a config means: taken from the model, never kept from a base.
OWNED = {
    "rope_parameters", "original_max_position_embeddings", "dtype", "sparse_config", "mtp_layers",
    "scale_emb", "scale_depth", "dim_model_base", "mup_denominator",
}  # fmt: skip
ROPE_KINDS = {"su": "longrope"}  # an older name
LARGEST = 1e30  # no number of a config comes near, and no product of a few overflows
FIRST_BASE = 256  # dim_model_base, missing in the first MiniCPM4 release


def hf_name(name: str) -> str:
    """The published name of one of our parameters."""
    return name if name == HEAD else f"model.{name}"


def read_config(checkpoint: Checkpoint) -> ModelConfig:
    """The model's shape; keys that were not used are logged."""
    try:
        config, ignored = config_from_hf(checkpoint.config)
    except UserError as error:
        raise UserError(f"{checkpoint.folder}: {error}") from error
    if ignored:
        log.info("ignored in %s: %s", checkpoint.folder / "config.json", ", ".join(ignored))
    return config


def with_attention(config: ModelConfig, attention: Attention) -> ModelConfig:
    """The config with attention as asked: as stored, dense, or sparse with the released sizes."""
    if attention not in ("auto", "dense", "sparse"):
        raise UserError(f"attention is {attention!r}: use auto, dense or sparse")
    if attention == "dense":
        return dataclasses.replace(config, sparse=None)
    if attention == "sparse" and config.sparse is None:
        return dataclasses.replace(config, sparse=SparseConfig())
    return config


def _check_quant_method(raw: dict) -> None:
    """UserError for a quantization_config whose method we do not read."""
    found = raw.get("quantization_config")
    method = found.get("quant_method") if isinstance(found, dict) else found
    if found is not None and method not in LOW_BITS:
        raise UserError(
            f"config.json quantization_config has quant_method {_short(method)}, not supported: "
            f"use an unquantized export, or one with quant_method {' or '.join(LOW_BITS)}"
        )


class Reader:
    """A foreign JSON object: typed access, and a record of the keys that were used."""

    def __init__(self, raw: dict, prefix: str = "") -> None:
        self.raw, self.prefix = raw, prefix
        self.used: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """The value, or the default when it is missing or null."""
        self.used.add(key)
        value = self.raw.get(key)
        return default if value is None else value

    def number(self, key: str, default: float | None = None) -> float | None:
        """A finite number above zero."""
        value = self.get(key, default)
        if value is None:
            return None
        fine = isinstance(value, int | float) and not isinstance(value, bool)
        if not fine or not 0 < value < LARGEST:
            raise UserError(
                f"config.json {self.prefix}{key} is {value!r}: it must be a number above zero"
            )
        return value

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number above zero; required when there is no default."""
        value = self.number(key, default)
        if value is None:
            raise UserError(
                f"config.json lacks {self.prefix}{key}: add it, or export the model again"
            )
        if value != int(value):
            raise UserError(f"config.json {self.prefix}{key} is {value!r}: it must be whole")
        return int(value)

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise UserError(f"config.json {self.prefix}{key} is {value!r}: use true or false")
        return value

    def token(self, key: str) -> int | None:
        """One token id, or None."""
        ids = self.tokens(key)
        if len(ids) > 1:
            raise UserError(f"config.json {key} is {list(ids)}: it must be one token id")
        return ids[0] if ids else None

    def tokens(self, key: str) -> tuple[int, ...]:
        """Token ids, given as a number or a list."""
        value = self.get(key, [])
        ids = value if isinstance(value, list) else [value]
        if any(type(i) is not int or i < 0 for i in ids):
            raise UserError(f"config.json {key} is {value!r}: use a token id or a list of them")
        return tuple(ids)

    def factors(self, key: str) -> tuple[float, ...]:
        """A list of numbers, () when missing."""
        value = self.get(key, [])
        fine = isinstance(value, list) and all(
            isinstance(f, int | float) and 0 < f < LARGEST for f in value
        )
        if not fine:
            raise UserError(f"config.json {self.prefix}{key} must be a list of numbers above zero")
        return tuple(float(f) for f in value)

    def table(self, key: str) -> dict | None:
        """A nested object, or None."""
        value = self.get(key)
        if value is not None and not isinstance(value, dict):
            raise UserError(f"config.json {key} is {value!r}: it must be an object")
        return value

    def ignored(self) -> list[str]:
        """The keys nobody asked for."""
        return [f"{self.prefix}{key}" for key in self.raw if key not in self.used]


def config_from_hf(raw: dict) -> tuple[ModelConfig, list[str]]:
    """The model's shape, and the keys not used. Raises UserError for what we do not have."""
    reader = Reader(raw)
    kind = _model_type(reader)
    _refuse_unsupported(reader)
    heads = reader.whole("num_attention_heads")
    hidden = reader.whole("hidden_size")
    reader.used |= {"torch_dtype", "dtype"}  # the loader's default dtype
    longest = reader.whole("max_position_embeddings")
    rope, rope_ignored = _rope_from_hf(reader, longest)
    config = ModelConfig(
        vocab_size=reader.whole("vocab_size"),
        hidden_size=hidden,
        num_hidden_layers=reader.whole("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=reader.whole("num_key_value_heads", heads),
        head_dim=reader.whole("head_dim", max(1, hidden // heads)),
        intermediate_size=reader.whole("intermediate_size"),
        max_position_embeddings=longest,
        rms_norm_eps=reader.number("rms_norm_eps", 1e-6),
        rope=rope,
        tie_word_embeddings=_tied(reader, kind),
        **(_scales(reader) if kind == "minicpm" else {}),
        initializer_range=reader.number("initializer_range", 0.1 if kind == "minicpm" else 0.02),
        mtp_layers=reader.get("mtp_layers", 0),
        sparse=_sparse_from_hf(reader),
        bos_token_id=reader.token("bos_token_id"),
        eos_token_ids=reader.tokens("eos_token_id"),
        pad_token_id=reader.token("pad_token_id"),
    )
    _check_mup_denominator(reader, config)
    _check_factor_lists(config)
    return config, reader.ignored() + rope_ignored


def _model_type(reader: Reader) -> str:
    kind = reader.get("model_type")
    classes = reader.get("architectures", [])
    known = {"minicpm": "MiniCPMForCausalLM", "llama": "LlamaForCausalLM"}
    fine = isinstance(kind, str) and kind in known and isinstance(classes, list)
    if not fine or (classes and known[kind] not in classes):
        raise UserError(
            f"config.json names model_type {kind!r} with architectures {classes}, not supported: "
            "use a MiniCPM4 (minicpm) or Llama-family (llama) causal language model"
        )
    return kind


def _refuse_unsupported(reader: Reader) -> None:
    _check_quant_method(reader.raw)
    reader.used.add("quantization_config")
    for key, allowed in NEUTRAL.items():
        if key in reader.raw and reader.raw[key] not in allowed:
            raise UserError(
                f"config.json {key} is {_short(reader.raw[key])}, not supported: use a model where "
                f"it is {' or '.join(json.dumps(value) for value in allowed)}"
            )
        reader.used.add(key)


def _scales(reader: Reader) -> dict[str, Any]:
    """The three muP scales of a MiniCPM config."""
    for key in ("scale_emb", "scale_depth"):
        if reader.raw.get(key) is None:
            raise UserError(
                f"config.json lacks {key}, without which a minicpm model speaks noise: add it "
                "(published models: scale_emb 12, scale_depth 1.4)"
            )
    if reader.raw.get("dim_model_base") is None:
        log.warning("config.json lacks dim_model_base: %d assumed, as published", FIRST_BASE)
    return {
        "scale_emb": reader.number("scale_emb"),
        "scale_depth": reader.number("scale_depth"),
        "dim_model_base": reader.whole("dim_model_base", FIRST_BASE),
    }


def _tied(reader: Reader, kind: str) -> bool:
    """tie_word_embeddings; the configuration classes of the two families default differently."""
    if reader.raw.get("tie_word_embeddings") is None:
        log.warning("config.json lacks tie_word_embeddings: %s assumed", kind == "minicpm")
    return reader.flag("tie_word_embeddings", kind == "minicpm")


def _check_mup_denominator(reader: Reader, config: ModelConfig) -> None:
    """The published forward divides by the number of layers; another denominator only warns."""
    given = reader.number("mup_denominator") if "mup_denominator" in reader.raw else None
    if given is not None and given != config.num_hidden_layers:
        log.warning(
            "config.json mup_denominator %s differs from num_hidden_layers %d, which is used",
            given, config.num_hidden_layers,
        )  # fmt: skip


def _check_factor_lists(config: ModelConfig) -> None:
    """A list of the wrong length fails here, with its file named, not in the first forward."""
    for key, factors in (("long", config.rope.long_factor), ("short", config.rope.short_factor)):
        if config.rope.kind == "longrope" and len(factors) != config.head_dim // 2:
            raise UserError(
                f"config.json rope_scaling.{key}_factor holds {len(factors)} numbers for a head "
                f"width of {config.head_dim}: it needs {config.head_dim // 2}"
            )


def _rope_from_hf(reader: Reader, longest: int) -> tuple[RopeConfig, list[str]]:
    """Rotary positions and ignored keys; `rope_scaling` counts where both spellings are there."""
    key = "rope_scaling" if reader.raw.get("rope_scaling") else "rope_parameters"
    rope = Reader(reader.table(key) or {}, f"{key}.")
    reader.used.add("rope_scaling")
    theta = rope.number("rope_theta") or reader.number("rope_theta") or 10000.0
    reader.used.add("rope_theta")
    if rope.raw.get("partial_rotary_factor") not in NEUTRAL["partial_rotary_factor"]:
        raise UserError(f"config.json {key}.partial_rotary_factor is not supported: use 1")
    old = rope.get("type", "default")
    kind = rope.get("rope_type", old)
    if not isinstance(kind, str):
        raise UserError(f"config.json {key}.rope_type is {_short(kind)}: it must be a name")
    kind = ROPE_KINDS.get(kind, kind)
    values: dict[str, Any] = {"theta": float(theta), "kind": kind}
    if kind in ("llama3", "yarn", "longrope"):
        # a length beside the table counts first, as in transformers
        inside = rope.whole("original_max_position_embeddings", longest)
        values["original"] = reader.whole("original_max_position_embeddings", inside)
    if kind in ("linear", "llama3", "yarn", "longrope"):
        values["factor"] = rope.number("factor")
    if kind == "yarn" and values["factor"] is None:
        values["factor"] = longest / values["original"]
    values |= _kind_values(rope, kind)
    return RopeConfig(**values), rope.ignored()


def _kind_values(rope: Reader, kind: str) -> dict[str, Any]:
    """What only some kinds read, by RopeConfig field."""
    if kind == "llama3":
        return {
            "low_freq_factor": rope.number("low_freq_factor", 1.0),
            "high_freq_factor": rope.number("high_freq_factor", 4.0),
        }
    if kind == "yarn":
        return {
            "beta_fast": rope.number("beta_fast", 32.0),
            "beta_slow": rope.number("beta_slow", 1.0),
            "amplitude": rope.number("attention_factor"),
            "mscale": rope.get("mscale") and rope.number("mscale"),
            "mscale_all_dim": rope.get("mscale_all_dim") and rope.number("mscale_all_dim"),
            "truncate": rope.flag("truncate", True),
        }
    if kind == "longrope":
        return {
            "long_factor": rope.factors("long_factor"),
            "short_factor": rope.factors("short_factor"),
            "amplitude": rope.number("attention_factor"),
        }
    return {}


def _sparse_from_hf(reader: Reader) -> SparseConfig | None:
    raw = reader.table("sparse_config")
    if raw is None:
        return None
    known = [field.name for field in dataclasses.fields(SparseConfig)]
    for key, value in raw.items():
        if key not in known:
            near = get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"
            raise UserError(f"config.json sparse_config.{key} is not known{hint}")
        default = getattr(SparseConfig(), key)
        if isinstance(default, int) and type(value) is not type(default):
            raise UserError(
                f"config.json sparse_config.{key} is {value!r}: it must be "
                f"{'true or false' if isinstance(default, bool) else 'a whole number'}"
            )
    return SparseConfig(**raw)


def config_to_hf(
    config: ModelConfig, base: dict | None = None, *, dtype: str = "bfloat16"
) -> dict[str, Any]:
    """A config.json for the original's code. Foreign keys of `base`, and its order, are kept."""
    scaled = (config.scale_emb, config.scale_depth, config.dim_model_base) != (1.0, None, None)
    ours: dict[str, Any] = {
        "architectures": ["MiniCPMForCausalLM" if scaled else "LlamaForCausalLM"],
        "model_type": "minicpm" if scaled else "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "hidden_act": "silu",
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_theta": config.rope.theta,
        "rope_scaling": _rope_to_hf(config),
        "bos_token_id": config.bos_token_id,
        "eos_token_id": _one_or_list(config.eos_token_ids),
        "pad_token_id": config.pad_token_id,
        "torch_dtype": dtype,
        **(_scales_to_hf(config, base) if scaled else {}),
    }
    if config.sparse is not None:
        sizes = dataclasses.asdict(config.sparse)
        ours["sparse_config"] = {key: value for key, value in sizes.items() if value is not None}
    if config.mtp_layers:
        ours["mtp_layers"] = config.mtp_layers
    kept = {key: value for key, value in (base or {}).items() if key not in OWNED}
    if (base or {}).get("model_type") != ours["model_type"]:
        kept.pop("auto_map", None)
    in_place = {key: ours.get(key, kept.get(key)) for key in base or {} if key in {*ours, *kept}}
    return {**in_place, **ours}


def _scales_to_hf(config: ModelConfig, base: dict | None) -> dict[str, Any]:
    """The muP scales; sqrt(L) and the width itself are what leaves a depth or a head unscaled."""
    classes = {key: f"{REMOTE}--{name}" for key, name in REMOTE_CLASSES.items()}
    layers = config.num_hidden_layers
    depth = math.sqrt(layers) if config.scale_depth is None else config.scale_depth
    return {
        "auto_map": (base or {}).get("auto_map", classes),
        "scale_emb": config.scale_emb,
        "scale_depth": depth,
        "dim_model_base": config.dim_model_base or config.hidden_size,
        "mup_denominator": layers,
    }


def _rope_to_hf(config: ModelConfig) -> dict[str, Any] | None:
    """`rope_scaling`, with only what its kind reads."""
    rope = config.rope
    if rope.kind == "default":
        return None
    table: dict[str, Any] = {"rope_type": rope.kind}
    if rope.factor is not None:
        table["factor"] = rope.factor
    if rope.kind != "linear":
        table["original_max_position_embeddings"] = rope.original
    if rope.kind == "llama3":
        table |= {key: getattr(rope, key) for key in ("low_freq_factor", "high_freq_factor")}
    if rope.kind == "yarn":
        table |= {key: getattr(rope, key) for key in ("beta_fast", "beta_slow", "truncate")}
        table |= {"mscale": rope.mscale, "mscale_all_dim": rope.mscale_all_dim}
    if rope.kind == "longrope":
        table |= {"long_factor": [*rope.long_factor], "short_factor": [*rope.short_factor]}
    table["attention_factor"] = rope.amplitude
    return {key: value for key, value in table.items() if value is not None}


def rope_amplitude(config: ModelConfig) -> float:
    """The amplitude of cos and sin that a missing attention_factor stands for."""
    longest = config.max_position_embeddings
    return inverse_frequencies(config.rope, config.head_dim, longest, longest)[1]


def point_to_code(config: dict, files: set[str]) -> dict:
    """`auto_map` entries whose code is not among the files refer to its hub repository instead."""
    if "auto_map" not in config:
        return config
    home = config.get("_name_or_path", "")
    home = home if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", home) else REMOTE

    def place(name: str) -> str:
        here = "--" in name or f"{name.partition('.')[0]}.py" in files
        return name if here else f"{home}--{name}"

    return {**config, "auto_map": {key: place(name) for key, name in config["auto_map"].items()}}


def json_bytes(value: dict) -> bytes:
    """The text of a config file; the same object gives the same bytes."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _one_or_list(ids: tuple[int, ...]) -> int | list[int] | None:
    if not ids:
        return None
    return ids[0] if len(ids) == 1 else list(ids)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
