"""Compile what a call would launch, for a GPU this machine does not have.

The call runs on CPU tensors with every kernel launch recorded instead of run, so the arguments are
those the product passes: types, constants, and which integers are multiples of 16.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

# Shared memory one program may use (CUDA C++ programming guide, compute capabilities).
SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
NAMES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
}
OPTIONS = ("num_warps", "num_stages")


@dataclass(frozen=True)
class Launch:
    """One recorded kernel launch."""

    kernel: JITFunction
    args: dict[str, Any]
    options: dict[str, int]


@dataclass(frozen=True)
class Resources:
    """What the compiled program takes."""

    registers: int  # per thread
    stack: int  # bytes per thread: spilled registers
    shared: int  # bytes per program


def record(call: Callable[[], object]) -> list[Launch]:
    """The distinct kernels `call` launches, none of which runs."""
    launches: dict[str, Launch] = {}

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        names = [p.name for p in self.params]
        launches.setdefault(
            self.fn.__name__, Launch(self, dict(zip(names, args)) | kwargs, options)
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", run)
        call()
    return list(launches.values())


def _signature(launch: Launch) -> tuple[dict[str, str], dict, dict]:
    """Types, constants and divisibility of a launch, as a run on a GPU would specialise them."""
    types, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.args[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            types[parameter.name], constants[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            types[parameter.name] = NAMES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            types[parameter.name] = "fp32"
        else:
            types[parameter.name] = "i32"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return types, constants, attributes


def compile_for(launch: Launch, capability: int) -> Resources:
    """Compile a launch to machine code for sm_`capability` and read what it takes."""
    types, constants, attributes = _signature(launch)
    source = ASTSource(launch.kernel, types, constants, attributes)
    program = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options=launch.options
    )
    cubin = program.asm["cubin"]
    assert cubin, f"no machine code for {launch.kernel.fn.__name__} on sm_{capability}"
    registers, stack = _usage(cubin)
    return Resources(registers, stack, program.metadata.shared)


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes per thread, from the disassembler that comes with Triton."""
    import tempfile

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("this Triton brings no cuobjdump: resource usage cannot be read")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", text.stdout)
    assert found, f"cuobjdump printed no usage: {text.stdout[-300:]}"
    return int(found[1]), int(found[2])
