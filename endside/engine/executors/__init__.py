"""Which backend runs a model: `Plan` says what is wanted, `choose` decides, `create` loads it.

    torch     any device PyTorch knows, weights as floats
    native    this processor through the C++ core, weights as floats or in low bits, no PyTorch
    llamacpp  a .gguf file through llama.cpp, where that optional package is installed; on request

auto is native on a CPU wherever the core can run the model. A backend is imported only when it is
chosen, so a path that does not need PyTorch never loads it.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from endside.engine.executor import Executor
from endside.errors import UserError

if TYPE_CHECKING:
    from endside.checkpoint import Checkpoint
    from endside.model.config import ModelConfig

log = logging.getLogger(__name__)

CHOICES = {
    "executor": ("auto", "torch", "native", "llamacpp"),
    "attention": ("auto", "dense", "sparse"),
    "device": ("auto", "cpu", "cuda"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "quant": ("none", "int8", "int4", "ternary"),
    "group": (32, 64, 128),
    "head": ("auto", "none", "int8", "int4"),
    "kv": ("auto", "f16", "bf16", "int8"),
    "isa": ("auto", "portable", "avx2", "avx512", "amx", "neon", "neon_i8mm"),
}
NATIVE_ONLY = {"quant": "none", "group": 128, "head": "auto", "kv": "auto", "isa": "auto"}
SMALL = 50_000_000  # parameters: below, even the portable kernels are quick
GPUS = ("nvidiactl", "dxg", "kfd")  # files in /dev: NVIDIA, Windows' bridge, AMD
CACHE_SHARE = 0.25  # of free memory: weights, activations and other programs need the rest


@dataclass(frozen=True)
class Plan:
    """How a model is loaded and run; "auto" and None are decided by the model and the machine."""

    executor: Literal["auto", "torch", "native", "llamacpp"] = "auto"  # auto: native on most CPUs
    attention: Literal["auto", "dense", "sparse"] = "auto"  # auto: what the checkpoint says
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: float32 on a CPU
    quant: Literal["none", "int8", "int4", "ternary"] = "none"  # weights; none: as stored
    group: Literal[32, 64, 128] = 128  # weights that share a scale
    head: Literal["auto", "none", "int8", "int4"] = "auto"  # auto: as quant; int8 if stored low
    # keys and values, native; auto: f16, or bf16 where matrix tiles read it as it lies
    kv: Literal["auto", "f16", "bf16", "int8"] = "auto"
    # instruction set, native; auto: the fastest
    isa: Literal["auto", "portable", "avx2", "avx512", "amx", "neon", "neon_i8mm"] = "auto"
    context: int | None = None  # tokens, prompt and answer together; None: the model's, if it fits
    capacity: int | None = None  # tokens of all running requests together; None: one context
    threads: int | None = None  # CPU threads; None: native: one per core, torch: its choice
    max_batch: int = 8  # requests that run at once
    draft: str = "auto"  # guesses: none, lookup, mtp, bita, a folder (head, model); auto: lookup

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                options = ", ".join(map(str, allowed))
                raise UserError(f"{name} is {getattr(self, name)!r}: use {options}")
        for name in ("context", "capacity", "threads", "max_batch"):
            value = getattr(self, name)
            wrong = isinstance(value, bool) or not isinstance(value, int) or value < 1
            if value is not None and wrong:
                raise UserError(f"{name} is {value!r}: give a whole number of at least 1")
        if self.capacity is not None and self.capacity < (self.context or 1):
            raise UserError(
                f"capacity {self.capacity} is below context {self.context}: "
                "the pool must hold at least one full context"
            )


@dataclass(frozen=True)
class Choice:
    """The backend that will run a model, and why."""

    name: str  # "torch", "native" or "llamacpp"
    device: str  # "cpu" or "cuda"
    why: str


def choose(plan: Plan, config: ModelConfig) -> Choice:
    """Decide, or raise UserError where what is asked for contradicts itself or the machine."""
    wanted = [name for name, usual in NATIVE_ONLY.items() if getattr(plan, name) != usual]
    if plan.executor in ("torch", "llamacpp"):
        if wanted:
            raise UserError(
                f"{wanted[0]} {getattr(plan, wanted[0])} needs the native executor: "
                f"leave --{wanted[0]} out, or use --executor native"
            )
        torch = plan.executor == "torch"
        return Choice(plan.executor, _torch_device(plan) if torch else "cpu", "asked for")
    obstacle = _obstacle(plan, config, small=plan.executor == "native" or bool(wanted))
    if plan.executor == "native" or wanted:
        if obstacle:
            asked = "executor native" if plan.executor == "native" else f"--{wanted[0]}"
            raise UserError(f"{asked} cannot be used: {obstacle}; use --executor torch without it")
        why = "asked for" if plan.executor == "native" else f"{wanted[0]} is asked for"
        return Choice("native", "cpu", why)
    if (device := _torch_device(plan)) != "cpu":
        return Choice("torch", device, f"device {device} is {_source(plan)}")
    if obstacle:
        return Choice("torch", "cpu", obstacle)
    return Choice("native", "cpu", "a CPU, and the native core can run this model")


def _source(plan: Plan) -> str:
    return "asked for" if plan.device != "auto" else "there"


def _obstacle(plan: Plan, config: ModelConfig, *, small: bool) -> str:
    """Why the native core cannot run this model as planned; "" when it can.

    small: the portable kernels will do, whatever the size of the model.
    """
    from endside import native
    from endside.model.flops import parameters

    isas = native.available_isas()
    if not isas:
        return native.status()
    if plan.isa != "auto" and plan.isa not in isas:
        return f"isa {plan.isa} is not available here, only {', '.join(isas)}"
    if plan.device == "cuda":
        return "device is cuda, and the native core runs on a CPU"
    if plan.dtype != "auto":
        return f"dtype {plan.dtype} is asked for, and the native core keeps weights as stored"
    sparse = config.sparse
    if sparse is not None and sparse.compat is not None:
        return f"sparse_config.compat is {sparse.compat}"
    if sparse is not None and (sparse.block_size, sparse.kernel_stride) != (64, 16):
        return f"sparse blocks of {sparse.block_size} tokens, and the native core knows 64"
    if config.head_dim % 8 or config.head_dim > 256 or config.group > 16:
        return (
            f"heads of width {config.head_dim}, {config.group} to a key head: the native core "
            "knows multiples of 8 up to 256, and up to 16"
        )
    if not small and isas[-1] == "portable" and parameters(config).total > SMALL:
        return "this processor has neither AVX2 nor NEON, without which PyTorch is faster"
    return ""


def _torch_device(plan: Plan) -> str:
    """ "cpu" or "cuda"; PyTorch is asked only where the system shows a GPU."""
    if plan.device != "auto":
        return plan.device
    if not any((Path("/dev") / name).exists() for name in GPUS):
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def create(checkpoint: Checkpoint, plan: Plan) -> Executor:
    """Load the model of an opened folder with the backend that `plan` asks for."""
    from endside.formats.hf_config import read_config, with_attention

    config = with_attention(read_config(checkpoint), plan.attention)
    choice = choose(plan, config)
    fallback = plan.executor == "auto" and choice.name == "torch" and choice.device == "cpu"
    log.log(logging.WARNING if fallback else logging.INFO, "%s: %s", choice.name, choice.why)
    if choice.name == "native":
        from endside.engine.executors import native

        return native.load(checkpoint, config, plan)
    if choice.name == "llamacpp":
        from endside.engine.executors import llamacpp

        return llamacpp.load(checkpoint, config, plan)
    from endside.engine.executors import torch

    checkpoint.verify()
    return torch.load(checkpoint, plan)


def default_context(longest: int, token_bytes: float, memory_bytes: int) -> int:
    """The model's own maximum, or what a quarter of free memory holds if that is less; tokens."""
    fitting = int(memory_bytes * CACHE_SHARE / token_bytes) // 64 * 64
    return max(64, min(longest, fitting))


def check_length(context: int, config: ModelConfig) -> int:
    """`context` tokens, if the model's positions reach so far; a warning beyond its own maximum."""
    longest = config.max_position_embeddings
    if context > longest and config.rope.kind == "default":
        raise UserError(
            f"context {context:,} is longer than the {longest:,} tokens this model knows: "
            "lower --context, or add rope_scaling to its config.json"
        )
    if context > longest:
        log.warning("context %d is beyond max_position_embeddings %d", context, longest)
    return context


def free_memory() -> int:
    """Bytes of main memory that can be taken without swapping; all of it where that is unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    values = dict(line.split(":", 1) for line in lines)
    return int(values["MemAvailable"].split()[0]) * 1024
