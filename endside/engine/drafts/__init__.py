"""Where guesses of the next tokens come from, by the name that users give."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from endside.engine.draft import Drafts
    from endside.engine.executor import Executor


def drafts_of(name: str, executor: Executor) -> Drafts | None:
    """The source of that name for this model; None: tokens are decoded one by one.

    "auto" looks up in the text where a pass of several tokens has the bits of several passes of
    one. Elsewhere a draft may change a token that two candidates nearly tie for, so it is asked
    for by name.
    """
    if name == "none" or (name == "auto" and not executor.row_exact):
        return None
    from endside.engine.drafts.lookup import Lookup

    return Lookup()
