"""A tiny chat model and conversations that it can learn: sums with a thought."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from endside.data.conversations import ConversationConfig, ThoughtConfig
from endside.formats import hf
from endside.model.presets import preset
from endside.model.transformer import Transformer
from endside.tokenizer import train_bpe
from endside.train.optim import OptimConfig
from endside.train.schedule import ScheduleConfig
from endside.train.sft import SftConfig


def write_start(folder: Path) -> Path:
    """A model folder with random weights and a tokenizer without a template."""
    words = ["what is one plus two? it is three, one more than two. " * 20]
    tokenizer = train_bpe(iter(words), 320)
    tokenizer.save(folder / "tokenizer")
    shape = replace(
        preset("tiny"), tie_word_embeddings=True, bos_token_id=tokenizer.bos_id,
        eos_token_ids=tuple(tokenizer.eos_ids),
    )  # fmt: skip
    model = Transformer(shape)
    model.init_weights(torch.Generator().manual_seed(0))
    hf.save(model, folder / "model", tokenizer_files=folder / "tokenizer")
    return folder / "model"


def write_sums(path: Path, count: int = 60) -> Path:
    """Lines of one and two turns, each answer with a thought."""
    choose = random.Random(7)
    lines = []
    for _ in range(count):
        messages: list[dict[str, Any]] = []
        for _ in range(choose.choice([1, 1, 2])):
            a, b = choose.randint(0, 9), choose.randint(0, 9)
            messages += [
                {"role": "user", "content": f"what is {a} plus {b}?"},
                {"role": "assistant", "content": f"it is {a + b}", "reasoning_content": f"{a} {b}"},
            ]
        lines.append(json.dumps({"messages": messages}) + "\n")
    path.write_text("".join(lines))
    return path


def small(start: Path, source: Path, **changes: Any) -> SftConfig:
    """Twenty steps."""
    cfg = SftConfig(
        start=str(start), data=ConversationConfig({str(source): 1.0}, heldout_share=0.2), steps=20,
        batch=2, accumulate=2, seq_len=160, seed=3, threads=1, checkpoint_every=5, eval_rows=4,
        thoughts=ThoughtConfig(share=0.5, typed=0.3),
        schedule=ScheduleConfig(warmup=4, decay=6), optim=OptimConfig(learning_rate=0.01),
    )  # fmt: skip
    return replace(cfg, **changes)
