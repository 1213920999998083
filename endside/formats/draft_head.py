"""Draft heads in files: one decoder layer that guesses from what the model has seen.

Three layouts become one set of names (formats §4.1, §4.2):

    eagle2   fc [embedding | hidden], norms of both where there are any, layers.0.*; the head is
             the model's own
    eagle3   fc of three residual streams, midlayer.* on [embedding | hidden], norm, lm_head over a
             vocabulary of its own, d2t: how far each of its tokens stands from the model's
    mtp      model.mtp.* inside a checkpoint that was trained with such a layer; its projection has
             the columns in the other order

CPM.cu's int4 folders are read too (formats/draft_marlin.py). vLLM's EAGLE-2 folders prefix the
names and bring copies of embedding and head, which are the model's and are left alone.

Frequencies (FR-Spec, arXiv 2502.14856) are a file of token ids, the most frequent first: ours is an
.npy of int32, which any reader understands and no reader executes; a published .pt list is read
once with `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from endside.checkpoint import Checkpoint, TensorSource, write_folder
from endside.errors import UserError
from endside.formats.draft_marlin import ENDINGS, linears
from endside.formats.hf_config import config_from_hf, config_to_hf, json_bytes
from endside.model.config import ModelConfig

Kind = Literal["eagle2", "eagle3", "mtp"]

RANKING = "frequencies.npy"
LAYER = "layers.0."
NPY = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '([<|][iu][1248])', 'fortran_order': False, "
    rb"'shape': \((\d{1,12}),\), \} *\n", re.DOTALL
)  # fmt: skip
SHARED = ("embed_tokens.weight", "lm_head.weight")  # the model's own, where a folder repeats them
MTP = {
    "proj.weight": "fc.weight",
    "embed_norm.weight": "input_norm1.weight",
    "hidden_norm.weight": "input_norm2.weight",
    "norm.weight": "norm.weight",
}


@dataclass(frozen=True)
class DraftHead:
    """A head's weights under the names of EAGLE-2, float32; `norm.weight` ends eagle3 and mtp."""

    kind: Kind
    config: ModelConfig  # sizes of its one layer; vocab_size is the model's
    tensors: Mapping[str, np.ndarray]
    ids: np.ndarray | None = None  # (Vd,) the model's token for each of its own; None: the same
    bits: str = "none"  # "int4": it was trained in those
    group: int = 32  # weights per scale, where it was trained in low bits


def holds(checkpoint: Checkpoint) -> bool:
    """Whether a folder has a draft head, and not a whole model without one."""
    names = {_short(name) for name in checkpoint.names()}
    mtp = any(name.startswith("mtp.") for name in names)
    return mtp or "fc.weight" in names or "fc.qweight" in names


def kind_of(checkpoint: Checkpoint) -> Kind:
    """From the names alone, and what our own folders say."""
    names = {_short(name): name for name in checkpoint.names()}
    if "fc.qweight" in names:
        names["fc.weight"] = ""
    return checkpoint.config.get("endside_draft", {}).get("kind") or _kind(names, checkpoint.folder)


def read(checkpoint: Checkpoint, vocab_size: int | None = None) -> DraftHead:
    """The head in a folder; UserError for another kind of folder.

    vocab_size: the model's, for a folder whose own config does not say it.
    """
    raw = dict(checkpoint.config)
    ours = raw.pop("endside_draft", {})
    raw.pop("quantization_config", None)  # the names of the tensors say it
    names = {_short(name): name for name in checkpoint.names()}
    raw["architectures"] = []
    raw.setdefault("model_type", "llama" if raw.get("scale_emb") is None else "minicpm")
    raw.setdefault("vocab_size", vocab_size)
    config, _ = config_from_hf(raw)
    low = _low_bits(checkpoint, names, config)
    names = {own: name for own, name in names.items() if not own.endswith(ENDINGS)}
    kind = _kind({**names, **dict.fromkeys(low, "")}, checkpoint.folder)
    plain = {own: _float(checkpoint, name) for own, name in _names(kind, names).items()}
    tensors = {**plain, **low}
    ids = _own_vocabulary(checkpoint, names, config, kind)
    if kind == "mtp":
        tensors["fc.weight"] = np.roll(tensors["fc.weight"], config.hidden_size, axis=1)
    bits, group = ours.get("bits", "none"), ours.get("group", 32)
    head = DraftHead(ours.get("kind", kind), config, tensors, ids, bits, group)
    _check(head, checkpoint.folder)
    return head


def _low_bits(
    checkpoint: Checkpoint, names: Mapping[str, str], config: ModelConfig
) -> dict[str, np.ndarray]:
    """Linears that CPM.cu stored in int4, under our names."""
    if "fc.qweight" not in names:
        return {}
    packed = {one: checkpoint.numpy(names[one]) for one in names if one.endswith(ENDINGS)}
    wide = f"{LAYER}hidden_norm.weight" in names
    return linears(packed, config, wide=wide, folder=checkpoint.folder)


def _short(name: str) -> str:
    name = name.removeprefix("model.")
    return name.replace("eagle_layers.0.", LAYER).replace("midlayer.", LAYER)


def _kind(names: Mapping[str, str], folder: Path) -> Kind:
    if f"{LAYER}hidden_norm.weight" in names:
        return "eagle3"
    if "fc.weight" in names:
        return "eagle2"
    if any(name.startswith("mtp.") for name in names):
        return "mtp"
    raise UserError(
        f"{folder} holds no draft head (fc, midlayer or mtp tensors): give an EAGLE-2 or EAGLE-3 "
        "folder, or a model trained with mtp_layers = 1"
    )


def _names(kind: Kind, names: Mapping[str, str]) -> dict[str, str]:
    """Our name -> the folder's."""
    if kind == "mtp":
        found = {}
        for short, name in names.items():
            if short.startswith("mtp."):
                rest = short.removeprefix("mtp.")
                found[MTP.get(rest, rest.replace("layer.", LAYER, 1))] = name
        return found
    unread = {"d2t", "t2d", "embed_tokens.weight"}
    unread |= {"lm_head.weight"} if kind == "eagle2" else set()
    return {short: name for short, name in names.items() if short not in unread}


def _float(checkpoint: Checkpoint, name: str) -> np.ndarray:
    info, array = checkpoint.info(name), checkpoint.numpy(name)
    if info.dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    if info.dtype not in ("F32", "F16", "F64"):
        raise UserError(
            f"{name} of {checkpoint.folder} is {info.dtype}: a draft head needs plain floats; take "
            "the folder that is not quantized"
        )
    return array.astype(np.float32)


def _own_vocabulary(
    checkpoint: Checkpoint, names: Mapping[str, str], config: ModelConfig, kind: Kind
) -> np.ndarray | None:
    if "d2t" in names:
        apart = checkpoint.numpy(names["d2t"]).astype(np.int64)
        ids = apart + np.arange(len(apart))
        return _checked(ids, config.vocab_size, f"{checkpoint.folder} d2t")
    ranking = checkpoint.folder / RANKING
    if kind != "eagle3" and ranking.is_file():
        return read_ranking(ranking, config.vocab_size)
    return None


def _check(head: DraftHead, folder: Path) -> None:
    width, config = head.config.hidden_size, head.config
    taken = 2 * width if head.kind == "eagle3" else width
    sizes = {
        "fc.weight": (width, (3 if head.kind == "eagle3" else 2) * width),
        f"{LAYER}self_attn.q_proj.weight": (config.num_attention_heads * config.head_dim, taken),
        f"{LAYER}self_attn.k_proj.weight": (config.num_key_value_heads * config.head_dim, taken),
        f"{LAYER}self_attn.v_proj.weight": (config.num_key_value_heads * config.head_dim, taken),
        f"{LAYER}self_attn.o_proj.weight": (width, config.num_attention_heads * config.head_dim),
        f"{LAYER}post_attention_layernorm.weight": (width,),
        f"{LAYER}mlp.gate_proj.weight": (config.intermediate_size, width),
        f"{LAYER}mlp.up_proj.weight": (config.intermediate_size, width),
        f"{LAYER}mlp.down_proj.weight": (width, config.intermediate_size),
    }
    if head.kind == "eagle3":
        rows = config.vocab_size if head.ids is None else len(head.ids)
        sizes |= {"norm.weight": (width,), "lm_head.weight": (rows, width)}
    for name, size in sizes.items():
        found = head.tensors[name].shape if name in head.tensors else "absent"
        if found != size:
            raise UserError(
                f"draft head {folder}: {name} is {found} and must be {size}: its config.json "
                "belongs to other weights"
            )


def write(head: DraftHead, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write a head in its published layout, float32; mtp, which has none of its own, as eagle2."""
    tensors = {name: _source(array) for name, array in head.tensors.items()}
    files: dict[str, bytes | Path] = {}
    if head.kind == "eagle3":
        tensors = {name.replace(LAYER, "midlayer."): one for name, one in tensors.items()}
        if head.ids is not None:
            tensors["d2t"] = _source(head.ids - np.arange(len(head.ids)))
    elif head.ids is not None:
        files[RANKING] = ranking_bytes(head.ids)
    raw = config_to_hf(replace(head.config, mtp_layers=0, sparse=None), dtype="float32")
    raw["endside_draft"] = {"kind": head.kind, "bits": head.bits, "group": head.group}
    files["config.json"] = json_bytes(raw)
    return write_folder(folder, tensors, files, overwrite=overwrite)


def _source(array: np.ndarray) -> TensorSource:
    kind = "I64" if array.dtype == np.int64 else "F32"
    return TensorSource(kind, array.shape, lambda: np.ascontiguousarray(array))


def read_ranking(file: str | Path, vocab_size: int) -> np.ndarray:
    """Token ids, most frequent first, (N,) int64; UserError where they cannot be this model's."""
    path = Path(file)
    try:
        if path.suffix == ".pt":
            ids = np.asarray(_torch_list(path))
        elif path.suffix == ".json":
            ids = np.asarray(json.loads(path.read_text(encoding="utf-8")))
        else:
            ids = _npy(path.read_bytes())
    except (OSError, ValueError, EOFError, RecursionError) as error:
        raise UserError(f"cannot read token frequencies {path}: {error}") from error
    return _checked(ids, vocab_size, str(path))


def _npy(raw: bytes) -> np.ndarray:
    """The one kind of .npy that holds ids: numpy's own reader would evaluate a damaged header."""
    found = NPY.match(raw)
    if found is None:
        raise ValueError("no .npy of one row of whole numbers")
    kind, count = np.dtype(found[1].decode()), int(found[2])
    if len(raw) - found.end() != count * kind.itemsize:
        raise ValueError(f"{count} numbers are announced, {len(raw) - found.end()} bytes are there")
    return np.frombuffer(raw, kind, offset=found.end())


def _torch_list(path: Path) -> Any:
    import pickle

    import torch

    try:
        return torch.load(path, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"not a plain list of token ids ({error})") from error


def _checked(ids: np.ndarray, vocab_size: int, place: str) -> np.ndarray:
    good = ids.ndim == 1 and ids.dtype.kind in "iu" and len(ids)
    if not good:
        raise UserError(f"{place}: a list of token ids is needed: make one with endside draft rank")
    ids = ids.astype(np.int64)
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise UserError(
            f"{place} names token {int(ids.max())}, the model knows 0 to {vocab_size - 1}: it was "
            "counted with another tokenizer"
        )
    if len(np.unique(ids)) != len(ids):
        raise UserError(f"{place} names a token twice: make it again with endside draft rank")
    return ids


def ranking_bytes(ids: np.ndarray) -> bytes:
    """The content of a file that `read_ranking` reads."""
    import io

    out = io.BytesIO()
    np.save(out, np.ascontiguousarray(ids, dtype=np.int32), allow_pickle=False)
    return out.getvalue()
