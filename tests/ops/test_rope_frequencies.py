"""Inverse frequencies against transformers' own, and MiniCPM's published extension."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from endside.errors import UserError
from endside.model.presets import preset
from endside.ops.rope.frequencies import RopeConfig, extend_longrope, inverse_frequencies

transformers = pytest.importorskip("transformers", reason="the independent implementation")
modeling_rope_utils = pytest.importorskip("transformers.modeling_rope_utils")

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original": 8192}
YARN = {"factor": 4.0, "original": 4096}
NAMES = {"original": "original_max_position_embeddings", "amplitude": "attention_factor"}


def _theirs(
    kind: str, values: dict, *, head_dim: int, theta: float, longest: int, seq_len: int | None
) -> tuple[torch.Tensor, float]:
    table = {NAMES.get(key, key): value for key, value in values.items()}
    table = {key: list(v) if isinstance(v, tuple) else v for key, v in table.items()}
    config = transformers.LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=longest,
        rope_parameters={"rope_type": kind, "rope_theta": theta, **table},
    )
    compute = modeling_rope_utils.ROPE_INIT_FUNCTIONS[kind]
    return compute(config, torch.device("cpu"), seq_len=seq_len)


def _longrope(head_dim: int, **more: object) -> dict:
    """Lists that differ, so that a wrong choice shows."""
    count = head_dim // 2
    short = tuple(1 + 0.37 * i for i in range(count))
    long = tuple(1.1 + 0.91 * i for i in range(count))
    return {"short_factor": short, "long_factor": long, **more}


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("linear", {"factor": 2.5}),
        ("linear", {"factor": 8.0}),
        ("llama3", LLAMA3),
        ("llama3", {**LLAMA3, "factor": 32.0, "low_freq_factor": 2.0, "high_freq_factor": 16.0}),
        ("yarn", YARN),
        ("yarn", {**YARN, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.707}),
        ("yarn", {**YARN, "mscale": 0.9}),
        ("yarn", {**YARN, "amplitude": 1.25}),
        ("yarn", {**YARN, "truncate": False}),
        ("yarn", {**YARN, "beta_fast": 48.0, "beta_slow": 2.5, "original": 2048}),
        ("yarn", {**YARN, "factor": 1.0}),
        ("longrope", {"original": 4096}),
        ("longrope", {"original": 4096, "factor": 8.0}),
        ("longrope", {"original": 4096, "factor": 1.0}),
        ("longrope", {"original": 32768}),
        ("longrope", {"original": 4096, "amplitude": 1.19}),
    ],
)
@pytest.mark.parametrize(("head_dim", "theta"), [(64, 10000.0), (128, 5e5), (80, 1e6)])
@pytest.mark.parametrize("context", [1024, 16384])
def test_frequencies_equal_transformers(
    kind: str, values: dict, head_dim: int, theta: float, context: int
) -> None:
    """Every rope_type, with and without each optional key: frequencies and amplitude."""
    longest = 32768
    if kind == "longrope":
        values = _longrope(head_dim, **values)
    shape = {"head_dim": head_dim, "theta": theta, "longest": longest}
    want, want_amplitude = _theirs(kind, values, **shape, seq_len=context)
    rope = RopeConfig(theta=theta, kind=kind, **values)
    got, amplitude = inverse_frequencies(rope, head_dim, context, longest)
    assert got.shape == (head_dim // 2,) and got.dtype == np.float32
    np.testing.assert_array_equal(got, want.numpy())
    assert amplitude == pytest.approx(want_amplitude, rel=1e-12)


def test_longrope_chooses_the_list_by_context() -> None:
    """At the original length the short list holds; one token more takes the long one."""
    rope = RopeConfig(kind="longrope", original=512, **_longrope(16))
    short, _ = inverse_frequencies(rope, 16, 512, 1024)
    long, _ = inverse_frequencies(rope, 16, 513, 1024)
    plain, _ = inverse_frequencies(RopeConfig(), 16, 512, 1024)
    np.testing.assert_allclose(plain / short, rope.short_factor, rtol=1e-6)
    np.testing.assert_allclose(plain / long, rope.long_factor, rtol=1e-6)


@pytest.mark.parametrize(
    ("longest", "original", "amplitude"),
    [(131072, 32768, 1.06458), (131072, 65536, 1.03078), (32768, 32768, 1.0), (8192, 32768, 1.0)],
)
def test_longrope_amplitude(longest: int, original: int, amplitude: float) -> None:
    """sqrt(1 + ln s / ln original), from the two lengths when `factor` is missing."""
    rope = RopeConfig(kind="longrope", original=original, **_longrope(16))
    assert inverse_frequencies(rope, 16, longest, longest)[1] == pytest.approx(amplitude, abs=5e-6)


def test_published_128k_extension() -> None:
    """YaRN over the 8B list, s = 4: the check values of the published extension, amplitude 1."""
    native = preset("minicpm4-8b").rope.long_factor
    extended = extend_longrope(native, 4.0)
    checks = {0: 0.997800, 20: 4.048719, 32: 25.568458, 46: 116.949227, 63: 124.095692}
    for i, value in checks.items():
        assert extended[i] == pytest.approx(value, rel=4e-5), f"factor {i}"
    # the recipe's amplitude is 1: `factor` 1 says so, its absence would say 1.0646
    rope = RopeConfig(
        kind="longrope", original=32768, factor=1.0, long_factor=extended, short_factor=native
    )
    frequencies, amplitude = inverse_frequencies(rope, 128, 131072, 131072)
    assert amplitude == 1.0
    plain, _ = inverse_frequencies(RopeConfig(), 128, 131072, 131072)
    np.testing.assert_allclose(plain / frequencies, extended, rtol=1e-6)


@pytest.mark.parametrize(("name", "stretch"), [("minicpm4-0.5b", 4.0), ("minicpm4.1-8b", 2.0)])
def test_extension_is_the_formula(name: str, stretch: float) -> None:
    """f'[i] = f[i] / ((1 - gamma) / s + gamma), with correction dims of the model's own width."""
    native = preset(name).rope.long_factor
    dims = 2 * len(native)

    def dim(rotations: float) -> float:
        return dims * math.log(4096 / (rotations * 2 * math.pi)) / (2 * math.log(10000.0))

    low, high = math.floor(dim(32)), math.ceil(dim(1))
    assert (low, high) == {64: (10, 23), 128: (20, 46)}[dims]
    extended = extend_longrope(native, stretch)
    for i, (before, after) in enumerate(zip(native, extended, strict=True)):
        gamma = 1 - min(max((i - low) / (high - low), 0), 1)
        assert after == pytest.approx(before / ((1 - gamma) / stretch + gamma), rel=1e-12)
    assert extended[0] == native[0] and extended[-1] == pytest.approx(stretch * native[-1])


def test_check_vector_at_position_five() -> None:
    """cos and sin of the first two pairs of the 8B list (formats §2)."""
    rope = preset("minicpm4-8b").rope
    frequencies, amplitude = inverse_frequencies(rope, 128, 32768, 32768)
    angles = 5 * frequencies[:2]
    want = [[0.2942175, -0.4305646], [-0.9557385, -0.9025597]]
    got = np.stack((np.cos(angles), np.sin(angles))) * amplitude
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def test_presets_hold_the_published_list(test_data: Path) -> None:
    """The 8B list built from its half is the list of the published config.json."""
    raw = json.loads((test_data / "minicpm4-8b" / "config.json").read_text())
    assert preset("minicpm4-8b").rope.long_factor == pytest.approx(
        tuple(raw["rope_scaling"]["long_factor"]), rel=1e-12
    )


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"kind": "dynamic", "factor": 2.0}, "dynamic"),
        ({"kind": "yarn", "original": 4096}, "factor"),
        ({"kind": "longrope", "original": 4096}, "long_factor"),
        ({"kind": "llama3", "factor": 8.0}, "original_max_position_embeddings"),
    ],
)
def test_contradictory_settings_are_refused(values: dict, word: str) -> None:
    with pytest.raises(UserError, match=word):
        RopeConfig(**values)


def test_list_of_another_width_is_refused() -> None:
    rope = RopeConfig(kind="longrope", original=512, **_longrope(16))
    with pytest.raises(UserError, match="8 factors for a head width of 32: it needs 16"):
        inverse_frequencies(rope, 32, 512, 512)
