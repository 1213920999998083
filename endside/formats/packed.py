"""Our own packed folder: safetensors with codes, scales and zeros per linear (quant/pack.py).

config.json is the model's own plus a `quantization_config` (`Scheme`). Norms and the embedding stay
plain; the head too, unless the scheme has an entry for it. The CPU engine maps these files and
packs the codes for its kernels; nothing is rounded on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from endside.checkpoint import write_folder
from endside.errors import UserError
from endside.formats.hf_config import HEAD, config_to_hf, hf_name, json_bytes, point_to_code
from endside.formats.weights import SAFE, Part, Source, Value, is_linear
from endside.quant.pack import (
    BITS,
    QuantizedLinear,
    Scheme,
    from_arrays,
    stored_names,
    to_arrays,
)
from endside.shards import TensorSource

SCALES = ("F16", "BF16")
Quantize = Callable[[str], QuantizedLinear]  # our parameter name -> its matrix in low bits
Plain = Callable[[str], np.ndarray]  # our parameter name -> array of the announced dtype


@dataclass(frozen=True)
class Packed:
    """The layout of a folder with `quant_method` "endside"."""

    scheme: Scheme
    name: str = "endside"

    def scheme_of(self, base: str, columns: int = 0) -> Scheme:
        """As config.json says it; the head may have an entry of its own."""
        head = f"{base}.weight" == HEAD and self.scheme.head is not None
        return self.scheme.head if head else self.scheme

    def parts(self, base: str, shape: tuple[int, int]) -> dict[str, Part]:
        """Codes and scales, and zeros when asymmetric."""
        scheme, names = self.scheme_of(base), stored_names(base)
        groups = -(-shape[1] // scheme.group)
        width = groups * scheme.group * BITS[scheme.kind] // 8
        parts: dict[str, Part] = {
            names["codes"]: (("U8",), (shape[0], width)),
            names["scales"]: (SCALES, (shape[0], groups)),
        }
        return parts if scheme.symmetric else {
            **parts, names["zeros"]: (("U8",), (shape[0], groups)),
        }  # fmt: skip

    def read(self, arrays: Mapping[str, np.ndarray], base: str, shape: tuple[int, int]) -> Value:
        """The linear in its canonical form."""
        return from_arrays(base, arrays, self.scheme_of(base), shape[1])


def save_packed(
    source: Source,
    dst: str | Path,
    scheme: Scheme,
    quantize: Quantize,
    *,
    plain: Plain,
    dtypes: Mapping[str, str],
    scales: str = "F16",
    overwrite: bool = False,
) -> Path:
    """Write the folder: `quantize` gives the blocks' linears (and the head, where the scheme has
    an entry for it) with scales of the safetensors type `scales`, `plain` the rest in `dtype`.

    `quantize` is asked once per tensor written, so twice or three times for each linear.
    """  # fmt: skip
    tensors: dict[str, TensorSource] = {}
    for name, parameter in source.parameters.items():
        head = name == HEAD and scheme.head is not None
        if is_linear(name) or head:
            inner = scheme.head if head and scheme.head else scheme
            tensors |= _packed_sources(name, parameter.shape, inner, scales, quantize)
        else:
            read = lambda name=name: plain(name)
            tensors[hf_name(name)] = TensorSource(SAFE[dtypes[name]], parameter.shape, read)
    config = config_to_hf(source.config, source.raw or None, dtype=dtypes["embed_tokens.weight"])
    config["quantization_config"] = scheme.to_config()
    config = point_to_code(config, set(source.files))
    files = {"config.json": json_bytes(config), **source.files}
    return write_folder(dst, tensors, files, overwrite=overwrite)


def _packed_sources(
    name: str, shape: tuple[int, ...], scheme: Scheme, scales: str, quantize: Quantize
) -> dict[str, TensorSource]:
    """The two or three tensors of one linear, each made when its turn comes."""
    base = hf_name(name).removesuffix(".weight")
    if scheme.group * BITS[scheme.kind] % 8:
        raise UserError(f"group size {scheme.group} does not fill whole bytes: use a multiple of 4")
    found = {}
    for part, (kinds, size) in Packed(scheme).parts(base, (shape[0], shape[1])).items():
        kind = scales if kinds == SCALES else kinds[0]
        read = lambda part=part: to_arrays(base, quantize(name))[part]
        found[part] = TensorSource(kind, size, read)
    return found
