"""What the native executor will take before anything is loaded: bytes by part, and the steps.

Weights, cache and scratch are all known from the shape, so a context either fits or is refused
with the largest one that would. The embedding of a checkpoint stays where it is on the disk:
mapped, and only the rows of tokens that occur are ever in memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from endside.engine.executors import check_length, default_context, free_memory
from endside.engine.executors.native_weights import (
    Recipe,
    join,
    native_shape,
    native_sparse,
    norms,
)
from endside.errors import UserError
from endside.native.model import CHUNK, CacheType, Limits, Model, cell_order

if TYPE_CHECKING:
    from endside.engine.executors import Plan
    from endside.model.config import ModelConfig
    from endside.native.packed import Packed

ROWS, TREES = 512, 64  # rows of one call, and of its draft trees, at most
SPARE = 64 << 20  # bytes left to the interpreter, the tokenizer and logits


@dataclass(frozen=True)
class Memory:
    """Bytes by part for one context length."""

    context: int
    capacity: int  # tokens of all sequences
    recipe: Recipe
    cache_type: str
    weights: dict[str, int]
    working: dict[str, int]  # cache, activations, …: what the core allocates
    cache_per_token: int
    steps: tuple[str, ...]  # of one decode call, in order

    @property
    def total(self) -> int:
        """Everything that must fit."""
        return sum(self.weights.values()) + sum(self.working.values()) + SPARE


def recipe(plan: Plan, stored: str = "none", head: str = "none") -> Recipe:
    """The low bits that a plan asks for; stored, head: those of the model (`source.low_bits`)."""
    for flag, asked, there in (("quant", plan.quant, stored), ("head", plan.head, head)):
        if there != "none" and asked not in (there, "auto" if flag == "head" else "none"):
            raise UserError(
                f"{flag} {asked} is asked for, but the weights are stored in "
                f"{'low bits of other kinds' if there == 'mixed' else there}: "
                f"leave --{flag} out, or quantize the original model"
            )
    body = plan.quant if stored == "none" else stored
    # a head that nobody asked to round keeps eight bits
    usual = {"none": "none", "int4": "int4" if stored == "none" else "int8"}.get(body, "int8")
    asked = usual if plan.head == "auto" else plan.head
    return Recipe(body, asked if head == "none" else "stored", plan.group, stored=stored != "none")


def limits(plan: Plan, context: int, threads: int) -> Limits:
    """Sizes of the core's buffers. Each sequence may leave one chunk partly empty."""
    chunks = -(-(plan.capacity or context) // CHUNK) + plan.max_batch - 1
    return Limits(rows=ROWS, trees=TREES, context=context, chunks=chunks, threads=threads)


def cache_type(plan: Plan, config: ModelConfig) -> CacheType:
    """auto: bfloat16 where matrix tiles read it as it lies, else half precision.

    The error of either is far below that of any 4-bit weight; it is speed that decides.
    """
    if plan.kv != "auto":
        return plan.kv
    return "bf16" if cell_order("bf16", config.head_dim, plan.isa) == "tiles" else "f16"


def memory(
    config: ModelConfig,
    plan: Plan,
    recipe: Recipe,
    shapes: Mapping[str, Packed],
    *,
    context: int,
    threads: int,
) -> Memory:
    """Bytes for one context length; `shapes`: of the packed matrices (`native_weights.shapes`)."""
    bounds = limits(plan, context, threads)
    empty = join(config, context, dict(shapes), dict.fromkeys(norms(config)), None)
    how = {"sparse": native_sparse(config), "cache": cache_type(plan, config), "limits": bounds}
    taken = Model.memory(native_shape(config), empty, **how)
    parts = {"attention": ("qkv", "output"), "feed-forward": ("gate_up", "down")}
    weights = {
        part: sum(one.nbytes for name, one in shapes.items() if name.endswith(ends))
        for part, ends in parts.items()
    }
    weights["head"] = shapes["head"].nbytes
    weights["norms"] = 4 * config.hidden_size * len(norms(config))
    return Memory(
        context=context,
        capacity=bounds.chunks * CHUNK,
        recipe=recipe,
        cache_type=cache_type(plan, config),
        weights=weights,
        working=taken,
        cache_per_token=taken["cache"] // (bounds.chunks * CHUNK),
        steps=tuple(Model.steps(native_shape(config), empty, **how)),
    )


def choose_context(
    config: ModelConfig, plan: Plan, asked: Recipe, shapes: Mapping[str, Packed]
) -> Memory:
    """The plan for the context given, or for what suits model and machine; UserError: too long."""
    threads = thread_count(plan.threads)

    def plan_for(context: int) -> Memory:
        return memory(config, plan, asked, shapes, context=context, threads=threads)

    if plan.context is None:
        longest, each = config.max_position_embeddings, plan_for(CHUNK).cache_per_token
        context = default_context(longest, each, free_memory())
        context = min(context, plan.capacity or context)
    else:
        context = check_length(plan.context, config)
    return check_fits(plan_for, context, free_memory())


def check_fits(plan_for: Callable[[int], Memory], context: int, free: int) -> Memory:
    """The memory of a context; UserError names the largest that fits where this one does not.

    plan_for: context -> its Memory.
    """
    wanted = plan_for(context)
    if wanted.total <= free:
        return wanted
    largest = _largest(plan_for, context, free)
    weights, cache = sum(wanted.weights.values()), wanted.working["cache"]
    fix = (
        f"the largest context that fits is {largest:,}: give it as --context"
        if largest
        else "not even a short context fits: use fewer bits (--quant int4) or a smaller model"
    )
    raise UserError(
        f"a context of {context:,} tokens needs {gib(wanted.total)} (weights {gib(weights)}, "
        f"cache {gib(cache)}, the rest {gib(wanted.total - weights - cache)}) "
        f"and {gib(free)} are free here; {fix}"
    )


def _largest(plan_for: Callable[[int], Memory], context: int, free: int) -> int:
    """The most tokens, in whole chunks, that fit; 0 where one chunk does not."""
    low, high = 0, -(-context // CHUNK)
    while high - low > 1:
        middle = (low + high) // 2
        if plan_for(middle * CHUNK).total <= free:
            low = middle
        else:
            high = middle
    return low * CHUNK


def gib(count: float) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.2f} GiB"


def physical_cores() -> int:
    """Cores that this process may use, a core with several hardware threads counted once."""
    mine = usable_threads()
    cores = set()
    for cpu in mine:
        place = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(place.read_text().strip())
        except OSError:
            cores.add(str(cpu))
    return max(1, len(cores))


def usable_threads() -> set[int]:
    """Numbers of the hardware threads that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def thread_count(asked: int | None) -> int:
    """--threads, or one per physical core."""
    return asked or physical_cores()
