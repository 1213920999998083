"""Draft heads in CPM.cu's int4 layout are the same heads as plain ones of the same values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from endside.checkpoint import Checkpoint, TensorSource, write_folder
from endside.errors import UserError
from endside.formats import draft_head
from endside.formats.hf_config import config_to_hf, json_bytes
from endside.model.draft import DraftHead
from endside.model.presets import preset
from tests.formats.test_layouts import BASE, marlin_arrays

GROUP = 32


def source(array: np.ndarray) -> TensorSource:
    kind = {"int32": "I32", "float16": "F16", "float32": "F32"}[str(array.dtype)]
    return TensorSource(kind, array.shape, lambda: np.ascontiguousarray(array))


class Stored:
    """A head of small integers times scales, plain and as CPM.cu stores it."""

    def __init__(self, kind: str) -> None:
        sizes = {"hidden_size": 128, "num_attention_heads": 8, "intermediate_size": 96}
        self.config = replace(preset("tiny"), num_hidden_layers=1, **sizes)
        self.kind, self.noise = kind, np.random.default_rng(4)
        self.shapes = {
            name: tuple(one.shape)
            for name, one in DraftHead(self.config, kind).state_dict().items()
        }
        self.plain: dict[str, np.ndarray] = {}
        self.files: dict[str, np.ndarray] = {}
        fc, layer = self.shapes["fc.weight"], "layers.0."
        half = self.packed("fc", [(fc[0], fc[1] // 2)] * 2 if kind == "eagle2" else [fc])
        self.plain["fc.weight"] = np.concatenate(half, 1)
        for fused, parts in {
            "self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"), "self_attn.o_proj": ("o_proj",),
            "mlp.gate_up_proj": ("gate_proj", "up_proj"), "mlp.down_proj": ("down_proj",),
        }.items():  # fmt: skip
            names = [f"{layer}{fused.split('.')[0]}.{part}.weight" for part in parts]
            rows = [self.shapes[name][0] for name in names]
            [whole] = self.packed(layer + fused, [(sum(rows), self.shapes[names[0]][1])])
            self.plain |= dict(zip(names, np.split(whole, np.cumsum(rows)[:-1]), strict=True))
        for name in self.shapes.keys() - self.plain.keys():
            self.plain[name] = self.noise.normal(size=self.shapes[name]).astype(np.float32)
            self.files[name] = self.plain[name]

    def packed(self, base: str, shapes: list[tuple[int, int]]) -> list[np.ndarray]:
        """Matrices laid side by side as `base` -> their values."""
        parts, values = [], []
        for rows, columns in shapes:
            codes = self.noise.integers(0, 16, (columns, rows))
            scales = self.noise.uniform(0.01, 0.1, (columns // GROUP, rows)).astype(np.float16)
            parts.append(marlin_arrays(codes, scales, GROUP))
            spread = np.repeat(scales.astype(np.float32), GROUP, 0)
            values.append(((codes - 8) * spread).T.astype(np.float32))
        for ending in ("qweight", "scales"):
            found = [part[f"{BASE}.{ending}"] for part in parts]
            self.files[f"{base}.{ending}"] = np.concatenate(found, 1)
        return values

    def write(self, folder: Path) -> Checkpoint:
        prefix = "midlayer." if self.kind == "eagle3" else "layers.0."
        named = {name.replace("layers.0.", prefix): source(a) for name, a in self.files.items()}
        raw = config_to_hf(self.config) | {"quantization_config": {"bits": 4, "group_size": GROUP}}
        return Checkpoint.open(write_folder(folder, named, {"config.json": json_bytes(raw)}))


@pytest.mark.parametrize("kind", ["eagle2", "eagle3"])
def test_int4_heads_are_read_exactly(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    stored = Stored(kind)
    checkpoint = stored.write(tmp_path / "head")
    assert draft_head.holds(checkpoint)
    head = draft_head.read(checkpoint)
    assert head.kind == kind and head.tensors.keys() == stored.plain.keys()
    for name, wanted in stored.plain.items():
        np.testing.assert_array_equal(head.tensors[name], wanted, err_msg=name)


@pytest.mark.parametrize(
    ("name", "message"),
    [("layers.0.mlp.down_proj", "not layers.0.mlp.down_proj"), ("fc", "fc.qweight is")],
)
def test_incomplete_ones_are_refused(name: str, message: str, tmp_path: Path) -> None:
    stored = Stored("eagle2")
    if name == "fc":
        stored.files["fc.qweight"] = stored.files["fc.qweight"][:, :-64]
    else:
        del stored.files[f"{name}.scales"]
    with pytest.raises(UserError, match=message):
        draft_head.read(stored.write(tmp_path / "head"))
