"""MODEL in every form that is stored, as a user runs it: one command, one answer."""

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

from endside import LLM, cli, gguf_tokenizer, native
from endside.checkpoint import Checkpoint, write_folder
from endside.errors import UserError
from endside.formats import hf
from endside.formats.convert import convert
from endside.formats.hf_config import config_to_hf, hf_name, json_bytes
from endside.formats.source import open_source, state_dict
from endside.formats.weights import companions, fused_groups, is_linear, to_float
from endside.model.batch import Batch
from endside.model.presets import preset
from endside.model.transformer import Transformer
from endside.models import open_model
from endside.quant.pack import QuantizedLinear, round_to_nearest
from endside.shards import TensorSource
from endside.tokenizer import train_bpe

pytestmark = pytest.mark.skipif(not native.available_isas(), reason="no native core here")
PROMPT = "the quick"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose answer its weights decide clearly, widths that all layouts can cut."""
    place = tmp_path_factory.mktemp("models")
    train_bpe(["the quick brown fox jumps over the lazy dog. " * 40], 300).save(place / "text")
    config = replace(
        preset("tiny"), vocab_size=300, hidden_size=128, head_dim=16, intermediate_size=192,
        bos_token_id=0, eos_token_ids=(1,),
    )  # fmt: skip
    model = Transformer(config)
    model.init_weights(torch.Generator().manual_seed(7))
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return hf.save(model, place / "hf", dtype="float16", tokenizer_files=place / "text")


def _words(codes: np.ndarray, order: tuple[int, ...] = tuple(range(8))) -> np.ndarray:
    """Eight nibbles along the last axis into one int32."""
    parts = codes.reshape(*codes.shape[:-1], -1, 8)[..., order].astype(np.uint32)
    return (parts << np.arange(0, 32, 4, dtype=np.uint32)).sum(-1, dtype=np.uint32).view(np.int32)


def _folder(plain: Path, target: Path, block: dict, write: Callable) -> Path:
    """The plain folder with its linears as `write(base, int4 linear)` lays them out."""
    source, tensors = open_source(plain), {}
    for name, parameter in source.parameters.items():
        weights = to_float(parameter.read())
        arrays = {hf_name(name): weights.astype(np.float16)}
        if is_linear(name):
            linear = round_to_nearest(weights, "int4", 32)
            arrays = write(hf_name(name).removesuffix(".weight"), linear)
        for key, array in arrays.items():
            kind = {"int32": "I32", "float16": "F16"}[str(array.dtype)]
            tensors[key] = TensorSource(kind, array.shape, lambda array=array: array)
    config = {**config_to_hf(source.config, dtype="float16"), **block}
    files = {**companions(plain), "config.json": json_bytes(config)}
    return write_folder(target, tensors, files)


def _awq(plain: Path, target: Path) -> Path:
    """AutoAWQ's layout: eight outputs a word, in the order 0 2 4 6 1 3 5 7."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def write(base: str, linear: QuantizedLinear) -> dict[str, np.ndarray]:
        scales = np.ascontiguousarray(linear.scales.T)
        zeros = np.full(scales.shape, 8, np.uint8)
        return {f"{base}.qweight": _words(linear.codes.T, order), f"{base}.scales": scales,
                f"{base}.qzeros": _words(zeros, order)}  # fmt: skip

    block = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
    return _folder(plain, target, {"quantization_config": block}, write)


def _marlin(plain: Path, target: Path) -> Path:
    """CPM.cu's layout: fused along the outputs, tiles and scales in the kernel's order."""
    from endside.formats.marlin import scale_order, tile_order

    source = open_source(plain)
    linears = {name: round_to_nearest(to_float(one.read()), "int4", 32)
               for name, one in source.parameters.items() if is_linear(name)}  # fmt: skip
    groups = fused_groups(source.parameters)
    alone = [(name.removesuffix(".weight"), [name]) for name in linears
             if not any(name in parts for _, parts in groups)]  # fmt: skip
    tensors = {
        hf_name(name): to_float(one.read()).astype(np.float16)
        for name, one in source.parameters.items()
        if not is_linear(name)
    }
    for fused, parts in [*groups, *alone]:
        codes = np.concatenate([linears[part].codes for part in parts]).T
        scales = np.concatenate([linears[part].scales for part in parts]).T
        tall, wide = codes.shape[0] // 16, codes.shape[1] // 16
        tiles = codes.reshape(tall, 16, wide, 16).transpose(0, 2, 1, 3).reshape(-1, 1024)
        words = _words(tiles[:, tile_order()]).reshape(tall, -1)
        tensors[f"{hf_name(fused)}.qweight"] = words
        shuffled = scales.reshape(-1, 64)[:, scale_order(False)].reshape(scales.shape)
        tensors[f"{hf_name(fused)}.scales"] = np.ascontiguousarray(shuffled)
    kinds = {"int32": "I32", "float16": "F16"}
    sources = {
        name: TensorSource(kinds[str(array.dtype)], array.shape, lambda array=array: array)
        for name, array in tensors.items()
    }
    config = {**config_to_hf(source.config, dtype="float16")}
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    return write_folder(target, sources, {**companions(plain), "config.json": json_bytes(config)})


MAKERS: dict[str, Callable[[Path, Path], Path]] = {
    "awq": _awq,
    "marlin": _marlin,
    "gptq": lambda plain, target: _converted(plain, target, to="gptq", type="int4", group=32),
    "endside": lambda plain, target: _converted(plain, target, to="endside", type="int4", group=32),
    "int8": lambda plain, target: _converted(plain, target, to="endside", type="int8", group=64),
    "q4_0": lambda plain, target: _converted(plain, target, to="gguf", type="q4_0"),
    "q8_0": lambda plain, target: _converted(plain, target, to="gguf", type="q8_0"),
    "f16": lambda plain, target: _converted(plain, target, to="gguf", type="f16"),
    "hf": lambda plain, target: plain,
}


def _converted(plain: Path, target: Path, **options: object) -> Path:
    target = target.with_suffix(".gguf") if options["to"] == "gguf" else target
    return convert(plain, target, texts=gguf_tokenizer, **options).destination  # type: ignore[arg-type]


@pytest.mark.parametrize("form", MAKERS)
def test_run_and_inspect(
    plain: Path, tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The native answer's first token is the one that the unpacked weights decide on."""
    path = MAKERS[form](plain, tmp_path / form)
    source = open_source(path)
    model = Transformer(source.config)
    model.load_state_dict(state_dict(source, torch.float32, "cpu"))
    answers = {}
    for executor in ("native", "torch"):
        argv = ["run", str(path), PROMPT, "--json", "--max-tokens", "6", "--executor", executor,
                "--context", "64"]  # fmt: skip
        with pytest.raises(SystemExit) as left:
            cli.main(argv)
        out = capsys.readouterr().out
        assert not left.value.code
        answers[executor] = json.loads(out)
    prompt = LLM(path, executor="native", context=64).encode(PROMPT)
    with torch.inference_mode():
        want = int(model.logits(model(Batch(torch.tensor([prompt]))))[0, -1].argmax())
    assert answers["torch"]["token_ids"][0] == answers["native"]["token_ids"][0] == want
    assert answers["native"]["executor"] == "native"
    with pytest.raises(SystemExit) as left:
        cli.main(["inspect", str(path), "--json", "--context", "64"])
    report = json.loads(capsys.readouterr().out)
    assert not left.value.code and report["parameters"]["total"] > 200_000
    stored = {"hf": "none", "f16": "none", "int8": "int8-stored", "q8_0": "int8-stored"}
    assert report["executor"]["weights"].startswith(stored.get(form, "int4-stored"))
    if "stored" in report["executor"]["weights"]:
        assert any(f"group {64 if form == 'int8' else 32} " in step for step in report["steps"])


def test_four_bit_containers_of_the_same_codes_answer_alike(plain: Path, tmp_path: Path) -> None:
    """GPTQ, AWQ, Marlin and our own hold the same numbers, so every logit has the same bits."""
    logits = {
        form: LLM(MAKERS[form](plain, tmp_path / form), executor="native", context=64).logits(
            list(range(2, 60))
        )
        for form in ("endside", "gptq", "awq", "marlin")
    }
    for form in ("gptq", "awq", "marlin"):
        np.testing.assert_array_equal(logits[form], logits["endside"], err_msg=form)


def test_a_gguf_needs_no_torch(plain: Path, tmp_path: Path) -> None:
    """First from the file, then from what was kept of it."""
    path = _converted(plain, tmp_path / "m", to="gguf", type="q4_0")
    code = (
        "import sys\nfrom endside.cli import main\ntry:\n    main(['run', sys.argv[1], 'a', "
        "'--max-tokens', '2', '--executor', 'native'])\nfinally:\n"
        "    print('heavy', *[n for n in ('torch', 'transformers') if n in sys.modules])"
    )
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.splitlines()[-1] == "heavy", done


def test_what_open_model_gives(plain: Path, tmp_path: Path) -> None:
    assert open_model(plain) == Checkpoint.open(plain)
    for name, words in (("x.gguf", "does not exist"), ("x", "check the spelling")):
        with pytest.raises(UserError, match=words):
            open_model(tmp_path / name)
    (tmp_path / "y.gguf").write_bytes(b"GGUF and then nothing")
    with pytest.raises(UserError, match=r"y\.gguf"):
        LLM(tmp_path / "y.gguf")
