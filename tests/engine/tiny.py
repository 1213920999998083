"""Small checkpoints whose every size is awkward: nothing is a multiple of a kernel's tile."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from endside import native
from endside.checkpoint import Checkpoint
from endside.formats.hf import save
from endside.model.config import ModelConfig
from endside.model.presets import preset
from endside.model.transformer import Transformer

HAS_CORE = bool(native.available_isas())
VOCAB = 331


def awkward(name: str, **changes: object) -> ModelConfig:
    """A preset with an odd vocabulary and a feed-forward width that no group divides."""
    sizes = {"vocab_size": VOCAB, "intermediate_size": 100, **changes}
    return replace(preset(name), **sizes)  # type: ignore[arg-type]


def checkpoint(place: Path, config: ModelConfig, *, seed: int = 5) -> Checkpoint:
    """The model with random weights, large enough that its logits differ clearly."""
    model = Transformer(config)
    model.init_weights(torch.Generator().manual_seed(seed))
    return Checkpoint.open(save(model, place / config_name(config)))


def config_name(config: ModelConfig) -> str:
    """A folder name."""
    kind = "dense" if config.sparse is None else "sparse"
    return f"{kind}-{'tied' if config.tie_word_embeddings else 'untied'}"


def tokens(count: int, seed: int = 0) -> np.ndarray:
    """Token ids (count,)."""
    return np.random.default_rng(seed).integers(2, VOCAB, count)
