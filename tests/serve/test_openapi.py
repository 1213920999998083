"""Requests drawn from the server's own OpenAPI schema, right and wrong ones: none may be a 5xx."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings

from .conftest import Running

PATHS = {
    "/v1/models", "/v1/models/{name}", "/v1/chat/completions", "/v1/completions", "/v1/embeddings",
    "/tokenize", "/detokenize", "/health",
}  # fmt: skip


def attack(server: Running, examples: int) -> dict[str, set[int]]:
    """That many requests to every operation; the statuses each of them answered with."""
    schema = schemathesis.openapi.from_url(server.url + "/openapi.json")
    seen: dict[str, set[int]] = {}
    limits = settings(
        max_examples=examples, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    for found in schema.get_all_operations():
        operation = found.ok()
        statuses = seen.setdefault(operation.path, set())
        for mode in schemathesis.GenerationMode:
            if mode is schemathesis.GenerationMode.NEGATIVE and not operation.body:
                continue  # nothing can be wrong in what is not sent
            strategy = operation.as_strategy(generation_mode=mode)
            limits(given(case=strategy)(_sender(statuses)))()
    return seen


def _sender(statuses: set[int]) -> Callable[[schemathesis.Case], None]:
    def send(case: schemathesis.Case) -> None:
        statuses.add(_status(case))

    return send


def _status(case: schemathesis.Case) -> int:
    """Send it, tamed; fails on a 5xx and on an error in a strange shape."""
    if isinstance(case.body, dict):
        _tame(case.body)
    answer = case.call(timeout=60)
    assert answer.status_code < 500, f"{case.path}: {answer.status_code} {answer.text[:500]}"
    if answer.status_code >= 400:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}, answer.text
    return answer.status_code


def _tame(body: dict[str, Any]) -> None:
    """Keep answers short, and let every second request be about sampling alone: drawn texts are
    no names of models, no grammars and no conversations, so hardly one would get that far."""
    body.pop("n", None)
    for name in ("max_tokens", "max_completion_tokens"):
        if isinstance(body.get(name), int) and body[name] > 4:
            body[name] = 4
    body.setdefault("max_tokens", 4)
    if len(str(body)) % 2:
        return
    for name in ("model", "regex", "grammar", "json_schema", "response_format", "tool_choice"):
        body.pop(name, None)
    for name, plain in (("messages", [{"role": "user", "content": "hello"}]), ("prompt", "fox")):
        if name in body:
            body[name] = plain


def judge(server: Running, seen: dict[str, set[int]]) -> None:
    """Every route was tried, right requests are among the tries, and the server is well."""
    assert set(seen) == PATHS
    good = {path for path, statuses in seen.items() if 200 in statuses}
    assert good >= PATHS - {"/v1/models/{name}", "/v1/embeddings"}, seen
    assert httpx2.get(server.url + "/health").json()["status"] == "ok"


def test_no_request_is_a_5xx(server: Running) -> None:
    judge(server, attack(server, 30))


@pytest.mark.slow
def test_no_request_of_many_is_a_5xx(server: Running) -> None:
    judge(server, attack(server, 1_000))
