"""A GPTQ folder written here, loaded by transformers with its own GPTQ kernels.

transformers leaves the kernels to two packages, `optimum` and `gptqmodel`, which are large and not
among the tests' dependencies; where they are absent this says so and skips.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from endside.formats.convert import convert
from endside.formats.hf import save
from endside.formats.source import open_source, state_dict
from endside.model.batch import Batch
from endside.model.presets import preset
from endside.model.transformer import Transformer
from endside.ops.rope.frequencies import RopeConfig
from tests.formats.test_conversions import shuffle_columns

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("gptqmodel") is None or find_spec("optimum") is None,
        reason="transformers reads GPTQ with the packages optimum and gptqmodel: install both",
    ),
]


@pytest.mark.parametrize(("kind", "group", "sorted_columns"), [
    ("int4", 32, False), ("int4", 128, False), ("int8", 64, False), ("int4", 32, True),
])  # fmt: skip
def test_transformers_gives_the_same_logits(
    tmp_path: Path, kind: str, group: int, sorted_columns: bool
) -> None:
    """muP scales are folded first, so that its own Llama is the model."""
    from transformers import AutoModelForCausalLM

    config = replace(
        preset("tiny"), vocab_size=320, hidden_size=128, head_dim=32, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=256, rope=RopeConfig(theta=3e4),
    )  # fmt: skip
    model = Transformer(config)
    model.init_weights(torch.Generator().manual_seed(0))
    plain = save(model, tmp_path / "plain", dtype="float32")
    llama = convert(plain, tmp_path / "llama", to="llama").destination
    folder = convert(llama, tmp_path / "gptq", to="gptq", type=kind, group=group).destination
    if sorted_columns:
        shuffle_columns(folder, "model.layers.0.mlp.up_proj")
    tokens = torch.from_numpy(np.random.default_rng(0).integers(2, 320, (1, 65)))
    source = open_source(folder)
    own = Transformer(source.config)
    own.load_state_dict(state_dict(source, torch.float32, "cpu"))
    theirs = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    assert type(theirs.model.layers[0].mlp.up_proj).__module__.startswith("gptqmodel")
    with torch.inference_mode():
        want, got = own.logits(own(Batch(tokens))), theirs(tokens).logits
    apart = ((got - want).abs().max() / want.abs().max()).item()
    print(f"{kind}, groups of {group}: logits differ by {apart:.1e} of the largest")
    assert apart < 2e-3
    assert (got.argmax(-1) == want.argmax(-1)).float().mean() > 0.98
