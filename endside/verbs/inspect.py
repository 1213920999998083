"""`endside inspect MODEL`: the shape, what it costs, what will be used on this machine, and why.

Reads headers only, except that a model's weights are never touched; a preset name such as
`random:minicpm4-8b` is inspected without a file.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from endside.verbs import parse

if TYPE_CHECKING:
    from endside.model.config import ModelConfig


@dataclass(frozen=True)
class Inspect:
    """Architecture, parameters, memory plan and the features that will be used."""

    model: Positional[str]
    """Local folder, hub name, or random:PRESET."""
    context: int | None = None
    """Context length to plan for, in tokens; default: the model's own maximum."""
    attention: Literal["auto", "dense", "sparse"] = "auto"
    """Plan for this attention; auto: what the checkpoint says."""
    json: bool = False
    """Print one JSON object."""


def main(argv: list[str]) -> None:
    """Print the report of `describe`."""
    flags = parse(Inspect, argv, "inspect")
    report = describe(flags)
    print(json.dumps(report, indent=1) if flags.json else _table(report))


def describe(flags: Inspect) -> dict[str, Any]:
    """Everything `inspect` knows about a model, as plain values; UserError for a bad model."""
    from endside.model import flops

    config, ignored, source, stored = _config(flags.model)
    config = _with_attention(config, flags.attention)
    context = flags.context or config.max_position_embeddings
    counted = flops.parameters(config)
    width = 2  # bytes per element of bf16, in which checkpoints are published
    return {
        "model": source,
        "shape": _shape(config),
        "scales": {
            "embedding": config.scale_emb,
            "residual": config.residual_scale,
            "logit_divisor": config.logit_divisor,
        },
        "positions": {"kind": config.rope.kind, "theta": config.rope.theta,
                      "maximum": config.max_position_embeddings},
        "parameters": {**asdict(counted), "total": counted.total},
        "memory": {
            "context": context,
            "weights_bytes": counted.total * width,
            "cache_bytes": int(flops.cache_bytes_per_token(config, width) * context),
            "machine_bytes": _machine_bytes(),
        },
        "per_token": {
            "decode_bytes": int(flops.decode_bytes(config, context, width)),
            "forward_flops": int(flops.forward_flops(config, context)),
        },
        "attention": _attention(config, context, flags.attention, stored),
        "executor": _executor(),
        "ignored_keys": ignored,
    }  # fmt: skip


def _config(model: str) -> tuple[ModelConfig, list[str], str, dict[str, Any]]:
    """The shape, keys that were ignored, where it comes from, and the stored sparse_config."""
    if model.startswith("random:"):
        from endside.model.presets import preset

        return preset(model.removeprefix("random:")), [], model, {}
    from endside.checkpoint import Checkpoint, resolve
    from endside.formats.hf import config_from_hf

    folder = resolve(model)
    raw = Checkpoint.open(folder).config
    config, ignored = config_from_hf(raw)
    return config, ignored, str(folder), raw.get("sparse_config") or {}


def _with_attention(config: ModelConfig, attention: str) -> ModelConfig:
    from endside.formats.hf import with_attention

    return with_attention(config, attention)


def _shape(config: ModelConfig) -> dict[str, Any]:
    return {
        "layers": config.num_hidden_layers, "hidden": config.hidden_size,
        "query_heads": config.num_attention_heads, "key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim, "feed_forward": config.intermediate_size,
        "vocabulary": config.vocab_size, "tied_head": config.tie_word_embeddings,
        "mtp_layers": config.mtp_layers,
    }  # fmt: skip


def _attention(
    config: ModelConfig, context: int, asked: str, stored: dict[str, Any]
) -> dict[str, Any]:
    from endside.model import flops

    sparse = config.sparse
    seen = flops.visible_keys(config, context)
    if sparse is None:
        why = "asked for" if asked == "dense" else "the checkpoint has no sparse_config"
        return {"mode": "dense", "why": why, "visible_tokens": seen, "available_tokens": context}
    why = "asked for" if asked == "sparse" else "the checkpoint's sparse_config"
    start = "always" if sparse.dense_len < 0 else f"from {sparse.dense_len} tokens on"
    return {
        "mode": "sparse", "why": why, "starts": start,
        "selection": sparse.selection, "selection_why": _origin("selection", stored),
        "lse": sparse.lse, "lse_why": _origin("lse", stored), "compat": sparse.compat or "none",
        "blocks": sparse.total_blocks, "budget_tokens": sparse.budget,
        "visible_tokens": seen, "available_tokens": context,
    }  # fmt: skip


def _origin(key: str, stored: dict[str, Any]) -> str:
    return "stored in sparse_config" if key in stored else "the default, as none is stored"


def _executor() -> dict[str, str]:
    import torch

    from endside import native

    if torch.cuda.is_available():
        return {"name": "torch", "device": "cuda", "why": "a CUDA device is there",
                "native": native.status()}  # fmt: skip
    return {"name": "torch", "device": "cpu", "why": "no CUDA device", "native": native.status()}


def _machine_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _table(report: dict[str, Any]) -> str:
    memory, per_token, attention = report["memory"], report["per_token"], report["attention"]
    shape = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in report["shape"].items())
    needed = memory["weights_bytes"] + memory["cache_bytes"]
    fits = "fits" if needed < memory["machine_bytes"] else "does NOT fit"
    rows = {
        "model": report["model"],
        "shape": shape,
        "muP scales": ", ".join(f"{k} {v:.6g}" for k, v in report["scales"].items()),
        "positions": "{kind}, theta {theta:g}, up to {maximum:,} tokens".format(
            **report["positions"]
        ),
        "parameters": f"{report['parameters']['total'] / 1e6:,.1f} M",
        "memory": f"weights {_gib(memory['weights_bytes'])} + cache {_gib(memory['cache_bytes'])} "
        f"at {memory['context']:,} tokens (bf16): {fits} in {_gib(memory['machine_bytes'])}",
        "per token": f"{per_token['decode_bytes'] / 1e6:,.1f} MB read, "
        f"{per_token['forward_flops'] / 1e9:,.2f} GFLOP at that context",
        "attention": ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in attention.items()),
        "executor": "{name} on {device} ({why}); {native}".format(**report["executor"]),
        "ignored keys": ", ".join(report["ignored_keys"]) or "none",
    }
    return "\n".join(f"{name:<12} {text}" for name, text in rows.items())


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
