"""Where guesses of the next tokens come from, by the name that users give."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from endside.errors import UserError

if TYPE_CHECKING:
    from endside.engine.draft import Drafts
    from endside.engine.executor import Executor
    from endside.engine.executors import Plan

NAMES = ("auto", "none", "lookup")


def drafts_of(plan: Plan, executor: Executor) -> Drafts | None:
    """The source that `plan.draft` names for this model; None: tokens are decoded one by one.

    "auto" looks up in the text where a pass of several tokens has the bits of several passes of
    one. Elsewhere a draft may change a token that two candidates nearly tie for, so it is asked
    for by name. Anything but a name is the folder of a draft head, or of a smaller model.
    """
    name = plan.draft
    if name == "none" or (name == "auto" and not executor.row_exact):
        return None
    if name in ("auto", "lookup"):
        from endside.engine.drafts.lookup import Lookup

        return Lookup()
    return _from_folder(Path(name), executor, plan)


def _from_folder(folder: Path, executor: Executor, plan: Plan) -> Drafts:
    from endside.checkpoint import Checkpoint, check_folder
    from endside.formats import draft_head

    if not folder.exists():
        raise UserError(f"draft {folder} is neither a folder nor one of {', '.join(NAMES)}")
    checkpoint = Checkpoint.open(check_folder(folder))
    if not draft_head.holds(checkpoint):
        from endside.engine.drafts import model

        return model.load(checkpoint, executor, plan)
    base = getattr(executor, "config", None)
    if base is None:
        raise UserError(
            f"the {executor.name} executor shows no hidden states, which the draft head in "
            f"{folder} reads: use --draft lookup, or another executor"
        )
    from endside.engine.draft import check_drafts
    from endside.engine.drafts.eagle import Heads
    from endside.engine.drafts.head import Head

    weights = draft_head.read(checkpoint, base.vocab_size)
    low = "int8" if plan.quant != "none" else "float"
    head = Head(
        weights, base, embed=executor.embed_rows, rows=executor.head_rows,
        context=executor.context, bits="int4" if weights.bits == "int4" else low,
    )  # fmt: skip
    drafts = Heads(head)
    check_drafts(drafts, executor.vocab_size)
    return drafts
