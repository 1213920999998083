"""Between all formats: kept codes are kept, rounding is what was asked, and the report is true."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from endside.checkpoint import Checkpoint
from endside.errors import UserError
from endside.formats.convert import convert
from endside.formats.hf import load, save
from endside.formats.source import open_source, state_dict
from endside.formats.weights import Permuted, to_float
from endside.model.batch import Batch
from endside.model.config import ModelConfig
from endside.model.presets import preset
from endside.model.transformer import Transformer
from endside.quant.pack import QuantizedLinear, bf16_to_float, float_to_bf16, round_to_nearest

TOKENS = torch.arange(2, 300, 7)[None]


def shape(**changes: object) -> ModelConfig:
    """A MiniCPM whose every scale bites, with widths that all formats can cut in groups of 32."""
    tiny = preset("tiny")
    factors = tuple(1.0 + i / 8 for i in range(16))
    sizes: dict = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 192}
    rope = replace(tiny.rope, long_factor=factors, short_factor=factors)
    return replace(tiny, rope=rope, **{**sizes, **changes})


def write(folder: Path, *, dtype: str = "bfloat16", ternary: int = 0, **changes: object) -> Path:
    """A plain folder; ternary: the linears are fake-quantized in groups of that size."""
    model = Transformer(shape(**changes))
    model.init_weights(torch.Generator().manual_seed(1))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.linspace(-0.3, 0.4, len(parameter)))
            if ternary and name.endswith("_proj.weight"):
                parameter.copy_(fake_ternary(parameter, ternary))
    return save(model, folder, dtype=dtype)


def fake_ternary(weight: torch.Tensor, group: int) -> torch.Tensor:
    """s t with s in bfloat16, one per row and group, and no negative zeros."""
    blocks = weight.detach().unflatten(1, (-1, group))
    scale = blocks.abs().mean(-1, keepdim=True).bfloat16().float()
    t = (blocks / scale).round().clamp(-1, 1) + 0.0
    return (t * scale).flatten(1)


def logits(path: Path) -> torch.Tensor:
    """Of a fixed prompt, in float32, from weights that its reader unpacked."""
    source = open_source(path)
    model = Transformer(source.config)
    model.load_state_dict(state_dict(source, torch.float32, "cpu"))
    with torch.inference_mode():
        return model.logits(model(Batch(TOKENS)))


def weights(path: Path) -> dict[str, np.ndarray]:
    return {name: to_float(p.read()) for name, p in open_source(path).parameters.items()}


def test_ternary_survives_bit_for_bit(tmp_path: Path) -> None:
    """bfloat16 -> packed -> bfloat16: the same file content, tensor by tensor."""
    plain = write(tmp_path / "plain", ternary=64)
    report = convert(plain, tmp_path / "packed", to="endside", type="ternary")
    assert report.loss.lossless and "lossless" in str(report)
    block = Checkpoint.open(tmp_path / "packed").config["quantization_config"]
    assert block == {"quant_method": "endside", "bits": 2, "group_size": 64, "sym": True,
                     "kind": "ternary"}  # fmt: skip
    assert report.bytes < 0.6 * sum(file.stat().st_size for file in plain.iterdir())
    back = convert(tmp_path / "packed", tmp_path / "back", to="hf")
    assert back.dtype == "bfloat16" and back.loss.lossless
    before, after = Checkpoint.open(plain), Checkpoint.open(tmp_path / "back")
    assert before.names() == after.names()
    for name in before.names():
        assert np.array_equal(before.numpy(name), after.numpy(name)), name


@pytest.mark.parametrize("group", [16, 32, 128, 192])
def test_group_size_is_found(tmp_path: Path, group: int) -> None:
    """The largest size that holds in every linear; whole rows are kept in groups of at most 128."""
    config = replace(shape(), hidden_size=192, intermediate_size=384, num_attention_heads=6)
    if group == 128:
        config = replace(config, hidden_size=256, intermediate_size=384, num_attention_heads=8)
    model = Transformer(config)
    model.init_weights(torch.Generator().manual_seed(1))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.weight"):
                parameter.copy_(fake_ternary(parameter, group))
    plain = save(model, tmp_path / "plain", dtype="bfloat16")
    report = convert(plain, tmp_path / "packed", to="endside", type="ternary")
    block = Checkpoint.open(tmp_path / "packed").config["quantization_config"]
    assert block["group_size"] == {192: 64}.get(group, group), report


def test_one_odd_weight_is_not_ternary(tmp_path: Path) -> None:
    plain = write(tmp_path / "plain", ternary=64)
    file = plain / "model.safetensors"
    info = Checkpoint.open(plain).info("model.layers.1.mlp.down_proj.weight")
    raw = bytearray(file.read_bytes())
    at = info.start + 2 * 77
    raw[at] ^= 1
    file.write_bytes(raw)
    (plain / "endside.manifest.json").unlink()
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.down_proj\.weight.* is not ternary"):
        convert(plain, tmp_path / "packed", to="endside", type="ternary")
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_codes_travel_through_every_format(tmp_path: Path, kind: str) -> None:
    """Rounded once; then endside -> gptq -> gguf -> endside without a change."""
    plain = write(tmp_path / "plain")
    first = convert(plain, tmp_path / "a", to="endside", type=kind, group=32)
    want = weights(tmp_path / "a")
    assert not first.loss.lossless and first.loss.worst.endswith("_proj.weight")
    assert set(first.loss.classes) == {"embedding", "attention", "feed-forward", "norms", "head"}
    assert first.loss.classes["embedding"] == first.loss.classes["norms"] == 0
    bound = {"int4": (0.05, 0.12), "int8": (0.002, 0.01)}[kind]
    assert bound[0] < first.loss.classes["attention"] < bound[1]
    by_hand = round_to_nearest(to_float(open_source(plain).parameters[
        "layers.0.self_attn.q_proj.weight"].read()), kind, 32).dequantize()  # fmt: skip
    assert np.array_equal(want["layers.0.self_attn.q_proj.weight"], by_hand)
    here = tmp_path / "a"
    for step, to in enumerate(("gptq", "gguf", "endside", "gguf", "gptq", "endside")):
        there = tmp_path / (f"{step}.gguf" if to == "gguf" else str(step))
        report = convert(here, there, to=to)
        assert report.loss.lossless, f"{step} {report}"
        got = weights(there)
        assert got.keys() == want.keys()
        assert all(np.array_equal(got[name], want[name]) for name in want), to
        here = there
    assert open_source(here).config == open_source(plain).config
    assert torch.equal(logits(here), logits(tmp_path / "a"))


def test_an_embedding_in_low_bits_is_not_rounded_again(tmp_path: Path) -> None:
    """A GGUF keeps it in eight bits, whose numbers float16 does not hold; our own folder must."""
    plain = write(tmp_path / "plain")
    file = convert(plain, tmp_path / "q.gguf", to="gguf", type="q4_0").destination
    assert open_source(file).parameters["embed_tokens.weight"].stored == "Q8_0"
    report = convert(file, tmp_path / "e", to="endside")
    assert report.loss.lossless, str(report)
    assert Checkpoint.open(tmp_path / "e").info("model.embed_tokens.weight").dtype == "F32"
    smaller = convert(file, tmp_path / "h", to="endside", dtype="float16")
    assert 0 < smaller.loss.classes["embedding"] < 1e-3 and smaller.loss.classes["attention"] == 0


def test_every_pair(tmp_path: Path) -> None:
    """All five directions out of all five kinds of source, plain, low-bit and ternary."""
    plain = write(tmp_path / "plain")
    sources = {"hf": plain}
    sources["endside"] = convert(
        plain, tmp_path / "e", to="endside", type="int4", group=64
    ).destination
    sources["gptq"] = convert(plain, tmp_path / "g", to="gptq", type="int8", group=32).destination
    sources["gguf"] = convert(plain, tmp_path / "q.gguf", to="gguf", type="q8_0").destination
    sources["llama"] = convert(plain, tmp_path / "l", to="llama", dtype="float32").destination
    for (name, source), to in product(sources.items(), ("hf", "llama", "endside", "gptq", "gguf")):
        low = {"gptq": "int4", "endside": "int8"}.get(to, "auto")
        target = tmp_path / f"{name}-{to}{'.gguf' if to == 'gguf' else ''}"
        report = convert(source, target, to=to, type=low, group=32 if low != "auto" else None,
                         dtype="float32")  # fmt: skip
        assert report.loss.worst_error < (0.2 if low == "int4" else 0.02), (name, to)
        gap = (logits(target) - logits(source)).abs().max() / logits(source).abs().max()
        assert gap < (0.5 if low == "int4" else 0.05 if low == "int8" else 1e-5), (name, to, gap)


def test_act_order_is_kept_or_refused(tmp_path: Path) -> None:
    """GPTQ keeps it; a target without a place for it asks for a type to round to."""
    plain = write(tmp_path / "plain")
    folder = convert(plain, tmp_path / "g", to="gptq", type="int4", group=32).destination
    shuffle_columns(folder, "model.layers.0.mlp.up_proj")
    want = weights(folder)
    assert not np.array_equal(want["layers.0.mlp.up_proj.weight"],
                              weights(plain)["layers.0.mlp.up_proj.weight"])  # fmt: skip
    value = open_source(folder).parameters["layers.0.mlp.up_proj.weight"].read()
    assert isinstance(value, Permuted)
    report = convert(folder, tmp_path / "again", to="gptq")
    assert report.loss.lossless
    block = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert block["desc_act"] is True and block["sym"] is True
    for to, target in (("endside", "e"), ("gguf", "q.gguf")):
        with pytest.raises(UserError, match="act-order"):
            convert(folder, tmp_path / target, to=to)
        assert not (tmp_path / target).exists()
    rounded = convert(folder, tmp_path / "e", to="endside", type="int4", group=32)
    assert 0.01 < rounded.loss.worst_error < 0.2
    assert rounded.loss.worst == "layers.0.mlp.up_proj.weight"


def shuffle_columns(folder: Path, base: str) -> None:
    """Give a stored GPTQ linear a random group for each input, 32 inputs a group as before."""
    checkpoint = Checkpoint.open(folder, verify=False)
    info = checkpoint.info(f"{base}.g_idx")
    index = np.random.default_rng(3).permutation(checkpoint.numpy(f"{base}.g_idx"))
    file = folder / info.file
    raw = bytearray(file.read_bytes())
    raw[info.start : info.start + info.nbytes] = index.astype("<i4").tobytes()
    file.write_bytes(raw)
    (folder / "endside.manifest.json").unlink()


def test_ternary_in_gguf(tmp_path: Path) -> None:
    """TQ types where one scale covers 256 columns, else Q2_0 or Q4_0; never a silent loss."""
    whole = write(tmp_path / "w", ternary=256, hidden_size=256, intermediate_size=512,
                  num_attention_heads=8)  # fmt: skip
    sizes = {}
    for kind in ("auto", "tq1_0", "tq2_0", "q2_0", "q4_0"):
        report = convert(whole, tmp_path / f"{kind}.gguf", to="gguf", type=kind)
        sizes[kind] = report.bytes
        linears = {name: error for name, error in report.loss.classes.items()
                   if name in ("attention", "feed-forward")}  # fmt: skip
        assert set(linears.values()) == {0.0}, (kind, report)
    assert sizes["tq1_0"] < sizes["tq2_0"] < sizes["q2_0"] < sizes["auto"]
    packed = convert(whole, tmp_path / "p", to="endside", type="ternary").destination
    assert convert(packed, tmp_path / "t.gguf", to="gguf").dtype.startswith("TQ2_0")
    small = write(tmp_path / "s", ternary=64)
    wide = write(tmp_path / "m", ternary=64, hidden_size=256, intermediate_size=512,
                 num_attention_heads=8)  # fmt: skip
    with pytest.raises(UserError, match=r"groups of 64 columns, but TQ2_0 has one scale for 256"):
        convert(wide, tmp_path / "x.gguf", to="gguf", type="tq2_0")
    with pytest.raises(UserError, match="no multiple of the 256"):
        convert(small, tmp_path / "x.gguf", to="gguf", type="tq2_0")
    with pytest.raises(UserError, match="is not ternary, and rounding it to Q2_0 would destroy"):
        convert(write(tmp_path / "n"), tmp_path / "x.gguf", to="gguf", type="q2_0")
    kept = convert(small, tmp_path / "y.gguf", to="gguf", type="q2_0")
    assert kept.loss.lossless and not (tmp_path / "x.gguf").exists()


def test_asymmetric_codes_are_not_squeezed(tmp_path: Path) -> None:
    """AWQ with zeros of its own: exact in endside and GPTQ, refused by GGUF without a type."""
    folder = awq_folder(tmp_path / "awq")
    want = weights(folder)
    packed = convert(folder, tmp_path / "e", to="endside")
    assert packed.loss.lossless
    block = Checkpoint.open(tmp_path / "e").config["quantization_config"]
    assert block["sym"] is False
    assert all(np.array_equal(one, want[name]) for name, one in weights(tmp_path / "e").items())
    gptq = convert(tmp_path / "e", tmp_path / "g", to="gptq")
    assert gptq.loss.lossless
    with pytest.raises(UserError, match="zeros of their own"):
        convert(folder, tmp_path / "q.gguf", to="gguf")
    assert 0 < convert(folder, tmp_path / "q.gguf", to="gguf", type="q8_0").loss.worst_error < 0.01


def awq_folder(folder: Path) -> Path:
    """A folder in AutoAWQ's layout, written here one word at a time."""
    from endside.checkpoint import write_folder
    from endside.formats.hf_config import config_to_hf, hf_name, json_bytes
    from endside.formats.weights import is_linear, shapes
    from endside.shards import TensorSource

    config, rng, tensors = shape(), np.random.default_rng(0), {}

    def put(name: str, dtype: str, array: np.ndarray) -> None:
        tensors[name] = TensorSource(dtype, array.shape, lambda: array)

    for name, size in shapes(config, stored=100).items():
        if not is_linear(name):
            put(hf_name(name), "F16", rng.normal(size=size).astype(np.float16))
            continue
        base = hf_name(name).removesuffix(".weight")
        words = rng.integers(-(2**31), 2**31, (size[1], size[0] // 8)).astype(np.int32)
        zeros = rng.integers(-(2**31), 2**31, (size[1] // 32, size[0] // 8)).astype(np.int32)
        scales = rng.uniform(0.001, 0.01, (size[1] // 32, size[0])).astype(np.float16)
        put(f"{base}.qweight", "I32", words)
        put(f"{base}.qzeros", "I32", zeros)
        put(f"{base}.scales", "F16", scales)
    raw = config_to_hf(config, dtype="float16")
    raw["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 32,
                                  "version": "gemm", "zero_point": True}  # fmt: skip
    return write_folder(folder, tensors, {"config.json": json_bytes(raw)})


def test_negative_zero_is_the_one_exception() -> None:
    """-0 has no ternary code: it comes back as 0, which is the same number."""
    from endside.formats.bitcpm import to_ternary

    weight = float_to_bf16(np.array([[0.5, -0.5, -0.0, 0.5] * 16], np.float32))
    linear = to_ternary(weight)
    assert isinstance(linear, QuantizedLinear) and linear.bf16
    back = float_to_bf16(linear.dequantize())
    assert np.array_equal(bf16_to_float(back), bf16_to_float(weight))
    assert (back != weight).sum() == 16


def test_marlin_folder_of_fused_projections(tmp_path: Path) -> None:
    """CPM.cu's files: q|k|v and gate|up fused along the outputs, no word of it in config.json."""
    from tests.formats.fuzz import folder as seed

    place = tmp_path / "m"
    place.mkdir()
    for name, content in seed("marlin").items():
        (place / name).write_bytes(content)
    source = open_source(place)
    assert source.layout == "marlin"
    got = weights(place)
    rows = {name: len(got[f"layers.0.{name}_proj.weight"]) for name in
            ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up")}  # fmt: skip
    assert rows == {"self_attn.q": 64, "self_attn.k": 32, "self_attn.v": 32, "mlp.gate": 64,
                    "mlp.up": 64}  # fmt: skip
    fused = Checkpoint.open(place).numpy("model.layers.0.self_attn.qkv_proj.scales")
    # the first scales of k are those of fused row 64: group 0, second half of the columns
    key = source.parameters["layers.0.self_attn.k_proj.weight"].read()
    assert isinstance(key, QuantizedLinear)
    assert key.scales[:3, 0].tolist() == fused[0, [64, 72, 80]].tolist()
    assert convert(place, tmp_path / "e", to="endside").loss.lossless
    assert convert(place, tmp_path / "q.gguf", to="gguf").loss.lossless


@pytest.mark.parametrize("make", ["endside", "gptq", "awq"])
def test_low_bit_folders_run_in_pytorch(tmp_path: Path, make: str) -> None:
    """`hf.load` unpacks them; the logits are those of the unpacked weights."""
    if make == "awq":
        folder = awq_folder(tmp_path / "x")
    else:
        folder = convert(write(tmp_path / "p"), tmp_path / "x", to=make, type="int4").destination
    model = load(folder, dtype="float32")
    with torch.inference_mode():
        got = model.logits(model(Batch(TOKENS)))
    assert torch.equal(got, logits(folder))
    assert load(folder).embed_tokens.weight.dtype == (
        torch.float16 if make == "awq" else torch.bfloat16
    )


def test_zero_biases_are_ignored_and_others_refused(tmp_path: Path) -> None:
    """Some GPTQ exports store a bias of zeros for every linear."""
    from endside.checkpoint import write_folder
    from endside.shards import TensorSource

    folder = convert(write(tmp_path / "p"), tmp_path / "x", to="gptq", type="int4").destination
    checkpoint = Checkpoint.open(folder)
    sources = {
        name: TensorSource(info.dtype, info.shape, lambda name=name: checkpoint.numpy(name))
        for name, info in checkpoint.tensors.items()
    }
    for value, name in ((0, "zero"), (1, "one")):
        read = lambda value=value: np.full(64, value, np.float16)
        sources["model.layers.0.self_attn.k_proj.bias"] = TensorSource("F16", (64,), read)
        write_folder(tmp_path / name, sources, {"config.json": folder / "config.json"})
    assert weights(tmp_path / "zero").keys() == weights(folder).keys()
    with pytest.raises(UserError, match="bias that is not zero"):
        open_source(tmp_path / "one")


def test_ternary_is_looked_for_in_every_row() -> None:
    """One odd weight far down counts, and so does a scale that 16 bits do not hold."""
    from endside.formats.bitcpm import detect, to_ternary

    weight = np.tile(np.array([0.5, 0, -0.5, 0.5], np.float32), (200, 16))
    assert detect(weight) == 64
    odd = weight.copy()
    odd[150, 7] = 0.25
    assert detect(odd) is None and to_ternary(odd) is None
    odd[150] *= 3  # another scale for the row is fine
    odd[150, 7] = 0
    assert detect(odd) == 64
    assert to_ternary(weight * np.float32(1.0001)) is None
    assert to_ternary(float_to_bf16(weight * 1e-30)) is not None


def test_smaller_groups_of_asymmetric_codes_are_rounded(tmp_path: Path) -> None:
    """Zeros of its own have no place in a symmetric scheme, whatever the groups."""
    folder = awq_folder(tmp_path / "awq")
    report = convert(folder, tmp_path / "e", to="endside", type="int4", group=16)
    assert Checkpoint.open(tmp_path / "e").config["quantization_config"]["sym"] is True
    assert 0.01 < report.loss.worst_error < 0.2
