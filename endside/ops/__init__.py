"""Ground floor: tensors in, tensors out; every fast kernel beside the truth it must match.

`OPS` lists each operation and where its implementations live. `reference` is plain PyTorch with
fp32 inside: the specification, which runs everywhere. The other names share its signature.
Modules are imported when first asked for, so that a machine without Triton or a compiler never
notices that their kernels exist. Tests and benchmarks walk this table.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

OPS: dict[str, dict[str, str]] = {
    "rmsnorm": {
        "reference": "endside.ops.rmsnorm.reference:rmsnorm",
        "native": "endside.ops.rmsnorm.native:rmsnorm",
        "fused": "endside.ops.rmsnorm.fused:rmsnorm",
    },
    "rope": {
        "reference": "endside.ops.rope.reference:rotate",
        "fused": "endside.ops.rope.fused:rotate",
        "native": "endside.ops.rope.native:rotate",
    },
    "swiglu": {
        "reference": "endside.ops.swiglu.reference:swiglu",
        "fused": "endside.ops.swiglu.fused:swiglu",
    },
    "add_norm": {
        "reference": "endside.ops.add_norm.reference:add_norm",
        "native": "endside.ops.add_norm.native:add_norm",
    },
    "linear": {
        "reference": "endside.ops.linear.reference:linear",
        "tiles": "endside.ops.linear.tiles:linear",
    },
    "attention": {
        "reference": "endside.ops.attention.reference:attend",
        "sdpa": "endside.ops.attention.sdpa:attend",
        "segments": "endside.ops.attention.segments:attend",
        "tiles": "endside.ops.attention.tiles:attend",
        "varlen": "endside.ops.attention.varlen:attend",
    },
    "cross_entropy": {"reference": "endside.ops.cross_entropy.reference:cross_entropy"},
    "head_loss": {
        "reference": "endside.ops.head_loss.reference:head_loss",
        "fused": "endside.ops.head_loss.fused:head_loss",
    },
    "infllm": {
        "reference": "endside.ops.infllm.reference:attend",
        "vectorised": "endside.ops.infllm.vectorised:attend",
        "triton": "endside.ops.infllm.triton:attend",
    },
}


def implementation(op: str, impl: str) -> Callable:
    """The function behind `OPS[op][impl]`; KeyError names what there is."""
    if impl not in OPS[op]:
        raise KeyError(f"{op} has no implementation {impl!r}: there are {sorted(OPS[op])}")
    module, name = OPS[op][impl].split(":")
    return getattr(import_module(module), name)
