"""A model that says what a trace says, and a head that guesses it: the parts of speculate.py.

Everything is computed; only what is chosen and what is guessed comes from the script.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from endside.engine.choice import Chosen
from endside.engine.draft import Tree
from endside.engine.drafts.eagle import HeadDrafter, Heads
from endside.engine.drafts.expand import Guesses
from endside.engine.drafts.head import Rows, Window
from endside.engine.drafts.native_head import NativeHead
from endside.engine.engine import Engine
from endside.engine.request import Request
from endside.engine.scheduler import Sequence

NODES = 31  # of a traced tree
# calls of the executor -> what they are in a table
EXECUTOR = {
    "prefill": "prompt", "decode": "plain pass", "verify": "verifying", "accept": "keeping"
}  # fmt: skip


class Replayed(Engine):
    """An engine whose model says what a script says. Choosing costs what it always costs.

    script(sequence, tree) -> the tokens of a pass: those of the path taken, and the one after it.
    """

    script: Callable[[Sequence, Tree | None], list[int]]

    def _walk(
        self,
        sequence: Sequence,
        logits: np.ndarray,
        tree: Tree | None = None,
        path: list[int] | None = None,
    ) -> list[Chosen]:
        choice, said = sequence.choice, iter(self.script(sequence, tree))

        def choose(row: np.ndarray) -> int:
            type(choice)._choose(choice, row)
            return next(said)

        choice._choose = choose  # type: ignore[method-assign]
        return super()._walk(sequence, logits, tree, path)


class Trace:
    """Of one kind and temperature: parents (texts, tokens, NODES), paths (texts, tokens, DEPTH)."""

    def __init__(self, parents: np.ndarray, paths: np.ndarray) -> None:
        self.parents, self.paths = parents, paths

    def accepted(self, nodes: int) -> float:
        """Tokens a pass with trees of so many nodes."""
        passes = tokens = 0
        for text in self.paths:
            at = 0
            while at < len(text):
                step = 1 + int(np.cumprod((text[at] >= 0) & (text[at] < nodes)).sum())
                at, passes, tokens = at + step, passes + 1, tokens + step
        return tokens / passes


class ReplayedHeads(Heads):
    """A head that computes everything and then guesses what the trace says."""

    def __init__(self, head: ReplayedHead, trace: Trace) -> None:
        super().__init__(head)
        self.trace, self.text = trace, 0  # the text that is replayed next

    def start(self, request: Request) -> HeadDrafter:
        drafter, head, trace = super().start(request), self.head, self.trace
        text, prompt, propose = self.text, len(request.tokens), HeadDrafter.propose

        def replayed(history: np.ndarray, rows: int) -> Tree:
            assert isinstance(head, ReplayedHead)
            head.parents = trace.parents[text, len(history) - prompt - 1]
            return propose(drafter, history, min(rows, NODES))

        drafter.propose = replayed  # type: ignore[method-assign]
        return drafter

    def script(self, sequence: Sequence, tree: Tree | None) -> list[int]:
        """The nodes that the trace's path has in this tree, and a token that no node has."""
        at = len(sequence.handle.token_ids)
        fresh = 1000 + at
        if tree is None or not len(tree):
            return [fresh]
        held = set(tree.tokens.tolist())
        own = self.trace.paths[self.text, at - 1]
        path: list[int] = []
        for token in self.head.names(own[own >= 0]).tolist():
            if token not in held:
                break
            path.append(token)
        assert fresh not in held, "the token after the path is a node"
        return [*path, fresh]


class ReplayedHead(NativeHead):
    """Node number n of the traced tree is token n of the head's own vocabulary."""

    parents = np.full(NODES, -1)
    asked: np.ndarray | None = None
    rows = 0  # that were guessed from

    def hidden(self, features: np.ndarray) -> np.ndarray:
        self.asked = None  # what comes next is the text's last pair
        return super().hidden(features)

    def names(self, own: np.ndarray) -> np.ndarray:
        self.asked = own
        return super().names(own)

    def run(
        self, rows: Rows, window: Window, *, guesses: int = 0, width: int = 1
    ) -> tuple[np.ndarray, Guesses]:
        states, found = super().run(rows, window, guesses=guesses, width=width)
        self.rows += guesses
        # Any numbers that fall along the ranking give the same tree; the rest is below all of it.
        found.tokens[:] = np.arange(100, 100 + found.tokens.shape[1])
        found.chances[:] = -1000.0 - np.arange(found.tokens.shape[1])
        nodes = [-1] if self.asked is None else self.asked.tolist()
        for row, node in enumerate(nodes):
            children = np.flatnonzero(self.parents == node) if node < NODES else np.empty(0, int)
            found.tokens[row, : len(children)] = children
            found.chances[row, : len(children)] = (node - children) * 0.01
        return states, found


class Clock:
    """Milliseconds of a pass by what they go to: some calls of an engine are watched.

    What runs inside a watched call counts for the inner one alone.
    """

    def __init__(self, engine: Replayed, head: ReplayedHead | None) -> None:
        self.spent: dict[str, float] = {}
        self._inside: list[float] = []
        self._watched: list[tuple[Any, str]] = []
        self._watch(engine, "step", "bookkeeping")
        self._watch(engine, "_walk", "choosing")
        self._watch(engine, "_guess", "growing the tree")
        for name, what in EXECUTOR.items():
            self._watch(engine.executor, name, what)
        if head is not None:
            self._watch(head.core, "run", "draft head")

    def _watch(self, owner: Any, name: str, what: str) -> None:
        inner = getattr(owner, name)

        def watched(*arguments: Any, **more: Any) -> Any:
            self._inside.append(0.0)
            begun = time.perf_counter()
            try:
                return inner(*arguments, **more)
            finally:
                spent = time.perf_counter() - begun
                self.spent[what] = self.spent.get(what, 0.0) + spent - self._inside.pop()
                if self._inside:
                    self._inside[-1] += spent

        setattr(owner, name, watched)
        self._watched.append((owner, name))

    def stop(self, passes: int) -> dict[str, float]:
        """Milliseconds of a pass by what took them; nothing is watched any longer."""
        for owner, name in self._watched:
            delattr(owner, name)
        return {what: 1e3 * spent / passes for what, spent in self.spent.items()}
