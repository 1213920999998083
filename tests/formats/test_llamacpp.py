"""Files written here, run by llama.cpp: the same distributions, and the same ids for the same text.

Needs llama.cpp's Python package: installed, or built from source by `bench/peer_llamacpp.py` into
the folder of peers, which is used from there.
"""

from __future__ import annotations

import os
import sys
import types
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from endside import gguf_tokenizer
from endside.formats import convert as conversion
from endside.formats.gguf import gguf_name, row_order
from endside.formats.hf import save
from endside.formats.source import open_source, state_dict
from endside.formats.weights import is_linear, to_float
from endside.model.batch import Batch
from endside.model.presets import preset
from endside.model.transformer import Transformer
from endside.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

PROBES = [
    "Hello, world!", "你好，世界！", "今天天气很好，我们去公园散步吧。", "こんにちは、元気ですか？",
    "안녕하세요 세계",
    "Привет, как дела?", "Γειά σου Κόσμε", "مرحبا بالعالم", "नमस्ते दुनिया",
    "Ça va? Où êtes-vous né(e)?", "Zürich – größer, übermäßig", "naïve café résumé",
    "  two  leading and   inner spaces ", "tabs\tand\nnew\n\nlines\r\n",
    "x = [i ** 2 for i in range(10)]", "def f(a: int) -> str:\n    return f'{a!r}'\n",
    "1234567890 3.14159 1e-5 0xFF", "<h2>title</h2><td>",
    "\U0001f600\U0001f1e8\U0001f1f3 emoji \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "aaaaaaaaaaaaaaaaaaaa", "\\frac{a}{b} \\alpha \\in \\mathbb{R}", "ᚠᛇᚻ᛫ᛒᛦᚦ", "a", " ",
    "\xa0nbsp\u3000wide", "ﬁ ligature Ⅷ ½",
]  # fmt: skip


def convert(source: Path, target: Path, **options: Any) -> conversion.ConvertReport:
    """As the command line does it, with the tokenizer."""
    return conversion.convert(source, target, texts=gguf_tokenizer, **options)


@pytest.fixture(scope="module")
def llama() -> Any:
    """The llama_cpp module; skips where there is none."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    peer = cache / "endside" / "peer-llamacpp"
    built = peer / "build" / "bin"
    if (built / "libllama.so").is_file() and "LLAMA_CPP_LIB_PATH" not in os.environ:
        os.environ["LLAMA_CPP_LIB_PATH"] = str(built)
        sys.path += [str(folder) for folder in peer.glob("llama_cpp_python-*") if folder.is_dir()]
    if find_spec("diskcache") is None:
        # a package for a cache on disk that nobody asks for here
        sys.modules.setdefault("diskcache", types.ModuleType("diskcache"))
    return pytest.importorskip(
        "llama_cpp", reason="no llama.cpp here: run bench/peer_llamacpp.py, or pip install it"
    )


@pytest.fixture(scope="module")
def published(test_data: Path) -> Path:
    """The folder of MiniCPM4's tokenizer."""
    return test_data / "minicpm4-8b"


@pytest.fixture(scope="module")
def folder(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random MiniCPM with the published vocabulary and logits of a trained model's size."""
    tiny = preset("tiny")
    factors = tuple(1.0 + i * i / 16 for i in range(16))
    config = replace(
        tiny, vocab_size=73448, hidden_size=256, head_dim=32, num_attention_heads=8,
        intermediate_size=512, bos_token_id=1, eos_token_ids=(2, 73440), pad_token_id=2,
        rope=replace(tiny.rope, long_factor=factors, short_factor=factors),
    )  # fmt: skip
    model = Transformer(config)
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.linspace(-0.3, 0.4, len(parameter)))
            elif name.startswith("lm_head"):
                parameter.mul_(30)
            elif "_proj" in name:
                parameter.mul_(3)
            parameter.copy_(parameter.half())
    place = tmp_path_factory.mktemp("model") / "hf"
    return save(model, place, dtype="float16", tokenizer_files=published)


@pytest.fixture(scope="module")
def ternary_folder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with its linears ternary, one scale a row."""
    source = open_source(folder)
    model = Transformer(source.config)
    model.load_state_dict(state_dict(source, torch.float32, "cpu"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.weight"):
                scale = parameter.abs().mean(-1, keepdim=True).half().float()
                parameter.copy_((parameter / scale).round().clamp(-1, 1) * scale)
    place = tmp_path_factory.mktemp("ternary") / "hf"
    return save(model, place, dtype="float16", tokenizer_files=folder)


def ours(path: Path, tokens: list[int]) -> np.ndarray:
    """Logits (T, V) of our model on the weights in a file, float32."""
    source = open_source(path)
    model = Transformer(source.config)
    model.load_state_dict(state_dict(source, torch.float32, "cpu"))
    with torch.inference_mode():
        return model.logits(model(Batch(torch.tensor([tokens])))).numpy()[0]


def theirs(llama: Any, path: Path, tokens: list[int]) -> np.ndarray:
    """Logits (T, V) of llama.cpp."""
    # keys and values in float32 (type 0), so that what differs is arithmetic and not the cache
    model = llama.Llama(model_path=str(path), n_ctx=256, logits_all=True, n_threads=1, type_k=0,
                        type_v=0, verbose=False)  # fmt: skip
    model.eval(tokens)
    return model.scores[: len(tokens)].copy()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


# The largest |difference| of a probability and KL divergence allowed. llama.cpp rounds activations
# to 16 bits before products with 16-bit weights, and to 8 bits in blocks before those with
# quantized weights; our reference keeps float32.
LIMITS = {"f32": (1e-4, 1e-8), "f16": (2e-3, 3e-5), "q8_0": (0.06, 0.02), "q4_0": (0.06, 0.02)}


@pytest.mark.parametrize("kind", LIMITS)
def test_the_same_distribution(llama: Any, folder: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.gguf"
    convert(folder, path, to="gguf", type=kind)
    tokens = [1, *map(int, np.random.default_rng(0).integers(3, 73440, 40))]
    want, got = log_softmax(ours(path, tokens)), log_softmax(theirs(llama, path, tokens))
    entropy = -(np.exp(want) * want).sum(-1).mean()
    assert entropy < 8, f"a flat distribution ({entropy}) would show nothing"
    apart = np.abs(np.exp(want) - np.exp(got)).max()
    divergence = (np.exp(want) * (want - got)).sum(-1).max()
    print(f"{kind}: entropy {entropy:.2f}, probability {apart:.2e}, divergence {divergence:.2e}")
    assert apart < LIMITS[kind][0] and divergence < LIMITS[kind][1]
    agree = (want.argmax(-1) == got.argmax(-1)).mean()
    assert agree == 1 if kind.startswith("f") else agree > 0.8


def test_lossless_ternary(llama: Any, ternary_folder: Path, tmp_path: Path) -> None:
    """TQ2_0, TQ1_0 and Q4_0 of the same ternary weights: all run, as our model within 8 bits."""
    tokens = [1, *map(int, np.random.default_rng(1).integers(3, 73440, 40))]
    for kind in ("tq2_0", "tq1_0", "q4_0"):
        path = tmp_path / f"{kind}.gguf"
        report = convert(ternary_folder, path, to="gguf", type=kind)
        assert report.loss.classes["attention"] == report.loss.classes["feed-forward"] == 0
        want, got = log_softmax(ours(path, tokens)), log_softmax(theirs(llama, path, tokens))
        divergence = (np.exp(want) * (want - got)).sum(-1).max()
        print(f"{kind}: divergence {divergence:.2e}")
        assert divergence < 2e-2


# Types of llama.cpp's own quantizer: the number of its file type, whether all matrices get the same
# type, the types that must then be in the file, and the largest relative rms error of a matrix.
# Ternary types are given ternary weights, which they must keep.
QUANTIZED = {
    "Q4_K_M": (15, False, {"Q4_K", "Q6_K"}, 0.1),
    "Q4_K": (14, True, {"Q4_K"}, 0.1),
    "Q6_K": (18, True, {"Q6_K"}, 0.03),
    "Q8_0": (7, True, {"Q8_0"}, 0.01),
    "Q4_0": (2, True, {"Q4_0"}, 0.12),
    "TQ1_0": (36, False, {"TQ1_0"}, 0),
    "TQ2_0": (37, False, {"TQ2_0"}, 0),
    "Q2_0": (41, False, {"Q2_0"}, 0),
}


@pytest.mark.parametrize("kind", QUANTIZED)
def test_files_of_its_own_quantizer(
    llama: Any, folder: Path, ternary_folder: Path, tmp_path: Path, kind: str
) -> None:
    """Opened here: near its origin, as the gguf package reads it, and as it runs there."""
    number, pure, expected, most = QUANTIZED[kind]
    plain, path = tmp_path / "f16.gguf", tmp_path / "quantized.gguf"
    convert(folder if most else ternary_folder, plain, to="gguf", type="f16")
    wanted = llama.llama_model_quantize_default_params()
    wanted.nthread, wanted.ftype, wanted.pure = 1, number, pure
    if llama.llama_model_quantize(str(plain).encode(), str(path).encode(), wanted):
        pytest.skip(f"this build of llama.cpp does not write {kind}")
    source, origin = open_source(path), open_source(plain)
    blocks = {name: one for name, one in source.parameters.items() if is_linear(name)}
    assert expected == {one.stored for one in blocks.values()}
    for name, parameter in blocks.items():
        before = to_float(origin.parameters[name].read()).astype(np.float64)
        gap = np.linalg.norm(to_float(parameter.read()) - before) / np.linalg.norm(before)
        assert gap <= most, f"{name} ({parameter.stored}): {gap:.3f}"
    if all(hasattr(gguf.GGMLQuantizationType, one) for one in expected):
        _as_the_package_reads(path)
    tokens = [1, *map(int, np.random.default_rng(2).integers(3, 73440, 40))]
    want, got = log_softmax(ours(path, tokens)), log_softmax(theirs(llama, path, tokens))
    divergence = (np.exp(want) * (want - got)).sum(-1).max()
    print(f"{kind}: divergence {divergence:.2e}")
    assert divergence < 3e-2


def _as_the_package_reads(path: Path) -> None:
    source = open_source(path)
    stored = {one.name: one for one in gguf.GGUFReader(path).tensors}
    for name, parameter in source.parameters.items():
        tensor, weights = stored[gguf_name(name)], to_float(parameter.read())
        truth = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(weights.shape)
        order = row_order(name, source.config)
        assert np.array_equal(weights if order is None else weights[order], truth), name


def test_the_same_ids(llama: Any, folder: Path, tmp_path: Path) -> None:
    """Many languages, white space, code and emoji; both from the file with real scores."""
    path = tmp_path / "x.gguf"
    report = convert(folder, path, to="gguf", type="q8_0")
    model = llama.Llama(model_path=str(path), vocab_only=True, verbose=False)
    tokenizer = Tokenizer.load(folder)
    different = {}
    for text in PROBES:
        got = model.tokenize(text.encode(), add_bos=True, special=False)
        want = tokenizer.encode(text, bos=True)
        if got != want:
            different[text] = (got, want)
    assert not different, different
    assert not any("score" in note for note in report.notes)


def test_ids_survive_our_own_reading(folder: Path, tmp_path: Path) -> None:
    """The tokenizer that our reader makes of the file encodes as the original."""
    convert(folder, tmp_path / "x.gguf", to="gguf", type="q8_0")
    back = convert(tmp_path / "x.gguf", tmp_path / "back", to="hf").destination
    before, after = Tokenizer.load(folder), Tokenizer.load(back)
    for text in PROBES:
        assert after.encode(text) == before.encode(text), text
        assert after.decode(after.encode(text)) == before.decode(before.encode(text))
    assert after.eos_ids == before.eos_ids and after.bos_id == before.bos_id
    assert after.chat_template == before.chat_template
    assert after.control_tokens == before.control_tokens
