"""Where guesses of the next tokens come from, by the name that users give."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from endside.errors import UserError

if TYPE_CHECKING:
    from endside.checkpoint import Checkpoint
    from endside.engine.draft import Drafts
    from endside.engine.drafts.head import Bits, Head
    from endside.engine.executor import Executor
    from endside.engine.executors import Plan
    from endside.formats.draft_head import DraftHead

NAMES = ("auto", "none", "lookup", "mtp", "bita")
BITA = "bita"  # folder of soft tokens inside the model's


def drafts_of(plan: Plan, executor: Executor, folder: Path | None = None) -> Drafts | None:
    """The source that `plan.draft` names for this model; None: tokens are decoded one by one.

    folder: the model's, where its own draft is looked for: an MTP layer among its weights ("mtp"),
    or tuned mask tokens in a folder inside it ("bita").

    "auto" looks up in the text where a pass of several tokens has the bits of several passes of
    one. Elsewhere a draft may change a token that two candidates nearly tie for, so it is asked
    for by name. Anything but a name is the folder of a draft head, soft tokens or a smaller model.
    """
    name = plan.draft
    if name == "none" or (name == "auto" and not executor.row_exact):
        return None
    if name in ("auto", "lookup"):
        from endside.engine.drafts.lookup import Lookup

        return Lookup()
    if name in ("mtp", "bita"):
        return _own(name, executor, plan, folder)
    return _from_folder(Path(name), executor, plan)


def _own(name: str, executor: Executor, plan: Plan, folder: Path | None) -> Drafts:
    """The draft that a model was published or trained with."""
    from endside.checkpoint import Checkpoint
    from endside.formats import draft_head

    place = folder / BITA if folder is not None and name == "bita" else folder
    if place is None:
        raise UserError(f"draft {name} lies in a model's folder, and this model has none")
    if name == "bita" and not place.is_dir():
        raise UserError(
            f"draft bita: {place} is missing: train it with endside draft train (kind = bita) and "
            "put its draft folder there, or name that with --draft"
        )
    if name == "mtp" and not draft_head.holds(Checkpoint.open(place)):
        raise UserError(
            f"draft mtp: the model in {place} has no MTP layer: it must be trained with "
            "mtp_layers = 1; a head of another kind is named by its folder"
        )
    return _from_folder(place, executor, plan)


def _from_folder(folder: Path, executor: Executor, plan: Plan) -> Drafts:
    from endside.checkpoint import Checkpoint, check_folder
    from endside.formats import draft_head, draft_soft

    if not folder.exists():
        raise UserError(f"draft {folder} is neither a folder nor one of {', '.join(NAMES)}")
    checkpoint = Checkpoint.open(check_folder(folder))
    soft = draft_soft.holds(checkpoint)
    if not soft and not draft_head.holds(checkpoint):
        from endside.engine.drafts import model

        return model.load(checkpoint, executor, plan)
    base = getattr(executor, "config", None)
    if base is None:
        raise UserError(
            f"the {executor.name} executor shows no hidden states and takes no tokens but its own, "
            f"which the draft in {folder} needs: use --draft lookup, or another executor"
        )
    if soft:
        return _soft(checkpoint, executor)
    from endside.engine.draft import check_drafts
    from endside.engine.drafts.eagle import Heads

    weights = draft_head.read(checkpoint, base.vocab_size)
    low = "int8" if plan.quant != "none" else "float"
    drafts = Heads(running(weights, executor, plan, "int4" if weights.bits == "int4" else low))
    check_drafts(drafts, executor.vocab_size)
    return drafts


def running(weights: DraftHead, executor: Any, plan: Plan, bits: Bits) -> Head:
    """A head for the model that an executor runs: in the native core where there is one.

    With the native executor it works with that one's threads, between the model's passes.
    """
    from endside import native
    from endside.engine.drafts.head import Head

    given = {"embed": executor.embed_rows, "rows": executor.head_rows, "context": executor.context}
    if native.load() is None:
        return Head(weights, executor.config, bits=bits, **given)
    from endside.engine.drafts.native_head import NativeHead
    from endside.engine.executors.native_plan import thread_count
    from endside.native.draft import Team

    model = executor.model if executor.name == "native" else None
    team = Team(model, thread_count(plan.threads), plan.isa)
    return NativeHead(weights, executor.config, bits=bits, team=team, **given)


def _soft(checkpoint: Checkpoint, executor: Executor) -> Drafts:
    from endside.engine.draft import check_drafts
    from endside.engine.drafts.bita import Bita
    from endside.formats import draft_soft

    soft = draft_soft.read(checkpoint)
    drafts = Bita(soft)
    check_drafts(drafts, executor.vocab_size)
    if soft.config.hidden_size != executor.config.hidden_size:
        raise UserError(
            f"draft {checkpoint.folder} is {soft.config.hidden_size} wide, the model "
            f"{executor.config.hidden_size}: use a draft made for this model"
        )
    return drafts
