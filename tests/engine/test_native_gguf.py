"""GGUF files and folders in low bits behind the native executor: what is exact, what is rounded."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from endside import gguf_tokenizer
from endside.checkpoint import Checkpoint
from endside.engine.executor import Executor
from endside.engine.executors import Plan, create
from endside.engine.executors.native import NativeExecutor
from endside.engine.executors.native_plan import recipe
from endside.engine.executors.native_weights import (
    Matrix,
    Recipe,
    matrices,
    pack,
    rounded,
    shapes,
)
from endside.errors import UserError
from endside.formats.convert import convert
from endside.formats.gguf import config_keys, open_gguf
from endside.formats.gguf_file import GgufSource, read_gguf, write_gguf
from endside.formats.gguf_folder import open_checkpoint
from endside.formats.gguf_types import TYPES
from endside.formats.source import folder_source, low_bits
from endside.formats.weights import Parameter, to_float
from endside.models import open_model
from endside.ops.rope.frequencies import RopeConfig
from endside.quant.pack import QuantizedLinear, Scheme
from tests.engine.tiny import HAS_CORE, checkpoint
from tests.engine.tiny import awkward as shaped
from tests.engine.tiny import tokens as ids
from tests.formats.test_conversions import awq_folder, shuffle_columns, write

pytestmark = pytest.mark.skipif(not HAS_CORE, reason="no native core here")
SIZES = {"hidden_size": 256, "head_dim": 32, "num_attention_heads": 8, "intermediate_size": 512}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    config = shaped("tiny", rope=RopeConfig(theta=3e4), **SIZES)
    return checkpoint(tmp_path_factory.mktemp("native-gguf"), config)


def _open(path: Path) -> Checkpoint:
    return open_checkpoint(path, gguf_tokenizer)


def _native(model: Checkpoint, **plan: object) -> NativeExecutor:
    made = create(model, Plan(executor="native", **{"context": 128, "threads": 2, **plan}))
    assert isinstance(made, NativeExecutor)
    return made


def _logits(executor: Executor, count: int = 65) -> np.ndarray:
    seq = executor.open(count)
    logits = executor.prefill(seq, ids(count), logits="all")
    assert logits is not None
    return logits


def _stored(path: Path) -> dict[str, np.ndarray]:
    return {name: to_float(one.read()) for name, one in open_gguf(path).parameters.items()}


def _agree(got: np.ndarray, want: np.ndarray, least: float) -> None:
    assert np.corrcoef(got.ravel(), want.ravel())[0, 1] > least


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32", "q8_0", "q4_0"])
def test_every_weight_of_the_file_is_kept(plain: Checkpoint, tmp_path: Path, kind: str) -> None:
    """Attention and feed-forward, the head and the rows of the embedding."""
    path = tmp_path / "m.gguf"
    convert(plain.folder, path, to="gguf", type=kind)
    model, want = _open(path), _stored(path)
    executor = _native(model)
    for matrix in matrices(executor.config):
        got = executor.pack.matrices[matrix.name].unpack()
        parts = [want[part] for part in matrix.parts]
        if matrix.interleaved:
            blocks = got.reshape(-1, 2, 8, matrix.columns)
            got = np.concatenate([blocks[:, 0], blocks[:, 1]]).reshape(-1, matrix.columns)
        np.testing.assert_array_equal(got, np.concatenate(parts), err_msg=matrix.name)
    _agree(_logits(executor), _logits(create(model, Plan(executor="torch", context=128))), 0.999)
    again = _native(_open(path))
    assert again.pack.place is not None and again.pack.place == executor.pack.place
    np.testing.assert_array_equal(_logits(again), _logits(executor))


def _rewritten(path: Path, target: Path, kinds: dict[str, str]) -> Path:
    """The file with some matrices as random blocks of a K-quant, of an ordinary size."""
    file, rng = read_gguf(path), np.random.default_rng(4)
    tensors = {}
    for name, one in file.tensors.items():
        raw, kind = file.raw(name), kinds.get(name.split(".")[-2], one.kind)
        if kind != one.kind:
            count = one.shape[0] * one.shape[1] // 256
            raw = rng.integers(0, 256, (count, TYPES[kind].bytes), dtype=np.uint8)
            scales = {0: 2e-4, 2: 14e-4} if kind == "Q4_K" else {208: 2e-5}
            for at, scale in scales.items():
                raw[:, at : at + 2] = np.full((count, 1), scale, np.float16).view(np.uint8)
        tensors[name] = GgufSource(kind, one.shape, lambda raw=raw: raw.reshape(-1))
    write_gguf(target, config_keys(open_gguf(path).config)[0], tensors, overwrite=False)
    return target


def test_k_quants_and_mixed_kinds_are_rounded_to_eight_bits_and_told(
    plain: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What has a form in the core stays exact beside them."""
    convert(plain.folder, tmp_path / "q4.gguf", to="gguf", type="q4_0")
    kinds = {"attn_v": "Q6_K", "ffn_gate": "Q4_K", "ffn_up": "Q4_K", "output": "Q6_K"}
    path = _rewritten(tmp_path / "q4.gguf", tmp_path / "mixed.gguf", kinds)
    model, want = _open(path), _stored(path)
    assert low_bits(folder_source(model)) == ("mixed", "mixed")
    with caplog.at_level(logging.WARNING):
        executor = _native(model)
    assert "5 matrices are stored in bits" in caplog.text and "layers.0.qkv" in caplog.text
    told = rounded(executor.config, folder_source(model).parameters)
    for matrix in matrices(executor.config):
        made = executor.pack.matrices[matrix.name]
        assert (made.kind, made.group) == ("int8" if matrix.name in told else "int4", 32)
        if len(matrix.parts) == 1:
            gap = made.unpack() - want[matrix.parts[0]]
            error = np.linalg.norm(gap) / np.linalg.norm(want[matrix.parts[0]])
            assert error == 0 if made.kind == "int4" else 1e-3 < error < 0.01, matrix.name
    _agree(_logits(executor), _logits(create(model, Plan(executor="torch", context=128))), 0.999)
    with pytest.raises(UserError, match="low bits of other kinds: leave --quant out"):
        _native(model, quant="int4")
    with pytest.raises(UserError, match="leave --head out"):
        _native(model, head="int4")


def test_ternary_and_four_bit_rows_of_one_matrix(tmp_path: Path) -> None:
    """A Q2_0 with a code 3 reads as int4; beside ternary q and k it still is one exact matrix."""
    rng, linears = np.random.default_rng(0), []
    for kind, top in (("ternary", 3), ("int4", 16), ("ternary", 3)):
        codes = rng.integers(0, top, (16, 64), dtype=np.uint8)
        scales = rng.uniform(0.1, 1, (16, 1)).astype(np.float16)
        linears.append(QuantizedLinear(kind, codes, scales, None, 64))
    promised = Scheme("ternary", 64)
    parameters = {
        str(at): Parameter((16, 64), "Q2_0", lambda one=one: one, promised)
        for at, one in enumerate(linears)
    }
    matrix = Matrix("m", ("0", "1", "2"), (16, 16, 16), 64)
    packed = pack(matrix, parameters, Recipe("ternary", "int8", 128, stored=True), 1)
    assert packed.kind == "int4"
    want = np.concatenate([one.dequantize() for one in linears])
    np.testing.assert_array_equal(packed.unpack(), want)
    lopsided = replace(linears[1], zeros=rng.integers(0, 16, (16, 1), dtype=np.uint8))
    parameters["1"] = replace(parameters["1"], read=lambda: lopsided)
    packed = pack(matrix, parameters, Recipe("ternary", "int8", 128, stored=True), 1)
    want = np.concatenate([one.dequantize() for one in (linears[0], lopsided, linears[2])])
    np.testing.assert_array_equal(packed.unpack(), want)


@pytest.mark.parametrize(
    ("to", "options", "body", "group"),
    [
        ("endside", {"type": "int4", "group": 32}, "int4", 32),
        ("endside", {"type": "int8", "group": 64}, "int8", 64),
        ("gptq", {"type": "int4", "group": 64}, "int4", 64),
        ("gptq", {"type": "int8", "group": 256}, "int8", 128),
        ("gguf", {"type": "q4_0"}, "int4", 32),
        ("gguf", {"type": "q8_0"}, "int8", 32),
    ],
)
def test_the_plan_has_the_stored_groups(
    plain: Checkpoint, tmp_path: Path, to: str, options: dict, body: str, group: int
) -> None:
    """What `inspect` counts before loading is what is packed, whatever --group says."""
    target = tmp_path / ("m.gguf" if to == "gguf" else "m")
    convert(plain.folder, target, to=to, **options)
    model = open_model(target)
    source = folder_source(model)
    asked = recipe(Plan(), *low_bits(source))
    planned = shapes(source.config, asked, source.parameters)
    assert (planned["layers.0.qkv"].kind, planned["layers.0.qkv"].group) == (body, group)
    assert asked.body == body and asked.name.startswith(f"{body}-stored-head-")
    packed = _native(model).pack.matrices
    assert {name: one.nbytes for name, one in planned.items()} == {
        name: one.nbytes for name, one in packed.items()
    }


def test_zeros_of_their_own_are_counted_and_act_order_is_refused(tmp_path: Path) -> None:
    """AWQ's zeros need memory too; columns sorted by importance cannot be run, and are not."""
    model = Checkpoint.open(awq_folder(tmp_path / "awq"))
    source = folder_source(model)
    planned = shapes(source.config, recipe(Plan(), *low_bits(source)), source.parameters)
    packed = _native(model).pack.matrices
    assert packed["layers.0.down"].asymmetric
    assert {name: one.nbytes for name, one in planned.items()} == {
        name: one.nbytes for name, one in packed.items()
    }
    plain = write(tmp_path / "plain")
    folder = convert(plain, tmp_path / "g", to="gptq", type="int4", group=32).destination
    shuffle_columns(folder, "model.layers.0.mlp.up_proj")
    with pytest.raises(UserError, match=r"up_proj.*desc_act.*--executor torch"):
        _native(Checkpoint.open(folder))
