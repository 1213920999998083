"""What the routes share: the model, the engine's thread, the settings."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from endside import chat
from endside.api import LLM
from endside.engine.sampler import fresh_seed
from endside.serve.errors import ApiError
from endside.serve.runner import Job, Runner
from endside.stream import Stream

if TYPE_CHECKING:
    from endside.serve.schema import Sampling


@dataclass(frozen=True)
class State:
    """One per server."""

    llm: LLM
    runner: Runner
    model: str  # the name that clients see
    guard: Sequence[Any] = ()  # dependencies of routes that need a key
    created: int = field(default_factory=lambda: int(time.time()))

    def info(self) -> dict[str, Any]:
        """What the web chat shows about the model."""
        defaults = self.llm.generation_config
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        return {
            "model": self.model,
            "context": self.llm.context,
            "thinks": self.llm.has_chat_template and chat.can_think(self.llm.tokenizer),
            "chat": self.llm.has_chat_template,
            "sampling": {name: defaults[name] for name in names if name in defaults},
        }

    def check_model(self, asked: str | None) -> None:
        """Raises ApiError 404 for a model that is not served here."""
        if asked not in (None, "", self.model):
            raise ApiError(
                404, f"the model {asked!r} is not here: this server has {self.model!r}",
                param="model", code="model_not_found",
            )  # fmt: skip

    async def jobs(
        self, body: Sampling, prompts: Sequence[Any], make: Callable[[Any, int], Stream]
    ) -> list[Job]:
        """Start `n` answers for each prompt. make: (prompt, seed) -> the stream, in a thread."""
        from fastapi.concurrency import run_in_threadpool

        self.check_model(body.model)
        count, seed = body.n or 1, fresh_seed() if body.seed is None else body.seed
        self.runner.check(count * len(prompts))
        wanted = [(one, seed + at) for one in prompts for at in range(count)]
        streams = [await run_in_threadpool(make, *one) for one in wanted]
        jobs: list[Job] = []
        try:
            for stream in streams:
                jobs.append(self.runner.submit(stream))
        except ApiError:
            for job in jobs:
                self.runner.cancel(job)
            raise
        return jobs


def new_id(prefix: str) -> str:
    """A fresh name of a response."""
    return f"{prefix}-{uuid.uuid4().hex}"
