"""Hostile files for every reader: a seed that is right, damaged at random, must end in a UserError.

    python tests/formats/fuzz.py --seconds 600 [--target gguf]

Each case takes a valid small model (`seeds`), and either changes values where the format has them
(keys and tables of GGUF, JSON headers, config.json: huge counts, negative sizes, other types) or
its bytes (flipped, overwritten by counts such as 2^63, cut, repeated). The reader then opens it and
unpacks every parameter. It may succeed, since many damages are harmless; it may say what is wrong;
anything else is a defect: another exception, more than a few seconds, or memory out of proportion.

Cases are drawn by Hypothesis, which shrinks what it finds. `test_fuzz.py` runs some of each target.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import resource
import signal
import struct
import sys
import tempfile
import time
import tracemalloc
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from endside import gguf_tokenizer
from endside.checkpoint import Checkpoint
from endside.errors import UserError
from endside.formats import draft_head
from endside.formats.gguf_file import GgufSource, Typed, write_gguf
from endside.formats.gguf_folder import open_checkpoint
from endside.formats.hf_config import read_config
from endside.formats.source import open_source
from endside.formats.weights import to_float
from endside.tokenizer import Tokenizer

Files = dict[str, bytes]
DRAFTS = ("eagle2", "eagle3", "eagle2-int4")
TARGETS = ("plain", "endside", "gptq", "awq", "marlin", "gguf", "gguf-keys", "headers", "configs",
           *DRAFTS)  # fmt: skip
SECONDS = 5  # a case may take, with tracing and a busy machine
SLACK, PER_BYTE = 24 << 20, 64  # bytes of memory: fixed, and for each byte of the files
COUNTS = (0, 1, 2, 3, 7, 8, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**48, 2**62, 2**63 - 1,
          2**63, 2**64 - 32, 2**64 - 1)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 31, 10**6, 2**31, 2**40, 2**63, 2**64, 10**30, 10**400, 0.0,
    -1.5, 1e308, float("nan"), float("inf"), "", "x", "4", [], [1], [2**63, 2**63], [-1], ["a"],
    [[]], {},
    {"a": 1}, {"rope_type": "longrope"}, {"type": "yarn"}, "longrope", "gptq", "int4", [0] * 300,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Files of a damaged model and what to open among them."""

    files: Files
    name: str  # "" for the folder itself

    def __repr__(self) -> str:
        return f"Case({ {name: len(content) for name, content in self.files.items()} })"


class TooSlow(BaseException):
    """A reader did not come back."""


@contextmanager
def limits(size: int) -> Any:
    """Raise TooSlow after some seconds, and AssertionError when too much memory was held."""

    def late(*_: object) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
        assert peak < SLACK + PER_BYTE * size, f"{peak} bytes held for files of {size}"
    finally:
        tracemalloc.stop()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(case: Case) -> bool:
    """Read everything of a case; whether it was accepted. Raises for anything but a UserError."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, content in case.files.items():
            (folder / file).write_bytes(content)
        with limits(sum(map(len, case.files.values()))), warnings.catch_warnings():
            # numbers that overflow are a matter of the model, not of the reader
            warnings.simplefilter("ignore", RuntimeWarning)
            try:
                _read(folder / case.name)
            except UserError as error:
                assert 10 < len(str(error)) < 3000, f"no sentence: {error!r:.200}"
                return False
        return True


def _read(path: Path) -> None:
    if (path / draft_head.RANKING).exists():
        head = draft_head.read(Checkpoint.open(path), 40)
        sum(float(one.sum()) for one in head.tensors.values())
        return
    source = open_source(path)
    for parameter in source.parameters.values():
        value = to_float(parameter.read())
        assert value.shape == parameter.shape, f"{value.shape} is not {parameter.shape}"
        value.sum()
    if path.suffix == ".gguf":
        checkpoint = open_checkpoint(path, gguf_tokenizer)
        assert read_config(checkpoint) == source.config, "the folder beside it tells another shape"
        if (checkpoint.folder / "tokenizer.json").exists():
            Tokenizer.load(checkpoint.folder).encode("a b")


# ---- seeds -------------------------------------------------------------------------------------


def _config() -> dict[str, Any]:
    """A one-layer MiniCPM that every low-bit layout can cut: widths of 64, groups of 32."""
    return {
        "architectures": ["MiniCPMForCausalLM"], "model_type": "minicpm", "vocab_size": 40,
        "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 64,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "tie_word_embeddings": False, "rope_theta": 10000.0,
        "rope_scaling": {"rope_type": "longrope", "original_max_position_embeddings": 128,
                         "long_factor": [1.5] * 16, "short_factor": [1.0] * 16},
        "bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0, "torch_dtype": "float16",
        "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 16,
    }  # fmt: skip


LINEARS = {
    "self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64), "mlp.gate_proj": (64, 64), "mlp.up_proj": (64, 64),
    "mlp.down_proj": (64, 64),
}  # fmt: skip
BLOCKS: dict[str, dict[str, Any]] = {
    "endside": {"quant_method": "endside", "bits": 2, "group_size": 32, "sym": True,
                "kind": "ternary"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": False,
             "checkpoint_format": "gptq"},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"},
    "marlin": {"quant_method": "gptq", "bits": 4, "group_size": 32},
}  # fmt: skip


def _outer(rng: np.random.Generator) -> dict[str, np.ndarray]:
    half = np.float16
    return {
        "model.embed_tokens.weight": rng.normal(size=(40, 64)).astype(half),
        "model.layers.0.input_layernorm.weight": np.ones(64, half),
        "model.layers.0.post_attention_layernorm.weight": np.ones(64, half),
        "model.norm.weight": np.ones(64, half),
        "lm_head.weight": rng.normal(size=(40, 64)).astype(half),
    }


def _linear(kind: str, base: str, shape: tuple[int, int], rng: np.random.Generator) -> dict:
    """The tensors of one linear with random codes."""
    rows, columns = shape
    groups = columns // 32
    scales = rng.uniform(0.01, 0.1, (groups, rows)).astype(np.float16)

    def words(*size: int) -> np.ndarray:
        return rng.integers(-(2**31), 2**31, size).astype(np.int32)

    if kind == "plain":
        return {f"{base}.weight": rng.normal(size=shape).astype(np.float16)}
    if kind == "endside":
        codes = (rng.integers(0, 3, (rows, columns // 4, 4)) << [0, 2, 4, 6]).sum(-1)
        return {f"{base}.codes": codes.astype(np.uint8), f"{base}.scales": scales.T.copy()}
    if kind == "awq":
        return {f"{base}.qweight": words(columns, rows // 8), f"{base}.scales": scales,
                f"{base}.qzeros": words(groups, rows // 8)}  # fmt: skip
    if kind == "marlin":
        return {f"{base}.qweight": words(columns // 16, 2 * rows), f"{base}.scales": scales}
    index = rng.permutation(np.repeat(np.arange(groups), 32)).astype(np.int32)
    return {f"{base}.qweight": words(columns // 8, rows), f"{base}.scales": scales,
            f"{base}.qzeros": words(groups, rows // 8), f"{base}.g_idx": index}  # fmt: skip


@cache
def tensors(kind: str) -> dict[str, np.ndarray]:
    """The arrays of a valid folder."""
    rng = np.random.default_rng(0)
    found = _outer(rng)
    linears = dict(LINEARS)
    if kind == "marlin":
        for part in ("q_proj", "k_proj", "v_proj"):
            del linears[f"self_attn.{part}"]
        del linears["mlp.gate_proj"], linears["mlp.up_proj"]
        linears |= {"self_attn.qkv_proj": (128, 64), "mlp.gate_up_proj": (128, 64)}
    for name, shape in linears.items():
        found |= _linear(kind, f"model.layers.0.{name}", shape, rng)
    return found


SAFE = {"<f2": "F16", "<f4": "F32", "<i4": "I32", "|u1": "U8"}


def header(arrays: dict[str, np.ndarray]) -> tuple[dict[str, Any], bytes]:
    """The JSON header of a safetensors file and its data."""
    table: dict[str, Any] = {}
    data = b""
    for name, array in arrays.items():
        raw = np.ascontiguousarray(array).tobytes()
        table[name] = {"dtype": SAFE[array.dtype.str], "shape": list(array.shape),
                       "data_offsets": [len(data), len(data) + len(raw)]}  # fmt: skip
        data += raw
    return table, data


def safetensors(table: Any, data: bytes) -> bytes:
    """The bytes of a safetensors file."""
    raw = json.dumps(table).encode()
    return struct.pack("<Q", len(raw)) + raw + data


@cache
def draft(kind: str) -> Files:
    """A valid draft head: in floats, or EAGLE-2 as CPM.cu packs it."""
    rng = np.random.default_rng(0)
    half, wide = np.float16, kind == "eagle3"
    layer, taken = "midlayer." if wide else "layers.0.", 128 if wide else 64
    found = {f"{layer}post_attention_layernorm.weight": np.ones(64, half)}
    if kind == "eagle2-int4":
        packed = {"self_attn.qkv_proj": (128, 64), "self_attn.o_proj": (64, 64),
                  "mlp.gate_up_proj": (128, 64), "mlp.down_proj": (64, 64)}  # fmt: skip
        for name, shape in {**{layer + one: size for one, size in packed.items()},
                            "fc": (128, 64)}.items():  # fmt: skip
            found |= _linear("marlin", name, shape, rng)
    else:
        for name, (rows, columns) in LINEARS.items():
            width = taken if name.endswith(("q_proj", "k_proj", "v_proj")) else columns
            found[f"{layer}{name}.weight"] = rng.normal(size=(rows, width)).astype(half)
        found["fc.weight"] = rng.normal(size=(64, 192 if wide else 128)).astype(half)
    if wide:
        found |= {f"{layer}{one}.weight": np.ones(64, half)
                  for one in ("input_layernorm", "hidden_norm")}  # fmt: skip
        found |= {"norm.weight": np.ones(64, half), "d2t": np.arange(20, dtype=np.int32),
                  "lm_head.weight": rng.normal(size=(20, 64)).astype(half)}  # fmt: skip
    return {"config.json": json.dumps(_config()).encode(),
            "model.safetensors": safetensors(*header(found)),
            draft_head.RANKING: draft_head.ranking_bytes(np.arange(20))}  # fmt: skip


@cache
def folder(kind: str) -> Files:
    """A valid folder in a layout."""
    config = _config() | ({"quantization_config": BLOCKS[kind]} if kind in BLOCKS else {})
    return {"config.json": json.dumps(config).encode(),
            "model.safetensors": safetensors(*header(tensors(kind)))}  # fmt: skip


@cache
def gguf_parts() -> tuple[dict[str, Any], dict[str, GgufSource]]:
    """Keys and tensors of a valid GGUF with a tokenizer, quantized types among the tensors."""
    own = {
        "context_length": 128, "embedding_length": 64, "block_count": 1, "feed_forward_length": 64,
        "attention.head_count": 2, "attention.head_count_kv": 1, "attention.key_length": 32,
        "attention.value_length": 32, "rope.dimension_count": 32,
        "rope.scaling.original_context_length": 128,
    }  # fmt: skip
    keys: dict[str, Any] = {"general.architecture": "minicpm"}
    keys |= {f"minicpm.{key}": Typed(4, value) for key, value in own.items()}
    keys |= {f"minicpm.{key}": Typed(6, value) for key, value in {
        "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 1e4, "embedding_scale": 12.0,
        "residual_scale": 1.4, "logit_scale": 4.0}.items()}  # fmt: skip
    pieces = ["<unk>", "<s>", "</s>", "<end>", "\u2581", *"abcdefghij", "ab", "\u2581ab", "abc"]
    pieces += [f"p{i}" for i in range(40 - len(pieces))]
    keys |= {
        "minicpm.rope.scaling.type": "longrope", "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": Typed(6, [-float(i) for i in range(40)]),
        "tokenizer.ggml.token_type": Typed(5, [2, 3, 3, 4] + [1] * 36),
        "tokenizer.ggml.bos_token_id": Typed(4, 1), "tokenizer.ggml.eos_token_id": Typed(4, 2),
        "tokenizer.ggml.add_bos_token": True, "tokenizer.chat_template": "{{ messages }}",
    }  # fmt: skip
    return keys, _gguf_tensors()


def _gguf_tensors() -> dict[str, GgufSource]:
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd": (40, 64), "output": (40, 64), "blk.0.attn_q": (64, 64),
        "blk.0.attn_k": (32, 64), "blk.0.attn_v": (32, 64), "blk.0.attn_output": (64, 64),
        "blk.0.ffn_gate": (64, 64), "blk.0.ffn_up": (64, 64), "blk.0.ffn_down": (64, 64),
    }  # fmt: skip
    kinds = ("F16", "Q8_0", "Q4_0", "Q2_0", "BF16", "F32")
    sizes = {"F16": (1, 2), "BF16": (1, 2), "F32": (1, 4), "Q8_0": (32, 34), "Q4_0": (32, 18),
             "Q2_0": (64, 18)}  # fmt: skip
    found: dict[str, GgufSource] = {}

    def add(name: str, kind: str, shape: tuple[int, ...], raw: np.ndarray) -> None:
        found[f"{name}.weight"] = GgufSource(kind, shape, lambda: raw)

    for index, (name, shape) in enumerate(shapes.items()):
        kind = kinds[index % len(kinds)]
        block, size = sizes[kind]
        # small bytes keep every number finite
        raw = rng.integers(0, 60, shape[0] * shape[1] // block * size).astype(np.uint8)
        add(name, kind, shape, raw)
    ones = np.ones(64, np.float32).view(np.uint8)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        add(name, "F32", (64,), ones)
    for name in ("rope_factors_long", "rope_factors_short"):
        add(name, "F32", (16,), ones[:64])
    return found


def gguf_bytes(keys: dict[str, Any], parts: dict[str, GgufSource]) -> bytes:
    """The bytes of a GGUF file."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "x.gguf"
        write_gguf(path, keys, parts, overwrite=False)
        return path.read_bytes()


@cache
def gguf_seed() -> bytes:
    """The bytes of the valid GGUF."""
    return gguf_bytes(*gguf_parts())


# ---- damage ------------------------------------------------------------------------------------


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """The content with one to four damages: in its head, its first pages, or anywhere."""
    raw = bytearray(content)
    span = draw(st.sampled_from((64, 1024, 4096, len(raw), len(raw))))
    for _ in range(draw(st.integers(1, 4))):
        # Hypothesis prefers small numbers; mixed, they fall anywhere in the span
        at = draw(st.integers(0, 2**32)) * 2654435761 % 2**32 % max(1, min(span, len(raw)))
        how = draw(st.sampled_from(("flip", "byte", "count", "count4", "cut", "drop", "again")))
        if how == "flip" and raw:
            raw[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "byte" and raw:
            raw[at] = draw(st.integers(0, 255))
        elif how == "count":
            raw[at : at + 8] = struct.pack("<Q", draw(st.sampled_from(COUNTS)))
        elif how == "count4":
            raw[at : at + 4] = struct.pack("<I", draw(st.sampled_from(COUNTS)) & 0xFFFFFFFF)
        elif how == "cut":
            del raw[at:]
        else:
            piece = raw[at : at + draw(st.integers(1, 64))]
            raw[at : at + len(piece)] = b"" if how == "drop" else piece * 2
    return bytes(raw)


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with one to four of its parts replaced, removed or doubled."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 4))):
        spot, keys = value, list(value) if isinstance(value, dict) else list(range(len(value)))
        while keys:
            key = draw(st.sampled_from(keys))
            inner = spot[key]
            deeper = isinstance(inner, dict | list) and inner and draw(st.booleans())
            if not deeper:
                break
            spot, keys = inner, list(inner) if isinstance(inner, dict) else list(range(len(inner)))
        if not keys:
            break
        if draw(st.integers(0, 4)) == 0:
            del spot[key]
        else:
            spot[key] = copy.deepcopy(draw(st.sampled_from(VALUES)))
        if not isinstance(value, dict) or not value:
            break
    return value


@st.composite
def cases(draw: st.DrawFn, target: str) -> Case:
    """A damaged model for a target."""
    if target in ("gguf", "gguf-keys"):
        keys, parts = gguf_parts()
        if target == "gguf":
            return Case({"x.gguf": draw(damaged(gguf_seed()))}, "x.gguf")
        return Case({"x.gguf": draw(_other_keys(keys, parts))}, "x.gguf")
    if target == "configs":
        kind = draw(st.sampled_from(("plain", *BLOCKS)))
        config = _config() | ({"quantization_config": BLOCKS[kind]} if kind in BLOCKS else {})
        files = folder(kind)
        return Case({**files, "config.json": json.dumps(draw(changed(config))).encode()}, "")
    if target == "headers":
        kind = draw(st.sampled_from(("plain", *BLOCKS)))
        table, data = header(tensors(kind))
        weights = safetensors(draw(changed(table)), data)
        return Case({**folder(kind), "model.safetensors": weights}, "")
    files = draft(target) if target in DRAFTS else folder(target)
    name = draw(st.sampled_from(("model.safetensors", "model.safetensors", *sorted(files))))
    return Case({**files, name: draw(damaged(files[name]))}, "")


@st.composite
def _other_keys(draw: st.DrawFn, keys: dict[str, Any], parts: dict[str, GgufSource]) -> bytes:
    """A GGUF whose keys, types and shapes say something else."""
    keys, parts = dict(keys), dict(parts)
    for _ in range(draw(st.integers(1, 4))):
        name = draw(st.sampled_from(sorted(keys)))
        how = draw(st.integers(0, 5))
        if how == 0:
            del keys[name]
        elif how == 1:
            keys[name] = Typed(10, draw(st.sampled_from(COUNTS)))
        elif how == 2:
            keys[name] = Typed(
                12, draw(st.sampled_from((0.0, -1.0, 1e300, np.nan, np.inf, 1e-300)))
            )
        elif how == 3:
            keys[name] = draw(st.sampled_from(("", "x", "llama", "gpt2", "[" * 3000, "\ud800"[:0])))
        elif how == 4:
            keys[name] = draw(st.lists(st.text(max_size=4), max_size=40))
        else:
            keys[name] = Typed(5, draw(st.lists(st.integers(-3, 9), max_size=41)))
        if not keys:
            break
    if draw(st.booleans()):
        name = draw(st.sampled_from(sorted(parts)))
        shape = tuple(draw(st.lists(st.sampled_from((1, 16, 32, 64, 40)), min_size=1, max_size=3)))
        size = int(np.prod(shape)) * 4
        parts[name] = replace(parts[name], kind="F32", shape=shape,
                              read=lambda: np.zeros(size, np.uint8))  # fmt: skip
    return gguf_bytes(keys, parts)


def check(target: str) -> Callable[[int], dict[str, int]]:
    """A function that runs so many cases of a target and counts how they ended."""

    def go(examples: int) -> dict[str, int]:
        ended = {"accepted": 0, "refused": 0}

        @settings(max_examples=examples, deadline=None, database=None, print_blob=True,
                  suppress_health_check=list(HealthCheck))  # fmt: skip
        @given(cases(target))
        def one(case: Case) -> None:
            ended["accepted" if run(case) else "refused"] += 1

        one()
        return ended

    return go


def main() -> None:
    """Run targets in turn for a time, under a limit of memory for the whole process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--target", choices=TARGETS, action="append")
    flags = parser.parse_args()
    logging.disable(logging.WARNING)
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    targets = flags.target or list(TARGETS)
    total = {target: {"accepted": 0, "refused": 0} for target in targets}
    begin = time.monotonic()
    while time.monotonic() - begin < flags.seconds:
        for target in targets:
            if time.monotonic() - begin >= flags.seconds:
                break
            for how, count in check(target)(100).items():
                total[target][how] += count
            print(f"\r{time.monotonic() - begin:.0f} s {target:<10}", end="", file=sys.stderr)
    print(file=sys.stderr)
    for target, ended in total.items():
        print(f"{target:<10} {ended['refused']:>8} refused {ended['accepted']:>8} accepted")
    seconds = time.monotonic() - begin
    count = sum(sum(ended.values()) for ended in total.values())
    print(f"{count} cases in {seconds:.0f} s: nothing but UserError")


if __name__ == "__main__":
    main()
