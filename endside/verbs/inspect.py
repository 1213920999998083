"""`endside inspect MODEL`: the shape, what it costs, what will be used on this machine, and why.

Reads headers only: a model's weights are not touched, and a preset name such as
`random:minicpm4-8b` is inspected without a file. The memory and the steps are those of `run` with
the same flags; a context that cannot fit is refused here as it is there.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from endside.engine.executors import Choice, Plan, choose, free_memory
from endside.verbs import inspect_draft, lazily, parse

if TYPE_CHECKING:
    import tyro

    from endside.formats.weights import Source
    from endside.model.config import ModelConfig
else:
    tyro = lazily("tyro")


@dataclass(frozen=True)
class Inspect:
    """Architecture, parameters, memory plan and the features that will be used."""

    model: tyro.conf.Positional[str]
    """Local folder, .gguf file, hub name, or random:PRESET."""
    json: bool = False
    """Print one JSON object."""
    plan: Annotated[Plan, tyro.conf.arg(name="")] = field(default_factory=Plan)


def main(argv: list[str]) -> None:
    """Print the report of `describe`."""
    flags = parse(Inspect, argv, "inspect")
    report = describe(flags)
    print(json.dumps(report, indent=1) if flags.json else _table(report))


def describe(flags: Inspect) -> dict[str, Any]:
    """Everything `inspect` knows about a model, as plain values; UserError for a bad model."""
    from endside.formats.hf_config import with_attention
    from endside.model import flops

    model = _open(flags.model)
    config = with_attention(model.config, flags.plan.attention)
    choice = choose(flags.plan, config)
    plan = _native(model, config, flags.plan) if choice.name == "native" else None
    memory = _memory(config, flags.plan) if plan is None else plan["memory"]
    context, width = memory["context"], 2
    counted = flops.parameters(config)
    return {
        "model": model.source,
        "shape": _shape(config),
        "scales": {
            "embedding": config.scale_emb,
            "residual": config.residual_scale,
            "logit_divisor": config.logit_divisor,
        },
        "positions": {"kind": config.rope.kind, "theta": config.rope.theta,
                      "maximum": config.max_position_embeddings},
        "parameters": {**asdict(counted), "total": counted.total},
        "memory": memory,
        "per_token": {
            "decode_bytes": int(flops.decode_bytes(config, context, width)),
            "forward_flops": int(flops.forward_flops(config, context)),
        } if plan is None else plan["per_token"],
        "attention": _attention(config, context, flags.plan.attention, model.sparse),
        "executor": _executor(choice, plan),
        "draft": inspect_draft.draft(flags.plan.draft, model.source, config, choice.name),
        "steps": [] if plan is None else plan["steps"],
        "ignored_keys": model.ignored,
    }  # fmt: skip


@dataclass(frozen=True)
class _Model:
    """A model's shape, where it comes from, and what else its files say about it."""

    config: ModelConfig
    source: str
    ignored: list[str]  # keys of config.json
    sparse: dict[str, Any]  # sparse_config as stored
    stored: Source | None = None  # where the weights lie


def _open(model: str) -> _Model:
    if model.startswith("random:"):
        from endside.model.presets import preset

        return _Model(preset(model.removeprefix("random:")), model, [], {})
    from endside.formats.source import folder_source
    from endside.models import open_model

    checkpoint = open_model(model)
    source = folder_source(checkpoint)
    sparse = checkpoint.config.get("sparse_config") or {}
    return _Model(source.config, str(source.place), list(source.ignored), sparse, source)


def _native(model: _Model, config: ModelConfig, plan: Plan) -> dict[str, Any]:
    """What the native executor would take; UserError where that cannot fit."""
    from endside.engine.executors.native_plan import choose_context, recipe, thread_count
    from endside.engine.executors.native_weights import shapes
    from endside.formats.source import low_bits
    from endside.model import flops

    asked = recipe(plan) if model.stored is None else recipe(plan, *low_bits(model.stored))
    parameters = None if model.stored is None else model.stored.parameters
    found = choose_context(config, plan, asked, shapes(config, asked, parameters))
    kept = {"f16": 2, "bf16": 2, "int8": 1}[found.cache_type]
    weights = sum(found.weights.values())
    length = found.context
    keys = flops.decode_bytes(config, length, kept) - flops.decode_bytes(config, 0, kept)
    return {
        "memory": {
            "context": length,
            "weights": found.weights,
            "weights_bytes": weights,
            "cache_bytes": found.working["cache"],
            "cache_bytes_per_token": found.cache_per_token,
            "working": found.working,
            "total_bytes": found.total,
            "free_bytes": free_memory(),
            "machine_bytes": _machine_bytes(),
        },
        "per_token": {
            "decode_bytes": int(weights + keys),
            "forward_flops": int(flops.forward_flops(config, length)),
        },
        "threads": thread_count(plan.threads),
        "steps": list(found.steps),
        "weights": found.recipe.name,
        "cache": found.cache_type,
    }


def _memory(config: ModelConfig, plan: Plan) -> dict[str, Any]:
    """Weights and cache in bfloat16, in which checkpoints are published."""
    from endside.model import flops

    context, width = plan.context or config.max_position_embeddings, 2
    return {
        "context": context,
        "weights_bytes": flops.parameters(config).total * width,
        "cache_bytes": int(flops.cache_bytes_per_token(config, width) * context),
        "machine_bytes": _machine_bytes(),
    }


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


def _executor(choice: Choice, plan: dict[str, Any] | None) -> dict[str, Any]:
    from endside import native

    found = {**asdict(choice), "native": native.status()}
    if plan is None:
        return found
    return {**found, "threads": plan["threads"], "weights": plan["weights"], "cache": plan["cache"]}


def _machine_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _table(report: dict[str, Any]) -> str:
    per_token, attention = report["per_token"], report["attention"]
    shape = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in report["shape"].items())
    rows = {
        "model": report["model"],
        "shape": shape,
        "muP scales": ", ".join(f"{k} {v:.6g}" for k, v in report["scales"].items()),
        "positions": "{kind}, theta {theta:g}, up to {maximum:,} tokens".format(
            **report["positions"]
        ),
        "parameters": f"{report['parameters']['total'] / 1e6:,.1f} M",
        **_memory_rows(report["memory"]),
        "per token": f"{per_token['decode_bytes'] / 1e6:,.1f} MB read, "
        f"{per_token['forward_flops'] / 1e9:,.2f} GFLOP at that context",
        "attention": ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in attention.items()),
        "executor": _executor_row(report["executor"]),
        "draft": inspect_draft.row(report["draft"]),
        "ignored keys": ", ".join(report["ignored_keys"]) or "none",
    }
    lines = [f"{name:<12} {text}" for name, text in rows.items()]
    names = ["one step", *[""] * len(report["steps"])]
    return "\n".join(lines + [f"{name:<12} {step}" for name, step in zip(names, report["steps"])])


def _memory_rows(memory: dict[str, Any]) -> dict[str, str]:
    weights, cache = memory["weights_bytes"], memory["cache_bytes"]
    context = f"at {memory['context']:,} tokens"
    if "working" not in memory:
        fits = "fits" if weights + cache < memory["machine_bytes"] else "does NOT fit"
        text = f"weights {_gib(weights)} + cache {_gib(cache)} {context} (bf16): {fits} in "
        return {"memory": text + _gib(memory["machine_bytes"])}
    parts = {f"{name} weights": count for name, count in memory["weights"].items()}
    scratch = {"activations": "activations", "attention": "attention's scratch", "trees": "trees"}
    parts |= {scratch.get(k, k): v for k, v in memory["working"].items() if k != "cache"}
    return {
        "memory": f"{_gib(memory['total_bytes'])} {context}, of {_gib(memory['free_bytes'])} free: "
        f"weights {_gib(weights)}, cache {_gib(cache)}",
        "cache": f"{memory['cache_bytes_per_token']:,} bytes per token",
        "in detail": ", ".join(f"{name} {_mib(count)}" for name, count in parts.items()),
    }


def _executor_row(found: dict[str, Any]) -> str:
    text = f"{found['name']} on {found['device']} ({found['why']}); {found['native']}"
    if "threads" not in found:
        return text
    return f"{text}; threads {found['threads']}, weights {found['weights']}, cache {found['cache']}"


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
