"""The kernels under Triton's interpreter: run this folder alone, with TRITON_INTERPRET=1.

The interpreter computes with numpy, which has no bfloat16. It multiplies the bit patterns of bf16
operands and truncates where the hardware rounds. Here both are done by torch instead: casts go
through torch's own types, and operands of a bf16 product are widened by value. Kernels must still
widen bf16 before elementwise arithmetic, as they should for accuracy anyway.

Three things are also made faster, or the group would take half an hour: the language is patched
once instead of at every device function, types are looked up by name, and the exclusive or inside
`tl.sort` reduces in numpy instead of element by element.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def faithful_interpreter() -> Iterator[None]:
    """bf16 casts and products behave like the hardware's; the interpreter is quick enough."""
    from triton.runtime import interpreter

    with pytest.MonkeyPatch.context() as patch:
        _round_like_hardware(patch, interpreter)
        _patch_language_once(patch, interpreter)
        _reduce_in_numpy(patch, interpreter)
        yield


def _round_like_hardware(patch, interpreter) -> None:
    import numpy as np
    import torch
    import triton.language as tl

    kinds = {
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
        "fp32": torch.float32,
        "fp64": torch.float64,
    }
    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def convert_float(array, source, target, rounding):
        old, new = kinds.get(source.scalar.name), kinds.get(target.scalar.name)
        if old is None or new is None or (rounding is not None and "RTZ" in str(rounding)):
            return convert(array, source, target, rounding)
        raw = torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8).copy())
        bits = np.dtype(f"uint{target.scalar.primitive_bitwidth}")
        return raw.view(old).to(new).view(torch.uint8).numpy().view(bits).reshape(array.shape)

    def widen(handle):
        if handle.dtype.scalar.name != "bf16":
            return handle
        wide = convert_float(handle.data, handle.dtype, tl.float32, None).view(np.float32)
        return interpreter.TensorHandle(wide, tl.float32)

    def create_dot(self, a, b, *rest):
        return dot(self, widen(a), widen(b), *rest)

    patch.setattr(interpreter, "_convert_float", convert_float)
    patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def _patch_language_once(patch, interpreter) -> None:
    import inspect

    patch_lang, numpy_type = interpreter._patch_lang, interpreter._get_np_dtype
    done: set[frozenset[int]] = set()
    types: dict[str, object] = {}

    def patch_once(fn):
        modules = frozenset(id(x) for x in fn.__globals__.values() if inspect.ismodule(x))
        if modules not in done:
            done.add(modules)
            patch_lang(fn)
        return interpreter._LangPatchScope()

    def type_by_name(kind):
        scalar = kind.scalar
        if scalar.is_ptr():
            return numpy_type(kind)
        if scalar.name not in types:
            types[scalar.name] = numpy_type(scalar)
        return types[scalar.name]

    patch.setattr(interpreter, "_patch_lang", patch_once)
    patch.setattr(interpreter, "_get_np_dtype", type_by_name)


def _reduce_in_numpy(patch, interpreter) -> None:
    import numpy as np

    one_by_one = interpreter.ReduceOps.generic_reduce

    def generic_reduce(self, operands):
        if self.combine_fn.fn.__name__ != "_xor_combine" or self.axis is None:
            return one_by_one(self, operands)
        (x,) = operands
        folded = np.bitwise_xor.reduce(x.handle.data, axis=self.axis, keepdims=self.keep_dims)
        return [self.to_tensor(folded, x.dtype)]

    patch.setattr(interpreter.ReduceOps, "generic_reduce", generic_reduce)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty and torch.empty_like return NaN, or an index far outside everything."""
    import torch

    def poison(make):
        def filled(*args: object, **kwargs: object) -> torch.Tensor:
            x = make(*args, **kwargs)
            return x.fill_(float("nan") if x.is_floating_point() else 2**30)

        return filled

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
