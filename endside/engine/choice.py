"""How one answer gets its next token, and when it ends: everything a row of logits is asked for.

    logits ── forced by a closing thought? ──► that token
       └───── penalties ─► bias ─► grammar's mask ─► filters ─► one draw ──► token ─► the end?

A `Choice` is the state of one answer: its tokens, random stream, constraint, thought and open stop
strings. The executor knows nothing of it, and it knows nothing of the executor, so decoding one
token, a batch and a draft tree all ask the same question, row by row.

One uniform number is drawn for every token, also where it is forced or greedy: the n-th token of an
answer depends on the seed, on n and on its logits, however the tokens were grouped into passes.

The state follows from the tokens delivered. What an interrupt left half done is set right by
`rewind`, which starts again and takes these tokens anew.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from endside.engine.request import Request
from endside.engine.sampler import generator, log_probabilities, sample
from endside.engine.stops import StopStrings

if TYPE_CHECKING:
    from endside.engine.grammar import Constraint
    from endside.engine.thinking import Thought


@dataclass(frozen=True)
class Chosen:
    """One token and what goes with it."""

    id: int
    text: bytes  # what may be shown now
    finish_reason: str | None  # "stop", "length", or None: the answer goes on
    logprob: float | None = None  # of the model's own distribution, where asked for
    top: tuple[tuple[int, float], ...] = ()  # its most likely tokens, best first


class Choice:
    """The answer to one request, at most `limit` tokens with its prompt."""

    def __init__(
        self, request: Request, seed: int, *, limit: int, token_bytes: Items[bytes] | None
    ) -> None:
        self.request = request
        self.seed = seed
        self.prompt = len(request.tokens)
        self._token_bytes = token_bytes
        self._tokens = np.empty(limit, dtype=np.int64)
        self._tokens[: self.prompt] = request.tokens
        self._begin()

    def _begin(self) -> None:
        request = self.request
        self.length = self.prompt
        self.constraint: Constraint | None = None
        self.thought: Thought | None = None
        if request.constraint is not None:
            self.constraint = request.constraint.start(request.stop_ids)
        if request.thinking is not None:
            self.thought = request.thinking.start(request.stop_ids)
        self._stops = StopStrings(request.sampling.stop)
        self._rng = generator(self.seed)

    @property
    def tokens(self) -> np.ndarray:
        """Prompt and answer so far, (S,) int64."""
        return self._tokens[: self.length]

    @property
    def room(self) -> int:
        """Tokens that may still be added."""
        return len(self._tokens) - self.length

    def prepare(self) -> None:
        """The model is about to run: what the next token may be can be computed beside it."""
        if self.constraint is not None and not self._thinking:
            self.constraint.prefetch()

    def settled(self) -> list[int]:
        """Tokens known before the model has run: a closing thought's, or bytes a grammar forces."""
        if self.thought is not None and self.thought.coming:
            return list(self.thought.coming)
        if self.constraint is not None and not self._thinking:
            return self.constraint.forced_tokens()
        return []

    def take(self, logits: np.ndarray) -> Chosen | None:
        """The next token from its logits (V,) float32; None where a grammar allows none any more.

        Raises UserError where the logits hold no distribution or a grammar leads nowhere.
        """
        token = self._choose(logits)
        if token is None:
            return None
        wanted = self.request.sampling.logprobs
        logprob, top = None, ()
        if wanted is not None:
            logprob, top = log_probabilities(logits, token, wanted)
        text, reason = self._push(token)
        return Chosen(token, text, reason, logprob, top)

    def rewind(self, answer: Items[int]) -> None:
        """Back to the state in which exactly these tokens had been taken."""
        self._begin()
        for token in answer:
            self._rng.random()
            self._push(token)

    @property
    def _thinking(self) -> bool:
        return self.thought is not None and self.thought.open

    def _choose(self, logits: np.ndarray) -> int | None:
        forced = self.thought.forced() if self.thought is not None else None
        if forced is not None:
            self._rng.random()
            return forced
        allow = None
        if self._thinking:
            assert self.thought is not None, "an open thought is a thought"
            allow = self.thought.restrict
        elif self.constraint is not None:
            allow = self.constraint.restrict
            self.constraint.mask()
            if self.constraint.finished:
                return None
        config = self.request.sampling
        return sample(logits, self.tokens, config, self._rng, prompt=self.prompt, allow=allow)

    def _push(self, token: int) -> tuple[bytes, str | None]:
        """Add a token; the bytes to show with it, and why it is the last one, if it is."""
        self._tokens[self.length] = token
        self.length += 1
        thinking = self._thinking
        if self.thought is not None:
            self.thought.push(token)
        if self.constraint is not None and not thinking:
            self.constraint.advance(token)
        stops = self._stops
        if token in self.request.stop_ids:
            return stops.flush(), "stop"
        text = stops.push(self._token_bytes[token] if self._token_bytes is not None else b"")
        if stops.matched:
            return text, "stop"
        if self.constraint is not None and not self._thinking and self.constraint.finished:
            return text + stops.flush(), "stop"
        if not self.room:
            return text + stops.flush(), "length"
        return text, None
