"""Which sequences run now: admission by reserved pages, one prompt chunk and every decode per step.

A request is admitted only when the executor can reserve all the pages it may ever need, so a
running sequence never waits for memory and is never evicted. Requests wait in arrival order and
none overtakes: a large one at the head is not starved by small ones behind it.

Each step runs one chunk of one prompt, taken in turn, beside one token of every sequence that
already answers, so a long prompt slows the others by one chunk per token and never freezes them.
Chunk borders are multiples of `prefill_chunk` counted from the sequence's own start. They are never
moved to fill a batch: floating-point sums depend on how rows are cut, and the same seed must give
the same text whatever else is running. For the same reason a shared prefix may only be taken over
in whole chunks: `Sequence.stored` is where a sequence starts, and it must stay such a multiple.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from endside.engine.executor import Executor, Full
from endside.engine.request import Handle
from endside.engine.sampler import generator
from endside.engine.stops import StopStrings


class Sequence:
    """An admitted request: its tokens so far, and how many of them the executor has stored."""

    def __init__(self, handle: Handle, *, slot: int, limit: int, turn: int) -> None:
        prompt = handle.request.tokens
        self.handle = handle
        self.slot = slot  # the executor's number of this sequence
        self.prompt = len(prompt)
        self.length = len(prompt)
        self.stored = 0
        self.turn = turn  # the step that last ran a chunk of this prompt
        self.stops = StopStrings(handle.request.sampling.stop)
        self.rng = generator(handle.seed)
        self._tokens = np.empty(limit, dtype=np.int64)
        self._tokens[: self.length] = prompt

    @property
    def prefilling(self) -> bool:
        """True while part of the prompt has not been run."""
        return self.stored < self.prompt

    @property
    def full(self) -> bool:
        """True when no further token may be added."""
        return self.length == len(self._tokens)

    @property
    def tokens(self) -> np.ndarray:
        """Prompt and answer so far, (S,) int64."""
        return self._tokens[: self.length]

    def add(self, token: int) -> None:
        """One sampled token; the executor has stored all before it and gets it in the next step.

        `stored` moves only here and after a chunk that is not the last: an interrupt anywhere
        between running and sampling leaves a state that `settle` can repeat from.
        """
        self.stored = self.length
        self._tokens[self.length] = token
        self.length += 1

    def chunk(self, size: int) -> np.ndarray:
        """The next prompt tokens, up to the next multiple of `size`."""
        end = min((self.stored // size + 1) * size, self.prompt)
        return self._tokens[self.stored : end]


class Scheduler:
    """The queue and the running set of one executor."""

    def __init__(self, executor: Executor, *, max_batch: int) -> None:
        self.executor = executor
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
            self.executor.close(sequence.slot)
        # Only the head is looked at: a cancelled request further back goes when it gets there.
        while self.waiting and self.waiting[0][0].done:
            self.waiting.popleft()

    def settle(self) -> None:
        """Drop what an interrupted step stored without our taking note of it."""
        for sequence in self.running:
            if self.executor.length(sequence.slot) > sequence.stored:
                self.executor.trim(sequence.slot, sequence.stored)

    def admit(self) -> None:
        """Start waiting requests, first come first served, while rows and pages last."""
        while self.waiting and len(self.running) < self.max_batch:
            handle, limit = self.waiting[0]
            if not handle.done:
                try:
                    slot = self.executor.open(limit)
                except Full:
                    assert self.running, f"no sequence runs, yet {limit} tokens find no free pages"
                    return
                self._turn += 1
                sequence = Sequence(handle, slot=slot, limit=limit, turn=self._turn)
                self.running.append(sequence)
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
