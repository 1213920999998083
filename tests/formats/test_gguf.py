"""GGUF against the `gguf` package: the same tensors in its files and in ours."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from endside.errors import UserError
from endside.formats import gguf_types
from endside.formats.convert import convert
from endside.formats.gguf import gguf_name, head_order, open_gguf
from endside.formats.gguf_file import GgufSource, f32, i32, read_gguf, u32, write_gguf
from endside.formats.hf import save
from endside.formats.source import open_source, state_dict
from endside.formats.weights import to_float
from endside.model.batch import Batch
from endside.model.presets import preset
from endside.model.transformer import Transformer
from endside.quant.pack import QuantizedLinear, round_to_nearest

gguf = pytest.importorskip("gguf")
Kind = gguf.GGMLQuantizationType
SCALES_AT = {"Q4_0": [0], "Q8_0": [0], "Q4_K": [0, 2], "Q6_K": [208], "TQ1_0": [52], "TQ2_0": [64]}


def random_blocks(name: str, rows: int, blocks: int, seed: int = 0) -> np.ndarray:
    """Random bytes of a type, with finite scales and possible codes."""
    kind, rng = gguf_types.TYPES[name], np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows * blocks, kind.bytes), dtype=np.uint8)
    if name == "TQ2_0":
        raw[:, :64] = (rng.integers(0, 3, (rows * blocks, 64, 4)) << [0, 2, 4, 6]).sum(-1)
    for at in SCALES_AT[name]:
        scales = rng.normal(size=(rows * blocks, 1)).astype(np.float16)
        raw[:, at : at + 2] = scales.view(np.uint8)
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("name", sorted(SCALES_AT))
def test_blocks_are_read_as_the_package_reads_them(name: str) -> None:
    """Bit for bit, in several chunks too."""
    raw = random_blocks(name, 5, 3)
    want = gguf.quants.dequantize(raw, Kind[name])
    columns = 3 * gguf_types.TYPES[name].block
    got = to_float(gguf_types.decode(raw.reshape(-1), name, 5, columns))
    assert np.array_equal(got, want)
    if name in ("Q4_K", "Q6_K"):
        chunk, gguf_types.CHUNK = gguf_types.CHUNK, 4
        try:
            again = gguf_types.decode(raw.reshape(-1), name, 5, columns)
        finally:
            gguf_types.CHUNK = chunk
        assert np.array_equal(again, want)


@pytest.mark.parametrize("name", ["F16", "BF16", "Q4_0", "Q8_0"])
def test_floats_are_rounded_as_the_package_rounds(name: str) -> None:
    """The reference quantizers, halfway cases included."""
    rng = np.random.default_rng(0)
    weights = (rng.normal(size=(16, 96)) * 10.0 ** rng.integers(-4, 3, (16, 1))).astype(np.float32)
    weights[3] = 0
    weights[5, :32] = np.linspace(-8, 7.5, 32)
    weights[6, :32] = np.arange(-127, 127, 8)[:32] + 0.5
    want = gguf.quants.quantize(weights, Kind[name])
    got = gguf_types.encode_floats(weights, name)
    assert np.array_equal(got.reshape(-1), np.ascontiguousarray(want).view(np.uint8).reshape(-1))


@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0", "Q4_0", "Q2_0"])
@pytest.mark.parametrize("bf16", [False, True])
def test_ternary_codes_are_kept(name: str, bf16: bool) -> None:
    """Written from codes; read by the package and by us as the same numbers."""
    rng = np.random.default_rng(1)
    scale = np.repeat(np.float32(2.0) ** rng.integers(-6, 3, (7, 2)), 256, axis=1)
    weights = rng.integers(-1, 2, (7, 512)).astype(np.float32) * scale * np.float32(1.5)
    linear = round_to_nearest(weights, "ternary", 128, bf16=bf16)
    raw = gguf_types.encode_codes(linear, name)
    assert raw is not None
    back = gguf_types.decode(raw.reshape(-1), name, 7, 512)
    assert isinstance(back, QuantizedLinear) and np.array_equal(back.dequantize(), weights)
    assert back.kind == ("int4" if name == "Q4_0" else "ternary") and back.group <= 128
    if name != "Q2_0":
        assert np.array_equal(gguf.quants.dequantize(raw.reshape(7, -1), Kind[name]), weights)
    if name.startswith("TQ"):
        assert np.array_equal(
            gguf.quants.quantize(weights, Kind[name]).reshape(-1), raw.reshape(-1)
        )


def test_codes_that_do_not_fit_are_not_written() -> None:
    """Another scale inside a block, zeros of its own, a scale that float16 lacks."""
    rng = np.random.default_rng(2)
    weights = rng.normal(size=(4, 256)).astype(np.float32)
    assert gguf_types.encode_codes(round_to_nearest(weights, "ternary", 128), "TQ2_0") is None
    assert gguf_types.encode_codes(round_to_nearest(weights, "int4", 16), "Q4_0") is None
    asymmetric = round_to_nearest(weights, "int4", 32, symmetric=False)
    assert gguf_types.encode_codes(asymmetric, "Q4_0") is None
    tiny = round_to_nearest(weights * np.float32(1e-9), "int4", 32, bf16=True)
    assert gguf_types.encode_codes(tiny, "Q4_0") is None
    assert (
        gguf_types.encode_codes(round_to_nearest(weights, "int4", 32, bf16=True), "Q4_0")
        is not None
    )


def test_two_bits_with_all_four_codes() -> None:
    """Q2_0's fourth code is +2 d: read as int4, the same numbers."""
    raw = np.zeros((3, 18), np.uint8)
    raw[:, :2] = np.array([[0.5], [-2], [3]], np.float16).view(np.uint8)
    raw[:, 2:] = 0b11_10_01_00
    got = gguf_types.decode(raw.reshape(-1), "Q2_0", 3, 64)
    assert isinstance(got, QuantizedLinear) and got.kind == "int4"
    want = np.array([[0.5], [-2], [3]], np.float32) * np.tile([-1, 0, 1, 2], 16)
    assert np.array_equal(got.dequantize(), want)


@pytest.mark.parametrize("fork", [False, True])
def test_the_two_layouts_of_type_42(tmp_path: Path, fork: bool) -> None:
    """64 weights in 18 bytes or 128 in 34: the offsets tell."""
    block, size = (128, 34) if fork else (64, 18)
    rng = np.random.default_rng(0)
    parts = []
    for rows in (3, 5):
        raw = rng.integers(0, 256, (rows * 384 // block, size), dtype=np.uint8)
        raw[:, :2] = np.float16(0.5).reshape(1).view(np.uint8)
        parts.append((rows, raw))
    head = b"GGUF" + struct.pack("<IQQ", 3, 2, 0)
    offset = 0
    for index, (rows, raw) in enumerate(parts):
        head += struct.pack("<Q1sIQQIQ", 1, b"ab"[index : index + 1], 2, 384, rows, 42, offset)
        offset += -(-raw.size // 32) * 32
    body = b"".join(raw.tobytes() + b"\0" * (-raw.size % 32) for _, raw in parts)
    path = tmp_path / "x.gguf"
    path.write_bytes(head + b"\0" * (-len(head) % 32) + body)
    file = read_gguf(path)
    for name, (rows, raw) in zip("ab", parts):
        tensor = file.tensors[name]
        assert tensor.kind == ("Q2_0/128" if fork else "Q2_0") and tensor.nbytes == raw.size
        value = gguf_types.decode(file.raw(name), tensor.kind, rows, 384)
        first = to_float(value)[0, :4] / 0.5 + 1
        byte = int(raw[0, 2])
        assert first.tolist() == [byte & 3, byte >> 2 & 3, byte >> 4 & 3, byte >> 6]


def tiny(tmp_path: Path, *, llama: bool = False) -> Path:
    """A small model whose every scale bites, as a float16 folder."""
    model = Transformer(preset("tiny"))
    model.init_weights(torch.Generator().manual_seed(4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
    folder = save(model, tmp_path / "hf", dtype="float16")
    if llama:
        return convert(folder, tmp_path / "llama", to="llama", dtype="float32").destination
    return folder


@pytest.mark.parametrize("llama", [False, True])
def test_our_files_in_the_package(tmp_path: Path, llama: bool) -> None:
    """Keys, types and tensors as the package reads them; query rows in the interleaved order."""
    folder = tiny(tmp_path, llama=llama)
    convert(folder, tmp_path / "x.gguf", to="gguf", type="auto")
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    arch = "llama" if llama else "minicpm"
    keys = {name: field.contents() for name, field in reader.fields.items()}
    assert keys["general.architecture"] == arch
    config = open_source(folder).config
    wanted = {
        "embedding_length": 48, "block_count": 2, "attention.head_count": 4,
        "attention.head_count_kv": 2, "attention.key_length": 16, "rope.dimension_count": 16,
        "feed_forward_length": 96, "context_length": 512, "rope.scaling.type": "longrope",
        "rope.scaling.original_context_length": 512,
    }  # fmt: skip
    if not llama:
        scales = {"embedding_scale": 3.0, "residual_scale": 1.4 / 2**0.5, "logit_scale": 3.0}
        for key, value in scales.items():
            assert keys[f"{arch}.{key}"] == pytest.approx(value, rel=1e-6)
    for key, value in wanted.items():
        assert keys[f"{arch}.{key}"] == value, key
    stored = {one.name: one for one in reader.tensors}
    assert np.array_equal(stored["rope_factors_long.weight"].data,
                          np.array(config.rope.long_factor, np.float32))  # fmt: skip
    for name, parameter in open_source(folder).parameters.items():
        weight = to_float(parameter.read())
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = len(weight) // 16
            weight = np.stack([weight[h * 16 + j * 8 + i] for h in range(heads) for i in range(8)
                               for j in range(2)])  # fmt: skip
        assert np.array_equal(stored[gguf_name(name)].data.astype(np.float32), weight), name
    again = open_gguf(tmp_path / "x.gguf")
    # the amplitude of 1, which a fold writes out, is what no key means
    rope = replace(config.rope, factor=None, amplitude=None)
    assert again.config == replace(config, rope=rope)
    assert again.layout == "gguf" and again.ignored == ()


def test_their_files_here(tmp_path: Path) -> None:
    """A file by the package's writer, with the permutation and quantizers of its own."""
    folder = tiny(tmp_path)
    source = open_source(folder)
    config = source.config
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "minicpm")
    writer.add_context_length(512)
    writer.add_embedding_length(48)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
    writer.add_rope_scaling_orig_ctx_len(512)
    writer.add_embedding_scale(3.0)
    writer.add_residual_scale(1.4 / 2**0.5)
    writer.add_logit_scale(3.0)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(1)
    factors = np.array(config.rope.long_factor, np.float32)
    writer.add_tensor("rope_factors_long.weight", factors)
    writer.add_tensor("rope_factors_short.weight", factors)
    want = {}
    for index, (name, parameter) in enumerate(source.parameters.items()):
        weight = to_float(parameter.read())
        heads = {"q_proj.weight": 4, "k_proj.weight": 2}.get(name.rpartition("self_attn.")[2])
        stored = weight
        if heads:
            stored = weight.reshape(heads, 2, 8, -1).swapaxes(1, 2).reshape(weight.shape)
        kind = ("F32", "F16", "BF16")[index % 3] if weight.ndim == 2 else "F32"
        kind = "Q8_0" if weight.shape[-1] == 96 else kind
        raw = gguf.quants.quantize(stored, Kind[kind])
        writer.add_tensor(gguf_name(name), raw, raw_dtype=Kind[kind])
        rounded = gguf.quants.dequantize(raw, Kind[kind]).reshape(weight.shape)
        if heads:
            rounded = rounded.reshape(heads, 8, 2, -1).swapaxes(1, 2).reshape(weight.shape)
        want[name] = rounded
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    got = open_gguf(tmp_path / "x.gguf")
    assert got.config == config
    assert {p.stored for p in got.parameters.values()} >= {"F32", "F16", "BF16", "Q8_0"}
    for name, parameter in got.parameters.items():
        assert np.array_equal(to_float(parameter.read()), want[name]), name


def test_logits_survive(tmp_path: Path) -> None:
    """float16 folder -> F16 file -> model: the same function, bit for bit."""
    folder = tiny(tmp_path)
    convert(folder, tmp_path / "x.gguf", to="gguf")
    tokens = Batch(torch.arange(2, 300, 5)[None])
    found = []
    for path in (folder, tmp_path / "x.gguf"):
        source = open_source(path)
        model = Transformer(source.config)
        model.load_state_dict(state_dict(source, torch.float32, "cpu"))
        with torch.inference_mode():
            found.append(model.logits(model(tokens)))
    assert torch.equal(*found)


def test_head_order_is_the_interleaving() -> None:
    assert head_order(2, 6).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_container_round_trip(tmp_path: Path) -> None:
    """Every type of value that we write, as the package and as we read it."""
    keys = {
        "a.text": "héllo \U0001f600", "a.flag": True, "a.count": u32(7), "a.minus": i32(-7),
        "a.real": f32(0.1), "a.texts": ["x", "", "ß"], "a.reals": f32([0.5, -1.5]),
        "a.numbers": i32([1, -2, 3]),
    }  # fmt: skip
    data = np.arange(96, dtype=np.float32)
    tensors = {"t": GgufSource("F32", (4, 24), lambda: data.view(np.uint8)),
               "one": GgufSource("F32", (1,), lambda: data[:1].view(np.uint8))}  # fmt: skip
    write_gguf(tmp_path / "x.gguf", keys, tensors, overwrite=False)
    theirs = gguf.GGUFReader(tmp_path / "x.gguf")
    ours = read_gguf(tmp_path / "x.gguf")
    assert theirs.fields["a.texts"].contents() == ["x", "", "ß"] == ours.keys["a.texts"]
    assert theirs.fields["a.text"].contents() == keys["a.text"] == ours.keys["a.text"]
    assert theirs.fields["a.reals"].contents() == [0.5, -1.5] == ours.keys["a.reals"].tolist()
    assert ours.keys["a.numbers"].tolist() == [1, -2, 3] and ours.keys["a.minus"] == -7
    assert ours.keys["a.flag"] is True and ours.keys["a.count"] == 7
    assert np.float32(0.1) == ours.keys["a.real"] == theirs.fields["a.real"].contents()
    assert [one.name for one in theirs.tensors] == ["t", "one"]
    assert np.array_equal(theirs.tensors[0].data, data.reshape(4, 24))
    assert np.array_equal(ours.raw("t").view("<f4"), data) and ours.raw("one").size == 4
    with pytest.raises(UserError, match="exists: give a new name"):
        write_gguf(tmp_path / "x.gguf", keys, tensors, overwrite=False)
    assert [file.name for file in tmp_path.iterdir()] == ["x.gguf"]


def test_what_is_not_read_is_named(tmp_path: Path) -> None:
    for name, content, words in [
        ("empty", b"", "is no GGUF file"),
        ("other", b"GGML" + bytes(99), "is no GGUF file"),
        ("old", b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        ("big", b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "little-endian"),
        ("none", b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "architecture None"),
        ("many", b"GGUF" + struct.pack("<IQQ", 3, 1 << 63, 0), "more than the"),
    ]:
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(content)
        with pytest.raises(UserError, match=words):
            open_gguf(path)
    with pytest.raises(UserError, match="cannot read"):
        open_gguf(tmp_path / "absent.gguf")


def container(
    infos: list[tuple[bytes, tuple[int, ...], int, int]], *, keys: bytes = b"", count: int = 0,
    data: int = 256,
) -> bytes:  # fmt: skip
    """A file of (name, sizes, type, offset) tensors, with raw keys, and data of zeros."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(infos), count) + keys
    for name, sizes, kind, offset in infos:
        head += struct.pack("<Q", len(name)) + name
        head += struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)
    return head + bytes(-len(head) % 32) + bytes(data)


def alignment(value: int) -> bytes:
    name = b"general.alignment"
    return struct.pack("<Q", len(name)) + name + struct.pack("<II", 4, value)


F32, Q8 = 0, 8
HOSTILE = {
    "overlap": (container([(b"a", (16,), F32, 0), (b"b", (16,), F32, 32)]), "overlaps another"),
    "same place": (container([(b"a", (16,), F32, 0), (b"b", (16,), F32, 0)]), "overlaps another"),
    "not aligned": (container([(b"a", (4,), F32, 8)]), "is not aligned"),
    "past the end": (container([(b"a", (16,), F32, 224)]), "ends at byte"),
    "far away": (container([(b"a", (4,), F32, 2**64 - 32)]), "ends at byte"),
    "huge": (container([(b"a", (2**63, 2), F32, 0)]), "ends at byte"),
    "product wraps": (container([(b"a", (2**32, 2**32), F32, 0)]), "ends at byte"),
    "empty": (container([(b"a", (0,), F32, 0)]), "does not divide"),
    "broken block": (container([(b"a", (33,), Q8, 0)]), "does not divide in blocks of Q8_0"),
    "no dimension": (container([(b"a", (), F32, 0)]), "has 0 dimensions"),
    "five": (container([(b"a", (1,) * 5, F32, 0)]), "has 5 dimensions"),
    "twice": (container([(b"a", (4,), F32, 0), (b"a", (4,), F32, 32)]), "'a' is there twice"),
    "other type": (container([(b"a", (256,), 11, 0)]), "has type Q3_K, which is not read"),
    "no type": (container([(b"a", (256,), 999, 0)]), "has type 999, which is not read"),
    "key twice": (container([], keys=alignment(32) * 2, count=2), "is there twice"),
    "alignment 24": (container([], keys=alignment(24), count=1), "no power of two"),
    "alignment 2^31": (container([], keys=alignment(1 << 31), count=1), "no power of two"),
    "cut": (container([(b"a", (16,), F32, 0)])[:50], "needs 8 bytes at byte"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_containers(tmp_path: Path, name: str) -> None:
    content, words = HOSTILE[name]
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_gguf(path)


def test_the_hostile_ones_are_otherwise_right(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(container([(b"b", (16,), F32, 64), (b"a", (4, 4), F32, 0)]))
    assert {name: one.shape for name, one in read_gguf(path).tensors.items()} == {
        "a": (4, 4),
        "b": (16,),
    }
    path.write_bytes(container([], keys=alignment(64), count=1))
    assert read_gguf(path).keys == {"general.alignment": 64}
