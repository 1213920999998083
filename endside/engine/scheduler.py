"""Which sequences run now: admission by reserved pages, one prompt chunk and every decode per step.

A request is admitted only when the executor can reserve all the pages it may ever need, so a
running sequence never waits for memory and is never evicted. Requests wait in arrival order and
none overtakes: a large one at the head is not starved by small ones behind it.

Each step runs one chunk of one prompt, taken in turn, beside one token of every sequence that
already answers, so a long prompt slows the others by one chunk per token and never freezes them.
Chunk borders are multiples of `prefill_chunk` counted from the sequence's own start. They are never
moved to fill a batch: floating-point sums may depend on how rows are cut, and the same seed must
give the same text whatever else is running. For the same reason the prefix cache hands over whole
chunks only, where the executor is not exact row by row.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Items

import numpy as np

from endside.engine.choice import Choice
from endside.engine.draft import Drafter
from endside.engine.executor import Executor, Full
from endside.engine.prefix import PrefixCache
from endside.engine.request import Handle


class Sequence:
    """An admitted request: the executor's number of it, and how far its prompt has been run.

    What it has stored follows from the tokens delivered: an interrupt anywhere between running and
    delivering leaves a state that `Scheduler.settle` can repeat from.
    """

    def __init__(self, handle: Handle, choice: Choice, *, slot: int, prefilled: int, turn: int):
        self.handle = handle
        self.choice = choice
        self.slot = slot
        self.prefilled = prefilled  # prompt tokens stored; the last chunk does not count
        self.turn = turn  # the step that last ran a chunk of this prompt
        self.drafter: Drafter | None = None

    @property
    def prefilling(self) -> bool:
        """True while part of the prompt has not been run."""
        return not self.handle.token_ids

    @property
    def stored(self) -> int:
        """Tokens the executor has stored: all but the one sampled last."""
        answer = len(self.handle.token_ids)
        return self.choice.prompt + answer - 1 if answer else self.prefilled

    def chunk(self, size: int) -> np.ndarray:
        """The next prompt tokens, up to the next multiple of `size`."""
        end = min((self.prefilled // size + 1) * size, self.choice.prompt)
        return self.choice.tokens[self.prefilled : end]


class Scheduler:
    """The queue and the running set of one executor."""

    def __init__(
        self,
        executor: Executor,
        prefixes: PrefixCache,
        token_bytes: Items[bytes] | None = None,
        *,
        max_batch: int,
    ) -> None:
        self.executor = executor
        self.prefixes = prefixes
        self.token_bytes = token_bytes
        self.max_batch = max_batch
        self.waiting: deque[tuple[Handle, int]] = deque()
        self.running: list[Sequence] = []
        self._turn = 0

    def add(self, handle: Handle, limit: int) -> None:
        """Queue a request that will hold at most `limit` tokens."""
        self.waiting.append((handle, limit))

    def reap(self) -> None:
        """Give back the pages of everything that has ended, and forget it."""
        for sequence in [one for one in self.running if one.handle.done]:
            self.running.remove(sequence)
            if sequence.drafter is not None:
                sequence.drafter.close()
            choice = sequence.choice
            self._forget(sequence)
            stored = choice.tokens[: sequence.stored]
            self.prefixes.close(sequence.slot, stored, min(choice.prompt, len(stored)))
        # Only the head is looked at: a cancelled request further back goes when it gets there.
        while self.waiting and self.waiting[0][0].done:
            self.waiting.popleft()

    def settle(self) -> None:
        """Drop what an interrupted step stored without our taking note of it."""
        for sequence in self.running:
            self._settle(sequence)

    def _settle(self, sequence: Sequence) -> None:
        answer, choice = sequence.handle.token_ids, sequence.choice
        if choice.length != choice.prompt + len(answer):
            choice.rewind(answer)
        self._forget(sequence)

    def _forget(self, sequence: Sequence) -> None:
        if self.executor.length(sequence.slot) > sequence.stored:
            self.executor.trim(sequence.slot, sequence.stored)

    def admit(self) -> None:
        """Start waiting requests, first come first served, while rows and pages last."""
        while self.waiting and len(self.running) < self.max_batch:
            handle, limit = self.waiting[0]
            if not handle.done:
                choice = Choice(
                    handle.request, handle.seed, limit=limit, token_bytes=self.token_bytes
                )
                try:
                    slot, stored = self.prefixes.open(choice.tokens, limit)
                except Full:
                    assert self.running, f"no sequence runs, yet {limit} tokens find no free pages"
                    return
                self._turn += 1
                handle.reused = stored
                self.running.append(
                    Sequence(handle, choice, slot=slot, prefilled=stored, turn=self._turn)
                )
            self.waiting.popleft()

    def decoding(self) -> list[Sequence]:
        """Every sequence whose prompt is done, in order of admission."""
        return [one for one in self.running if not one.prefilling]

    def next_prompt(self) -> Sequence | None:
        """The prompt whose turn is longest ago, or None."""
        prompts = [one for one in self.running if one.prefilling]
        if not prompts:
            return None
        chosen = min(prompts, key=lambda one: one.turn)
        self._turn += 1
        chosen.turn = self._turn
        return chosen
