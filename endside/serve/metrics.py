"""What the server counts, for Prometheus. Names begin with endside_."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from endside.engine.engine import Engine
    from endside.engine.request import Handle

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """One registry per server."""

    def __init__(self, engine: Engine) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = own = CollectorRegistry()
        named = lambda kind, name, help, **more: kind(f"endside_{name}", help, registry=own, **more)
        self.requests = named(
            Counter, "requests", "Requests by route and status", labelnames=("route", "status")
        )
        self.ended = named(Counter, "answers", "Answers by how they ended", labelnames=("reason",))
        self.prompt = named(Counter, "prompt_tokens", "Prompt tokens taken in")
        self.tokens = named(Counter, "generation_tokens", "Tokens generated")
        self.passes = named(Counter, "generation_passes", "Passes of the model that brought them")
        self.reused = named(
            Counter, "prefix_cache_tokens", "Prompt tokens found in the prefix cache"
        )
        self.hits = named(Counter, "prefix_cache_hits", "Answers that began behind a cached prefix")
        self.first = named(
            Histogram,
            "time_to_first_token_seconds",
            "From arrival to the first token",
            buckets=SECONDS,
        )
        self.between = named(
            Histogram,
            "inter_token_seconds",
            "Mean time between the tokens of an answer",
            buckets=BETWEEN,
        )
        running = named(Gauge, "requests_running", "Sequences being computed")
        running.set_function(lambda: len(engine.scheduler.running))
        waiting = named(Gauge, "requests_waiting", "Sequences waiting for room")
        waiting.set_function(lambda: len(engine.scheduler.waiting))
        accepted = named(Gauge, "accepted_length", "Tokens per pass so far; above 1 with drafts")
        accepted.set_function(lambda: self._tokens / self._passes if self._passes else 0.0)
        self._tokens = self._passes = 0

    def finished(self, handle: Handle) -> None:
        """Count an answer that has ended, for whatever reason."""
        times, answer = handle.times, len(handle.token_ids)
        self.ended.labels(handle.finish_reason or "failed").inc()
        self.prompt.inc(len(handle.request.tokens))
        self.tokens.inc(answer)
        self.passes.inc(handle.runs)
        self._tokens += answer
        self._passes += handle.runs
        if handle.reused:
            self.hits.inc()
            self.reused.inc(handle.reused)
        if answer:
            self.first.observe(times.first - times.submitted)
        if answer > 1 and times.finished:
            self.between.observe((times.finished - times.first) / (answer - 1))

    def text(self) -> bytes:
        """The page that Prometheus reads."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry)
