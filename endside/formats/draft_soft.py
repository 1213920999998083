"""Prompt and mask tokens that make a model guess ahead: a draft of a few rows, in a folder.

One tensor, soft_tokens.weight (p + m, C): what enters the model's first layer for each of p prompt
tokens and m mask tokens. config.json is the model's, with how many of the rows are prompts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from endside.checkpoint import Checkpoint, TensorSource, write_folder
from endside.errors import UserError
from endside.formats.hf_config import config_from_hf, config_to_hf, json_bytes
from endside.model.config import ModelConfig

NAME = "soft_tokens.weight"
MOST = 63  # rows: with the text's last token 64 are verified at once


@dataclass(frozen=True)
class SoftTokens:
    """rows (p + m, C) float32, prompts first; `config` is the model's."""

    config: ModelConfig
    rows: np.ndarray
    prompts: int

    @property
    def masks(self) -> int:
        """Tokens that are guessed at once."""
        return len(self.rows) - self.prompts


def holds(checkpoint: Checkpoint) -> bool:
    """Whether a folder has soft tokens."""
    return NAME in checkpoint.names()


def read(checkpoint: Checkpoint) -> SoftTokens:
    """The soft tokens in a folder. Raises UserError where they do not fit its config."""
    raw = dict(checkpoint.config)
    ours = raw.pop("endside_draft", {})
    config, _ = config_from_hf(raw)
    rows, prompts = checkpoint.numpy(NAME), ours.get("prompts")
    good = rows.ndim == 2 and rows.dtype == np.float32 and rows.shape[1] == config.hidden_size
    whole = isinstance(prompts, int) and not isinstance(prompts, bool)
    if not good or not whole or not 0 <= prompts < len(rows) <= MOST:
        raise UserError(
            f"draft {checkpoint.folder}: {NAME} is {rows.dtype} {rows.shape} with {prompts} "
            f"prompts; at most {MOST} float32 rows of {config.hidden_size} are needed, a mask "
            "among them: train it again with endside draft train"
        )
    return SoftTokens(config, np.array(rows), prompts)


def write(soft: SoftTokens, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write them as a draft folder."""
    raw = config_to_hf(replace(soft.config, mtp_layers=0, sparse=None), dtype="float32")
    raw["endside_draft"] = {"kind": "bita", "prompts": soft.prompts}
    tensors = {NAME: TensorSource("F32", soft.rows.shape, lambda: soft.rows)}
    return write_folder(folder, tensors, {"config.json": json_bytes(raw)}, overwrite=overwrite)
