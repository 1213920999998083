"""Models to folders and back: byte for byte, refused as a whole when wrong, small in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from endside.checkpoint import Checkpoint, write_folder
from endside.errors import UserError
from endside.formats.hf import load, save
from endside.model.batch import Batch
from endside.model.presets import preset
from endside.model.transformer import Transformer
from endside.ops.infllm.config import SparseConfig
from endside.shards import TensorSource


def tiny(name: str = "tiny", **changes: object) -> Transformer:
    """Random weights, norms included."""
    generator = torch.Generator().manual_seed(3)
    model = Transformer(replace(preset(name), **changes))
    model.init_weights(generator)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def contents(folder: Path) -> dict[str, bytes]:
    """All files by name."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> Path:
    """The same folder with other fp32 tensors."""
    checkpoint = Checkpoint.open(folder)
    arrays = {name: checkpoint.numpy(name).copy() for name in checkpoint.names()}
    change(arrays)
    kinds = {"float32": "F32", "int32": "I32", "float16": "F16"}
    sources = {
        name: TensorSource(kinds[str(array.dtype)], array.shape, lambda array=array: array)
        for name, array in arrays.items()
    }
    files = {"config.json": (folder / "config.json").read_bytes()}
    return write_folder(folder.with_name(folder.name + "-changed"), sources, files)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("name", "changes"),
    [("tiny", {}), ("tiny", {"tie_word_embeddings": True, "mtp_layers": 1}), ("tiny-sparse", {})],
)
def test_round_trip_is_byte_identical(name: str, changes: dict, dtype: str, tmp_path: Path) -> None:
    """save -> load -> save: every file of the folder."""
    model = tiny(name, **changes)
    first = save(model, tmp_path / "1", dtype=dtype)
    loaded = load(first)
    assert loaded.config == model.config
    assert {p.dtype for p in loaded.parameters()} == {getattr(torch, dtype)}
    second = save(loaded, tmp_path / "2")
    assert contents(first) == contents(second)
    third = save(load(second), tmp_path / "3", base_config=Checkpoint.open(second).config)
    assert contents(first) == contents(third)


def test_round_trip_keeps_foreign_keys_and_files(tmp_path: Path, test_data: Path) -> None:
    """A folder with the published config's foreign keys and tokenizer, saved twice."""
    base = {"_name_or_path": "openbmb/MiniCPM4-8B", "use_cache": True, "colour": [1, {"a": "é"}]}
    published = test_data / "minicpm4-8b"
    first = save(tiny(), tmp_path / "1", base_config=base, tokenizer_files=published)
    raw = Checkpoint.open(first).config
    assert {key: raw[key] for key in base} == base
    second = save(load(first), tmp_path / "2", base_config=raw, tokenizer_files=first)
    assert contents(first) == contents(second)
    for file in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        assert contents(first)[file] == (published / file).read_bytes()


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    folder = save(tiny(tie_word_embeddings=True), tmp_path / "m")
    assert "lm_head.weight" not in Checkpoint.open(folder).names()
    assert "lm_head.weight" in Checkpoint.open(save(tiny(), tmp_path / "untied")).names()


def test_logits_survive(tmp_path: Path) -> None:
    """The loaded model is the saved one, and not merely one of its shape."""
    model, tokens = tiny(), torch.arange(40)[None] * 7
    loaded = load(save(model, tmp_path / "m"))
    with torch.inference_mode():
        want, got = (m.logits(m(Batch(tokens))) for m in (model, loaded))
    assert torch.equal(got, want)
    assert all(p.requires_grad for p in loaded.parameters()), "training starts from here too"


def test_sharded_folders_load(tmp_path: Path) -> None:
    """Several shards and their index, as the 8B repository has."""
    folder = save(tiny(), tmp_path / "m")
    checkpoint = Checkpoint.open(folder)
    sources = {
        name: TensorSource(
            "F32", checkpoint.info(name).shape, lambda name=name: checkpoint.numpy(name)
        )
        for name in checkpoint.names()
    }
    files = {"config.json": folder / "config.json"}
    sharded = write_folder(tmp_path / "s", sources, files, max_shard=50_000)
    assert len(list(sharded.glob("*.safetensors"))) >= 3
    for (name, one), (_, two) in zip(
        load(folder).named_parameters(), load(sharded).named_parameters(), strict=True
    ):
        assert torch.equal(one, two), name


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16", torch.float64])
def test_dtype_on_load(dtype: str | torch.dtype, tmp_path: Path) -> None:
    model = load(save(tiny(), tmp_path / "m", dtype="bfloat16"), dtype=dtype)
    want = {"auto": torch.bfloat16}.get(dtype) or getattr(torch, str(dtype).split(".")[-1])
    assert {p.dtype for p in model.parameters()} == {want}
    assert torch.equal(model.norm.weight.float(), tiny().norm.weight.bfloat16().float())


def test_auto_dtype_is_what_the_config_names(tmp_path: Path) -> None:
    folder = save(tiny(), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    for changed, want in (({"torch_dtype": "float16"}, torch.float16), ({}, torch.float32)):
        config.pop("torch_dtype", None)
        (folder / "config.json").write_text(json.dumps({**config, **changed}))
        assert load(folder).norm.weight.dtype == want


def test_attention_switch(tmp_path: Path) -> None:
    """auto keeps what is stored, dense removes it, sparse adds the released sizes."""
    dense, sparse = save(tiny(), tmp_path / "d"), save(tiny("tiny-sparse"), tmp_path / "s")
    assert load(dense).config.sparse is None and load(sparse).config.sparse.topk == 4
    assert load(sparse, attention="dense").config.sparse is None
    assert load(dense, attention="sparse").config.sparse == SparseConfig()
    assert load(sparse, attention="sparse").config.sparse.topk == 4
    with pytest.raises(UserError, match="use auto, dense or sparse"):
        load(dense, attention="spares")


def test_context_reaches_the_model(tmp_path: Path) -> None:
    assert load(save(tiny(), tmp_path / "m"), context=77).context == 77


def test_fused_projections_are_split(tmp_path: Path) -> None:
    """q|k|v and gate|up rows in one tensor, in one layer and not in the other."""
    model = tiny()
    folder = save(model, tmp_path / "m")

    def fuse(arrays: dict[str, np.ndarray]) -> None:
        for fused, parts in (
            ("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            rows = [arrays.pop(f"model.layers.1.{part}.weight") for part in parts]
            arrays[f"model.layers.1.{fused}.weight"] = np.concatenate(rows)

    loaded = load(rewrite(folder, fuse))
    for (name, want), (_, got) in zip(
        model.named_parameters(), loaded.named_parameters(), strict=True
    ):
        assert torch.equal(want, got), name


def test_stored_rotary_tables_are_ignored_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    caplog.set_level("INFO", logger="endside")
    folder = save(tiny(), tmp_path / "m")
    load(rewrite(folder, lambda arrays: arrays.update({name: np.ones(8, np.float32)})))
    assert name in caplog.text


def test_a_stored_head_beside_tying(tmp_path: Path) -> None:
    """Equal to the embedding: ignored. Different: somebody is wrong, so refused."""
    folder = save(tiny(tie_word_embeddings=True), tmp_path / "m")

    def head(scale: float) -> Callable[[dict[str, np.ndarray]], None]:
        def change(arrays: dict[str, np.ndarray]) -> None:
            arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"] * np.float32(scale)

        return change

    load(rewrite(folder, head(1.0)))
    (folder.parent / "m-changed").rename(folder.parent / "equal")
    with pytest.raises(UserError, match=r"lm_head.weight in .*safetensors differs.*to false"):
        load(rewrite(folder, head(1.5)))


O_PROJ = "model.layers.1.self_attn.o_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a.pop(O_PROJ), [O_PROJ, "missing"]),
        (lambda a: a.pop("lm_head.weight"), ["lm_head.weight", "missing"]),
        (lambda a: a.update(x=np.ones(3, np.float32)), ["x in model.safetensors not expected"]),
        (lambda a: a.update({O_PROJ: a[O_PROJ].T[:, :9].copy()}),
         [O_PROJ, "model.safetensors", "is [64, 9]", "asks for [48, 64]"]),
        (lambda a: a.update({O_PROJ: a[O_PROJ].astype(np.int32)}),
         [O_PROJ, "model.safetensors", "stored as I32", "unquantized"]),
    ],
)  # fmt: skip
def test_a_folder_that_does_not_fit_is_refused(
    change: Callable, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message names tensor, file and fix, and no weight has been read by then."""
    folder = rewrite(save(tiny(), tmp_path / "m"), change)
    monkeypatch.setattr(Checkpoint, "torch", lambda *_: pytest.fail("a weight was read"))
    with pytest.raises(UserError) as caught:
        load(folder)
    for word in [*words, str(folder)]:
        assert word in str(caught.value)


def test_config_errors_name_the_folder(tmp_path: Path) -> None:
    folder = save(tiny(), tmp_path / "m")
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match=rf"{folder}: config.json names model_type 'gpt2'"):
        load(folder)


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="dtype is 'int3'"):
        load(save(tiny(), tmp_path / "m"), dtype="int3")
    with pytest.raises(UserError, match="dtype is 'int3'"):
        save(tiny(), tmp_path / "n", dtype="int3")
    assert not (tmp_path / "n").exists()


MEASURE = """
import sys, torch
from endside.formats.hf import load
def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
before = status("VmRSS")
model = load(sys.argv[1], dtype=sys.argv[2])
peak = status("VmHWM") - before
print(peak, sum(p.numel() * p.element_size() for p in model.parameters()))
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of the 8B width in bfloat16, 200 MB."""
    config = replace(
        preset("minicpm4-8b"), num_hidden_layers=2, vocab_size=1000, intermediate_size=1024
    )
    with torch.device("meta"):
        model = Transformer(config)
    zeros = {
        name: torch.zeros(parameter.shape, dtype=torch.bfloat16)
        for name, parameter in model.named_parameters()
    }
    model.load_state_dict(zeros, assign=True)
    return save(model, tmp_path_factory.mktemp("wide") / "m")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize(("dtype", "bound"), [("auto", 0.2), ("float32", 1.3)])
def test_loading_is_small_in_memory(dtype: str, bound: float, wide: Path) -> None:
    """Peak growth over the weights' size: mapped it is next to none, converted one tensor more."""
    out = subprocess.run(
        [sys.executable, "-c", MEASURE, str(wide), dtype],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    peak, size = map(int, out.stdout.split())
    assert size > (4e8 if dtype == "float32" else 2e8)
    assert peak < bound * size, f"peak {peak / size:.2f} x the weights"


def test_loading_imports_no_compiler(tmp_path: Path) -> None:
    """A draw on the meta device would pull in torch._dynamo: six seconds and 150 MB."""
    folder = save(tiny(), tmp_path / "m")
    code = "import sys; from endside.formats.hf import load; load(sys.argv[1]);" + (
        "print('torch._dynamo' in sys.modules)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(folder)], check=True, capture_output=True, text=True
    )
    assert out.stdout.strip() == "False"
