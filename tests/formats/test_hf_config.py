"""config.json: every key is used, refused or reported, and what we write is read back the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from endside.errors import UserError
from endside.formats.hf_config import config_from_hf, config_to_hf, json_bytes, point_to_code
from endside.model.presets import PRESETS, preset
from endside.ops.infllm.config import SparseConfig
from endside.ops.rope.frequencies import RopeConfig


def minicpm(**changes: object) -> dict:
    """A MiniCPM config whose every number differs from its default."""
    raw = {
        "architectures": ["MiniCPMForCausalLM"], "model_type": "minicpm", "hidden_act": "silu",
        "vocab_size": 503, "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 160, "rms_norm_eps": 3e-5,
        "max_position_embeddings": 1024, "rope_theta": 20000.0, "scale_emb": 9, "scale_depth": 1.3,
        "dim_model_base": 24, "mup_denominator": 3, "tie_word_embeddings": True,
        "initializer_range": 0.07, "bos_token_id": 1, "eos_token_id": [2, 500], "pad_token_id": 4,
        "rope_scaling": {
            "rope_type": "longrope", "long_factor": [1.0, 2.0, 3.0, 4.5],
            "short_factor": [1.0, 1.5, 2.0, 2.5], "original_max_position_embeddings": 512,
        },
    }  # fmt: skip
    raw.update(changes)
    return {key: value for key, value in raw.items() if value != "absent"}


def llama(**changes: object) -> dict:
    """A plain Llama config."""
    scales = ("scale_emb", "scale_depth", "dim_model_base", "mup_denominator")
    names = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rope_scaling": None}
    return minicpm(**dict.fromkeys(scales, "absent"), **{**names, **changes})


def test_every_value_arrives() -> None:
    """Nothing is ignored in this config, and each field holds its own number."""
    config, ignored = config_from_hf(minicpm())
    assert ignored == []
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (503, 96, 3)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (6, 2, 8)
    assert (config.intermediate_size, config.max_position_embeddings) == (160, 1024)
    assert (config.rms_norm_eps, config.initializer_range) == (3e-5, 0.07)
    assert (config.scale_emb, config.scale_depth, config.dim_model_base) == (9, 1.3, 24)
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (1, (2, 500), 4)
    assert config.tie_word_embeddings is True
    assert config.rope == RopeConfig(
        theta=20000.0, kind="longrope", original=512, long_factor=(1.0, 2.0, 3.0, 4.5),
        short_factor=(1.0, 1.5, 2.0, 2.5),
    )  # fmt: skip


def test_the_published_config(test_data: Path) -> None:
    """The 8B config is the preset; the keys that mean nothing here are named, none is lost."""
    raw = json.loads((test_data / "minicpm4-8b" / "config.json").read_text())
    config, ignored = config_from_hf(raw)
    want = preset("minicpm4-8b")
    assert config.rope.long_factor == pytest.approx(want.rope.long_factor, rel=1e-12)
    for field in ("hidden_size", "head_dim", "scale_emb", "scale_depth", "dim_model_base",
                  "eos_token_ids", "tie_word_embeddings", "logit_divisor", "group"):  # fmt: skip
        assert getattr(config, field) == getattr(want, field), field
    assert sorted(ignored) == ["_name_or_path", "auto_map", "transformers_version", "use_cache"]
    written = config_to_hf(config, raw)
    assert {key: written[key] for key in raw} == raw, "a key of the original changed"
    assert list(written)[: len(raw)] == list(raw), "their order changed"
    assert set(written) - set(raw) == {"head_dim"}


def test_unused_keys_are_reported_with_their_place() -> None:
    raw = minicpm(colour="red", torch_dtype="float16", use_cache=True)
    raw["rope_scaling"] = {**raw["rope_scaling"], "beta_fast": 32}
    assert config_from_hf(raw)[1] == ["colour", "use_cache", "rope_scaling.beta_fast"]


@pytest.mark.parametrize(
    ("scaling", "want"),
    [
        (None, RopeConfig(theta=2e4)),
        ({"type": "default"}, RopeConfig(theta=2e4)),
        ({"type": "linear", "factor": 4}, RopeConfig(theta=2e4, kind="linear", factor=4)),
        ({"type": "su", "long_factor": [1, 2, 3, 4], "short_factor": [4, 3, 2, 1],
          "attention_factor": 1.25, "factor": 8.0},
         RopeConfig(theta=2e4, kind="longrope", original=1024, long_factor=(1, 2, 3, 4),
                    short_factor=(4, 3, 2, 1), amplitude=1.25, factor=8.0)),
        ({"rope_type": "yarn", "original_max_position_embeddings": 256, "truncate": False,
          "mscale": 0.7, "mscale_all_dim": 0.5, "beta_fast": 24, "beta_slow": 2},
         RopeConfig(theta=2e4, kind="yarn", original=256, factor=4.0, truncate=False, mscale=0.7,
                    mscale_all_dim=0.5, beta_fast=24, beta_slow=2)),
        ({"rope_type": "yarn", "factor": 3.0, "attention_factor": 1.5},
         RopeConfig(theta=2e4, kind="yarn", original=1024, factor=3.0, amplitude=1.5)),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0, "high_freq_factor": 5.0,
          "original_max_position_embeddings": 128},
         RopeConfig(theta=2e4, kind="llama3", original=128, factor=8.0, low_freq_factor=2.0,
                    high_freq_factor=5.0)),
    ],
    ids=lambda v: v.kind if isinstance(v, RopeConfig) else None,
)  # fmt: skip
@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_both_rope_spellings(scaling: dict | None, want: RopeConfig, spelling: str) -> None:
    """`rope_theta` beside `rope_scaling`, or all of it in `rope_parameters`; and back."""
    if spelling == "rope_parameters":
        table = {**(scaling or {}), "rope_theta": 2e4}
        raw = llama(rope_theta="absent", rope_scaling="absent", rope_parameters=table)
    else:
        raw = llama(rope_scaling=scaling)
    config, ignored = config_from_hf(raw)
    assert config.rope == want and ignored == []
    again, ignored = config_from_hf(config_to_hf(config, raw))
    assert again == config and ignored == []


def test_a_length_beside_the_table_counts_first() -> None:
    raw = minicpm(original_max_position_embeddings=300)
    assert config_from_hf(raw)[0].rope.original == 300


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "qwen2"}, "model_type 'qwen2'"),
        ({"architectures": ["MiniCPMForSequenceClassification"]}, "MiniCPMForSequence"),
        ({"model_type": "absent"}, "model_type None"),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu"'),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"mixer_types": ["minicpm4"]}, "mixer_types"),
        ({"num_experts": 8}, "num_experts"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"hidden_size": "absent"}, "lacks hidden_size"),
        ({"hidden_size": "96"}, "hidden_size is '96'"),
        ({"hidden_size": 96.5}, "hidden_size is 96.5"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_key_value_heads": 4}, "not a multiple"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps"),
        ({"scale_emb": "absent"}, "lacks scale_emb"),
        ({"scale_depth": None}, "lacks scale_depth"),
        ({"scale_depth": "1.4"}, "scale_depth is '1.4'"),
        ({"tie_word_embeddings": 1}, "use true or false"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"bos_token_id": [1, 2]}, "must be one token id"),
        ({"mtp_layers": 3}, "mtp_layers is 3"),
        ({"rope_scaling": [1.0]}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "linear"}}, "needs a factor"),
        ({"rope_scaling": {"rope_type": "longrope", "long_factor": [1.0] * 4}}, "short_factor"),
        ({"rope_scaling": {"rope_type": "longrope", "long_factor": [1.0] * 4,
                           "short_factor": [1.0] * 3}}, "short_factor holds 3.*needs 4"),
        ({"rope_scaling": {"rope_type": "longrope", "long_factor": "x",
                           "short_factor": [1.0] * 4}}, "long_factor must be a list"),
        ({"sparse_config": {"topk": 8, "windw_size": 64}}, "windw_size.*did you mean window_size"),
        ({"sparse_config": {"topk": "8"}}, "topk is '8'"),
        ({"sparse_config": {"topk": 1}}, "topk 1"),
        ({"sparse_config": 3}, "sparse_config"),
    ],
)  # fmt: skip
def test_what_we_do_not_have_is_refused(changes: dict, words: str) -> None:
    """One message each; nothing that changes the forward pass passes silently."""
    with pytest.raises(UserError, match=words):
        config_from_hf(minicpm(**changes))


def test_first_release_lacked_dim_model_base(caplog: pytest.LogCaptureFixture) -> None:
    """256 is assumed and logged; the class default of 1 would flatten every distribution."""
    config, _ = config_from_hf(minicpm(dim_model_base="absent"))
    assert config.dim_model_base == 256 and "dim_model_base: 256 assumed" in caplog.text


def test_another_mup_denominator_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """The published forward divides by the number of layers."""
    config, ignored = config_from_hf(minicpm(mup_denominator=32))
    assert config.residual_scale == pytest.approx(1.3 / 3**0.5) and ignored == []
    assert "mup_denominator 32 differs" in caplog.text


@pytest.mark.parametrize(("make", "tied"), [(minicpm, True), (llama, False)])
def test_a_missing_tie_flag_is_the_familys_default(
    make: object, tied: bool, caplog: pytest.LogCaptureFixture
) -> None:
    config, _ = config_from_hf(make(tie_word_embeddings="absent"))
    assert config.tie_word_embeddings is tied and "tie_word_embeddings" in caplog.text


def test_sparse_config_and_own_keys_travel() -> None:
    sizes = {"kernel_size": 32, "kernel_stride": 16, "init_blocks": 2, "block_size": 64,
             "window_size": 128, "topk": 5, "use_nope": False, "dense_len": 300}  # fmt: skip
    config, ignored = config_from_hf(minicpm(sparse_config=sizes, mtp_layers=1))
    assert config.sparse == SparseConfig(**sizes) and config.mtp_layers == 1 and ignored == []
    own = config_from_hf(minicpm(sparse_config={**sizes, "selection": "4.0", "lse": "exact"}))[0]
    assert (own.sparse.selection, own.sparse.lse) == ("4.0", "exact")
    for each in (config, own):
        written = config_to_hf(each)
        assert config_from_hf(written)[0] == each
        assert written["sparse_config"]["selection"] == each.sparse.selection


@pytest.mark.parametrize("name", PRESETS)
def test_written_configs_are_read_back(name: str) -> None:
    """Config -> json -> config is the identity, and json -> config -> json the same bytes."""
    config = preset(name)
    raw = json.loads(json_bytes(config_to_hf(config)))
    again, _ = config_from_hf(raw)
    assert again == config
    assert json_bytes(config_to_hf(again, raw)) == json_bytes(config_to_hf(config))


def test_stale_keys_of_a_base_are_dropped() -> None:
    """What the model no longer has must not come back through the base."""
    base = minicpm(sparse_config={"topk": 9}, mtp_layers=1, auto_map={"AutoConfig": "c.C"})
    plain, _ = config_from_hf(llama())
    written = config_to_hf(plain, {**base, "colour": "red"})
    assert config_from_hf(written)[0] == plain
    assert written["colour"] == "red" and written["model_type"] == "llama"
    gone = {"sparse_config", "mtp_layers", "scale_emb", "scale_depth", "dim_model_base", "auto_map"}
    assert not gone & set(written)


def test_auto_map_points_to_code_that_exists() -> None:
    """Entries whose file travels along stay; others name the hub repository it came from."""
    config = {"auto_map": {"AutoConfig": "configuration_x.C", "AutoModel": "o/r--m.M"}}
    assert point_to_code(config, {"configuration_x.py"}) == config
    moved = point_to_code({**config, "_name_or_path": "org/name"}, set())["auto_map"]
    assert moved == {"AutoConfig": "org/name--configuration_x.C", "AutoModel": "o/r--m.M"}
    local = point_to_code({**config, "_name_or_path": "/home/me/x"}, set())["auto_map"]
    assert local["AutoConfig"] == "openbmb/MiniCPM4-8B--configuration_x.C"
