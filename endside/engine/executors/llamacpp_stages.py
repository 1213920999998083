"""The residual stream of a model that llama.cpp runs, caught while its graph is evaluated.

The library asks before each tensor of its graph whether somebody wants to see it, and calls again
when it is there. Tensors are known by name: l_out-3 is the residual stream behind layer 3,
result_norm what the head is given, and the embedding is inp_scaled where it is scaled, else
inp_embd. Their bytes are read with the library's own call, so no layout of its structs is assumed.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

import numpy as np

from endside.errors import UserError

EMBED = ("embd", "inp_scaled", "inp_embd")  # after scaling, by the versions' names
NAMES = re.compile(rf"l_out-(\d+)|result_norm|{'|'.join(EMBED)}")


class Stages:
    """What a pass made, by stage, while a `with` block is open; nothing is asked for outside."""

    def __init__(self, library: Any) -> None:
        self._base = _ggml(library)
        self._parts: dict[str, list[np.ndarray]] = {}
        self._on = False
        self.callback = library.ggml_backend_sched_eval_callback(self._see)

    def __enter__(self) -> Stages:
        if self._base is None:
            raise UserError(
                "this build of llama.cpp does not show its tensors (libggml-base is missing): "
                "trace another executor"
            )
        self._parts, self._on = {}, True
        return self

    def __exit__(self, *_: object) -> None:
        self._on = False

    def taken(self) -> dict[str, np.ndarray]:
        """Stage -> (T, C) float32, in order; UserError where the library named none."""
        embed = next((name for name in EMBED if name in self._parts), EMBED[0])
        layers = sum(name.startswith("l_out-") for name in self._parts)
        order = {"embed": embed, **{f"layer {n}": f"l_out-{n}" for n in range(layers)}}
        order["norm"] = "result_norm"
        missing = [name for name in order.values() if name not in self._parts]
        if missing or not layers:
            raise UserError(
                f"this version of llama.cpp shows no {', '.join(missing) or 'layers'}: "
                "trace another executor"
            )
        return {stage: np.concatenate(self._parts[name]) for stage, name in order.items()}

    def _see(self, tensor: int, asking: bool, _: object) -> bool:
        if not self._on or self._base is None:
            return False
        name = self._base.ggml_get_name(ctypes.c_void_p(tensor)).decode()
        if not NAMES.fullmatch(name):
            return False
        if not asking:
            size = self._base.ggml_nbytes(ctypes.c_void_p(tensor))
            rows = self._base.ggml_nrows(ctypes.c_void_p(tensor))
            part = np.empty((rows, size // 4 // rows), np.float32)
            self._base.ggml_backend_tensor_get(
                ctypes.c_void_p(tensor), part.ctypes.data_as(ctypes.c_void_p), 0, size
            )
            self._parts.setdefault(name, []).append(part)
        return True


def _ggml(library: Any) -> Any:
    """The library that knows what a tensor is, None where it is not to be found."""
    for folder in {Path(library.llama_cpp._lib._name).parent, *_folders(library)}:
        for file in sorted(folder.glob("*ggml-base*")):
            if file.suffix in (".so", ".dylib", ".dll"):
                return _typed(ctypes.CDLL(str(file)))
    return None


def _folders(library: Any) -> list[Path]:
    return [Path(library.__file__).parent / "lib"]


def _typed(base: Any) -> Any:
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    base.ggml_get_name.argtypes, base.ggml_get_name.restype = [pointer], ctypes.c_char_p
    base.ggml_nbytes.argtypes, base.ggml_nbytes.restype = [pointer], size
    base.ggml_nrows.argtypes, base.ggml_nrows.restype = [pointer], ctypes.c_int64
    base.ggml_backend_tensor_get.argtypes = [pointer, pointer, size, size]
    base.ggml_backend_tensor_get.restype = None
    return base
