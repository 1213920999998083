"""The loop that turns requests into tokens: schedule, run, choose, retire.

Everything here speaks token ids and numpy; the model is behind the `Executor` protocol and text is
only known as a `TokenBytes` table (id -> bytes) for stop strings. Given an executor whose rows do
not influence each other, a request's tokens depend on its prompt, its sampling values and its seed
alone: on no other request, not on the order of arrival, not on `max_batch`, and not on drafts or
cached prefixes. What makes that true is fixed chunk borders (`scheduler`), one random stream per
request (`choice`), the walk over a draft (`draft`), and no shared state anywhere else.

A step runs one prompt chunk, verifies the draft tree of every sequence that has one, and decodes
the others together, a token each.

One thread steps. `submit` and `Handle.cancel` may be called from others.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence as Items

import numpy as np

from endside.engine.choice import Chosen
from endside.engine.draft import MAX_ROWS, Asking, Drafts, FixedSize, Size, Tree, check_drafts
from endside.engine.executor import Executor
from endside.engine.prefix import PrefixCache
from endside.engine.request import Handle, Request, Token
from endside.engine.sampler import fresh_seed
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
        prefix_cache: bool = True,
        drafts: Drafts | None = None,
        size: Size | None = None,
    ) -> None:
        """drafts: guesses to verify, None: none; size: how large they should be."""
        if max_batch < 1 or prefill_chunk < 1:
            raise UserError(
                f"engine max_batch {max_batch} and prefill_chunk {prefill_chunk}: "
                "both must be at least 1"
            )
        if drafts is not None:
            check_drafts(drafts, executor.vocab_size)
            if drafts.feature_layers:
                executor.feature_layers = drafts.feature_layers
            if drafts.inputs is not None:
                executor.set_inputs(drafts.inputs)
        asked = drafts.inputs if drafts is not None else None
        self._known = executor.vocab_size + (0 if asked is None else len(asked))
        self.executor = executor
        self.token_bytes = token_bytes
        self.prefill_chunk = prefill_chunk
        self.drafts = drafts
        self.size = size or FixedSize()
        self.prefixes = PrefixCache(executor, chunk=prefill_chunk, on=prefix_cache)
        self.scheduler = Scheduler(executor, self.prefixes, token_bytes, max_batch=max_batch)
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
        given = {"prompt": request.tokens, "logit_bias": request.sampling.logit_bias or ()}
        for what, ids in given.items():
            wrong = [one for one in ids if not 0 <= one < self.executor.vocab_size]
            if wrong:
                raise UserError(
                    f"{what} holds token id {wrong[0]}, the model knows 0 to "
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
        """Run one prompt chunk and a pass of every answering sequence; returns the new tokens."""
        self.scheduler.reap()
        self.scheduler.settle()
        self.scheduler.admit()
        # Decode first: a prompt that ends in this step gets its second token in the next one.
        answering = self.scheduler.decoding()
        tokens = [*self._answer(answering), *self._prefill()]
        self.scheduler.reap()
        return tokens

    def release(self) -> None:
        """Give back the pages of what was cancelled, without running a step."""
        self.scheduler.reap()

    def _prefill(self) -> list[Token]:
        sequence = self.scheduler.next_prompt()
        if sequence is None:
            return []
        if not sequence.handle.times.started:
            sequence.handle.mark("started")
        self._share(sequence)
        if sequence.drafter is None and self.drafts is not None:
            sequence.drafter = self.drafts.start(sequence.handle.request)
        chunk, choice = sequence.chunk(self.prefill_chunk), sequence.choice
        if sequence.prefilled + len(chunk) < choice.prompt:
            self.executor.prefill(sequence.slot, chunk, logits="none")
            sequence.prefilled += len(chunk)
            self.prefixes.note(sequence.slot, choice.tokens[: sequence.prefilled])
            self._observe(sequence, chunk)
            return []
        choice.prepare()
        logits = self.executor.prefill(sequence.slot, chunk, logits="last")
        assert logits is not None, "logits of the last position were asked for"
        tokens = self._deliver(sequence, self._walk(sequence, logits[None]))
        self.prefixes.note(sequence.slot, choice.tokens[: choice.prompt])
        self._observe(sequence, chunk)
        return tokens

    def _share(self, sequence: Sequence) -> None:
        """Take over what another sequence has stored of the same prompt meanwhile."""
        choice, handle = sequence.choice, sequence.handle
        limit = choice.length + choice.room
        slot, stored = self.prefixes.further(
            sequence.slot, choice.tokens, sequence.prefilled, limit
        )
        handle.reused += stored - sequence.prefilled
        sequence.slot, sequence.prefilled = slot, stored

    def _answer(self, sequences: list[Sequence]) -> list[Token]:
        """One pass for each: a draft tree by itself, or a token in a batch with others."""
        plain, tokens = [], []
        for sequence in sequences:
            tree, seconds = self._guess(sequence, len(sequences))
            if len(tree):
                tokens += self._verify(sequence, tree, seconds)
            else:
                plain.append(sequence)
        return tokens + self._decode(plain)

    def _decode(self, sequences: list[Sequence]) -> list[Token]:
        if not sequences:
            return []
        last = np.array([one.choice.tokens[-1] for one in sequences], dtype=np.int64)
        for sequence in sequences:
            sequence.choice.prepare()
        logits = self.executor.decode([one.slot for one in sequences], last)
        tokens: list[Token] = []
        for sequence, token, row in zip(sequences, last, logits, strict=True):
            tokens += self._deliver(sequence, self._walk(sequence, row[None]))
            self._observe(sequence, np.array([token]))
        return tokens

    def _guess(self, sequence: Sequence, running: int) -> tuple[Tree, float | None]:
        """The draft to verify now, and the seconds it took; None: its tokens are no guess.

        Tokens that are settled already go before any guess.
        """
        # The root's row takes a token of the room, and the last token is stored by no pass.
        depth = sequence.choice.room - 1
        if depth < 1:
            return Tree.empty(), None
        rows = MAX_ROWS - 1
        settled = sequence.choice.settled() if self.drafts or self.executor.row_exact else []
        if settled:
            return Tree.chain(settled).cut(rows, depth), None
        if sequence.drafter is None:
            return Tree.empty(), None
        rows = min(rows, self.size.rows(running))
        if rows < 1:
            return Tree.empty(), None
        begun = time.perf_counter()
        tree = sequence.drafter.propose(sequence.choice.tokens, rows)
        seconds = time.perf_counter() - begun
        tree.check(self._known)
        # Questions are not counted, and `check` has seen that there are not too many.
        return tree.cut(rows if self.drafts.inputs is None else len(tree), depth), seconds

    def _verify(self, sequence: Sequence, tree: Tree, seconds: float | None) -> list[Token]:
        """Run the last token and a tree behind it; keep the path that the model itself takes.

        seconds: what the guess took; None: it was none.
        """
        choice = sequence.choice
        rows = np.concatenate([choice.tokens[-1:], tree.tokens])
        parents = np.concatenate([[-1], tree.parents + 1]).astype(np.int32)
        choice.prepare()
        logits = self.executor.verify(sequence.slot, rows, parents)
        path = [0]
        steps = self._walk(sequence, logits, tree, path)
        if sequence.handle.done:
            return []
        self.executor.accept(sequence.slot, path)
        guesses = tree.guesses(self.executor.vocab_size)
        if seconds is not None:
            self.size.record(guesses, [row - 1 for row in path[1:]], seconds)
        sequence.handle.drafted += len(guesses)
        tokens = self._deliver(sequence, steps)
        self._observe(sequence, rows[path], path)
        if isinstance(sequence.drafter, Asking):
            sequence.drafter.verified(tree, logits, path)
        return tokens

    def _walk(
        self,
        sequence: Sequence,
        logits: np.ndarray,
        tree: Tree | None = None,
        path: list[int] | None = None,
    ) -> list[Chosen]:
        """Choose at the root, then at the child chosen, as far as the tree goes.

        logits (T, V): of the root and the tree's nodes. path: the rows gone through are added.
        """
        handle, row = sequence.handle, 0
        steps: list[Chosen] = []
        if handle.done:
            return steps
        children = _children(tree)
        try:
            while True:
                chosen = sequence.choice.take(logits[row])
                if chosen is None:
                    handle.finish("stop")
                    return steps
                steps.append(chosen)
                next_row = children.get((row, chosen.id))
                if chosen.finish_reason is not None or next_row is None or path is None:
                    return steps
                row = next_row
                path.append(row)
        except UserError as error:
            handle.fail(error)
            return steps

    def _deliver(self, sequence: Sequence, steps: list[Chosen]) -> list[Token]:
        handle = sequence.handle
        tokens = []
        if steps:
            handle.runs += 1
        for one in steps:
            if handle.done:
                break
            token = Token(handle.number, one.id, one.text, one.finish_reason, one.logprob, one.top)
            handle.deliver(token)
            tokens.append(token)
        return tokens

    def _observe(
        self, sequence: Sequence, stored: np.ndarray, path: list[int] | None = None
    ) -> None:
        """Show the drafter what was stored. path: rows of a verified tree, else all rows."""
        if sequence.drafter is None:
            return
        features = None
        if self.drafts is not None and self.drafts.feature_layers:
            features = self.executor.features(sequence.slot)
            features = features[path] if path is not None else features[-len(stored) :]
        sequence.drafter.accepted(stored, features)


def _children(tree: Tree | None) -> dict[tuple[int, int], int]:
    """(row of the parent, token) -> row, the root being row 0; of equal siblings the first."""
    found: dict[tuple[int, int], int] = {}
    if tree is not None:
        for row, (token, parent) in enumerate(zip(tree.tokens.tolist(), tree.parents.tolist())):
            found.setdefault((parent + 1, token), row + 1)
    return found
