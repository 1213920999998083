"""MODEL as users give it: a folder, a name on the hub, or a .gguf file, opened as one thing."""

from __future__ import annotations

from pathlib import Path

from endside.checkpoint import Checkpoint, resolve


def open_model(model: str | Path, *, verify: bool = True) -> Checkpoint:
    """Its configuration and the places of its tensors; UserError says what is wrong with it.

    verify: compare files with their checksums, where there are some.
    """
    path = Path(model).expanduser()
    if path.suffix == ".gguf" and not path.is_dir():
        from endside import gguf_tokenizer
        from endside.formats.gguf_folder import open_checkpoint

        return open_checkpoint(path, gguf_tokenizer)
    return Checkpoint.open(resolve(model), verify=verify)
