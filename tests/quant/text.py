"""Seeded text for a model of bytes."""

from __future__ import annotations

import random

import torch

WORDS = ("the", "model", "reads", "a", "short", "text", "and", "learns", "which", "word", "follows")


def rows(count: int, length: int, seed: int) -> torch.Tensor:
    """Byte tokens (count, length) of seeded sentences."""
    choose = random.Random(seed)
    texts = [" ".join(choose.choices(WORDS, k=length)).encode()[:length] for _ in range(count)]
    return torch.tensor([list(text) for text in texts])
