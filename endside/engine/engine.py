"""The loop that turns requests into tokens: schedule, run, sample, retire.

Everything here speaks token ids and numpy; the model is behind the `Executor` protocol and text is
only known as a `TokenBytes` table (id -> bytes) for stop strings. Given an executor whose rows do
not influence each other, a request's tokens depend on its prompt, its sampling values and its seed
alone: on no other request, not on the order of arrival and not on `max_batch`. What makes that true
is fixed chunk borders (`scheduler`), one random stream per request (`sampler`), and no shared state
anywhere else.

One thread steps. `submit` and `Handle.cancel` may be called from others.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Items

import numpy as np

from endside.engine.executor import Executor
from endside.engine.request import Handle, Request, Token
from endside.engine.sampler import fresh_seed, sample
from endside.engine.scheduler import Scheduler, Sequence
from endside.errors import UserError

PREFILL_CHUNK = 512  # tokens: enough rows to keep a matrix product busy, short enough to share

TokenBytes = Items[bytes]  # bytes of every token id; b"" for those that print nothing


class Engine:
    """Runs any number of requests on one executor, at most `max_batch` at once."""

    def __init__(
        self,
        executor: Executor,
        token_bytes: TokenBytes | None = None,
        *,
        max_batch: int = 8,
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> None:
        if max_batch < 1 or prefill_chunk < 1:
            raise UserError(
                f"engine max_batch {max_batch} and prefill_chunk {prefill_chunk}: "
                "both must be at least 1"
            )
        self.executor = executor
        self.token_bytes = token_bytes
        self.prefill_chunk = prefill_chunk
        self.scheduler = Scheduler(executor, max_batch=max_batch)
        self._numbers = itertools.count()

    @property
    def idle(self) -> bool:
        """True when nothing runs and nothing waits."""
        return not self.scheduler.running and not self.scheduler.waiting

    def check(self, request: Request) -> int:
        """Refuse what can never run; returns the tokens to reserve, prompt and answer together.

        `max_tokens` is an upper bound: an answer that meets the end of the context ends there.
        """
        room = min(self.executor.context, self.executor.capacity)
        prompt = len(request.tokens)
        if prompt >= room:
            raise UserError(
                f"prompt has {prompt:,} tokens, cache holds {room:,} and the answer needs room for "
                "at least one: raise --context or shorten the prompt"
            )
        self.check_ids(request)
        if request.sampling.stop and self.token_bytes is None:
            raise UserError("stop strings need the tokenizer's bytes: give Engine its token_bytes")
        wanted = request.sampling.max_tokens
        return room if wanted is None else min(prompt + wanted, room)

    def check_ids(self, request: Request) -> None:
        """Refuse token ids that the model does not have."""
        wrong = [one for one in request.tokens if not 0 <= one < self.executor.vocab_size]
        if wrong:
            raise UserError(
                f"prompt holds token id {wrong[0]}, the model knows 0 to "
                f"{self.executor.vocab_size - 1}: use the tokenizer of this model"
            )

    def submit(self, request: Request) -> Handle:
        """Queue a request. Raises UserError when it can never be run."""
        limit = self.check(request)
        seed = request.sampling.seed
        handle = Handle(
            next(self._numbers), request, fresh_seed() if seed is None else seed, self.step
        )
        self.scheduler.add(handle, limit)
        return handle

    def step(self) -> list[Token]:
        """Run one prompt chunk and one token of every answering sequence; returns new tokens."""
        self.scheduler.reap()
        self.scheduler.settle()
        self.scheduler.admit()
        # Decode first: a prompt that ends in this step gets its second token in the next one.
        rows = [*self._decode(self.scheduler.decoding()), *self._prefill()]
        tokens = [self._take(sequence, logits) for sequence, logits in rows]
        self.scheduler.reap()
        return [token for token in tokens if token is not None]

    def release(self) -> None:
        """Give back the pages of what was cancelled, without running a step."""
        self.scheduler.reap()

    def _prefill(self) -> list[tuple[Sequence, np.ndarray]]:
        sequence = self.scheduler.next_prompt()
        if sequence is None:
            return []
        if not sequence.handle.times.started:
            sequence.handle.mark("started")
        chunk = sequence.chunk(self.prefill_chunk)
        if sequence.stored + len(chunk) < sequence.prompt:
            self.executor.prefill(sequence.slot, chunk, logits="none")
            sequence.stored += len(chunk)
            return []
        logits = self.executor.prefill(sequence.slot, chunk, logits="last")
        assert logits is not None, "logits of the last position were asked for"
        return [(sequence, logits)]

    def _decode(self, sequences: list[Sequence]) -> list[tuple[Sequence, np.ndarray]]:
        if not sequences:
            return []
        tokens = np.array([one.tokens[-1] for one in sequences], dtype=np.int64)
        logits = self.executor.decode([one.slot for one in sequences], tokens)
        return list(zip(sequences, logits, strict=True))

    def _take(self, sequence: Sequence, logits: np.ndarray) -> Token | None:
        """Sample the next token of `sequence` and deliver it, or its error."""
        handle = sequence.handle
        if handle.done:
            return None
        try:
            chosen = sample(logits, sequence.tokens, handle.request.sampling, sequence.rng)
        except UserError as error:
            handle.fail(error)
            return None
        sequence.add(chosen)
        text, reason = self._ending(sequence, chosen)
        token = Token(handle.number, chosen, text, reason)
        handle.deliver(token)
        return token

    def _ending(self, sequence: Sequence, token: int) -> tuple[bytes, str | None]:
        """The bytes to show with this token, and why it is the last one, if it is."""
        stops = sequence.stops
        if token in sequence.handle.request.stop_ids:
            return stops.flush(), "stop"
        text = stops.push(self.token_bytes[token] if self.token_bytes is not None else b"")
        if stops.matched:
            return text, "stop"
        if sequence.full:
            return text + stops.flush(), "length"
        return text, None
