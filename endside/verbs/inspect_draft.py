"""What `inspect` says about drafts: which will guess, why, and which the model brings itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from endside.engine.draft import MAX_ROWS
from endside.engine.drafts import BITA, NAMES
from endside.errors import UserError

if TYPE_CHECKING:
    from endside.model.config import ModelConfig


def draft(name: str, place: str, config: ModelConfig, executor: str) -> dict[str, Any]:
    """name: as --draft; place: the model's folder; executor: that will run it. UserError."""
    brings = ["mtp"] if config.mtp_layers else []
    if (Path(place) / BITA).is_dir():
        brings.append("bita")
    found: dict[str, Any] = {"why": "asked for", "brings": brings, "rows": MAX_ROWS}
    if name == "auto":
        # The choice of endside.engine.drafts, before there is an executor to ask.
        exact = executor == "native"
        found["kind"] = "lookup" if exact else "none"
        found["why"] = (
            "auto: rows of a pass have the bits of single ones" if exact else
            "auto: rounding may change a token that nearly ties; --draft lookup asks for it"
        )  # fmt: skip
        return found
    if name in ("mtp", "bita") and name not in brings:
        raise UserError(f"draft {name}: the model in {place} does not bring one")
    if name in NAMES:
        return {**found, "kind": name}
    return {**found, **_folder(Path(name), config)}


def _folder(folder: Path, config: ModelConfig) -> dict[str, Any]:
    """From the headers of a draft folder."""
    from endside.checkpoint import Checkpoint, check_folder
    from endside.formats import draft_head, draft_soft

    if not folder.exists():
        raise UserError(f"draft {folder} is neither a folder nor one of {', '.join(NAMES)}")
    checkpoint = Checkpoint.open(check_folder(folder), verify=False)
    theirs = checkpoint.config.get("vocab_size", config.vocab_size)
    if theirs != config.vocab_size:
        raise UserError(
            f"the draft {folder} has a vocabulary of {theirs:,} tokens, the model one of "
            f"{config.vocab_size:,}: use a draft made for this model"
        )
    if draft_soft.holds(checkpoint):
        soft = draft_soft.read(checkpoint)
        return {"kind": "bita", "prompts": soft.prompts, "masks": soft.masks}
    if not draft_head.holds(checkpoint):
        return {"kind": "model"}
    ours = checkpoint.config.get("endside_draft", {})
    cut = (folder / draft_head.RANKING).is_file() or "d2t" in checkpoint.names()
    return {
        "kind": draft_head.kind_of(checkpoint), "bits": ours.get("bits", "none"),
        "vocabulary": "its own, cut" if cut else "the model's",
    }  # fmt: skip


def row(found: dict[str, Any]) -> str:
    """As one line of the table."""
    facts = [f"{k} {v}" for k, v in found.items() if k not in ("kind", "why", "brings", "rows")]
    tree = [] if found["kind"] == "none" else [
        f"trees of at most {found['rows']} rows, as many as pay on this machine"
    ]  # fmt: skip
    brings = [f"the model brings {', '.join(found['brings'])}"] if found["brings"] else []
    return "; ".join([f"{found['kind']} ({found['why']})", *facts, *tree, *brings])
