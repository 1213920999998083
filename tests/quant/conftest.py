"""A small model that has really learned something, and text for it."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from endside.formats.hf_config import config_to_hf
from endside.log import Progress
from endside.model.batch import Batch
from endside.model.presets import preset
from endside.model.transformer import Transformer
from endside.ops.cross_entropy.reference import cross_entropy
from endside.quant.quantize import Target
from tests.quant.text import rows


def trained(tied: bool, steps: int = 40) -> Transformer:
    """The tiny shape after a few steps of training."""
    config = replace(preset("tiny"), num_hidden_layers=3, tie_word_embeddings=tied)
    model = Transformer(config)
    model.init_weights(torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(steps):
        tokens = rows(8, 49, step)
        loss = cross_entropy(model.logits(model(Batch(tokens[:, :-1]))), tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # norms that are not one, so that folding them shows
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter *= torch.linspace(0.6, 1.6, len(parameter))
    return model.eval()


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def weights(one_thread: None) -> dict[bool, dict[str, torch.Tensor]]:
    """State of the trained model, tied and not."""
    return {tied: trained(tied).state_dict() for tied in (True, False)}


@pytest.fixture
def make_model(weights: dict[bool, dict[str, torch.Tensor]]) -> Callable[..., Transformer]:
    """make_model(tied=, dtype=) -> a fresh copy of the trained model."""

    def make(tied: bool = False, dtype: torch.dtype = torch.float32) -> Transformer:
        config = replace(preset("tiny"), num_hidden_layers=3, tie_word_embeddings=tied)
        model = Transformer(config)
        model.load_state_dict({name: t.clone() for name, t in weights[tied].items()})
        return model.to(dtype).eval()

    return make


@pytest.fixture
def target(tmp_path: Path) -> Callable[..., Target]:
    """target(name) -> where a result goes."""

    def make(name: str = "out", **options: Any) -> Target:
        return Target(tmp_path / name, config_to_hf, {"extra.txt": b"beside\n"}, "same", **options)

    return make


@pytest.fixture
def quiet() -> Progress:
    return Progress(io.StringIO(), quiet_seconds=0.0)
