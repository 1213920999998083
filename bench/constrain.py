"""What a constraint costs: masks over the real vocabulary, beside the 0.5B shape in int4.

    python bench/constrain.py [--rounds 12] [--threads N]

The engine answers under four JSON schemas and a grammar, with random weights, sampled, on the
native executor and the published 73,448-token vocabulary ($ENDSIDE_TEST_DATA, else ../shared/data).
Three kinds of the same answer take turns: masks computed beside the forward pass, masks computed
after it, and as many tokens without a constraint. The overhead of a token is

    seconds that the engine's own thread spends in the constraint (waiting for the worker included)
    + forward pass with masks beside it - forward pass without

as a share of the plain forward pass; the difference is the median over rounds, each of which
compares its own passes. Sampling is left out: it gets cheaper under a mask. Forced
text is not drafted here, so that every pass makes one token; how many passes drafting it would save
is printed as well. Limit: mean overhead with overlap <= 5 %. Prints a table, writes
bench/results/constrain.json, and exits with 1 where the limit is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from endside.engine.choice import Choice
from endside.engine.engine import Engine
from endside.engine.executors import Plan
from endside.engine.executors.native import random_executor
from endside.engine.grammar import Constraint, Grammar, Vocabulary
from endside.engine.request import Request, SamplingConfig
from endside.tokenizer import Tokenizer

HERE = Path(__file__).resolve().parent
LIMIT = 0.05
MOST = 96  # tokens of one answer
KINDS = ("overlapped", "after", "plain")

TEXT = {"type": "string", "maxLength": 40}
PERSON = {
    "type": "object",
    "properties": {"name": TEXT, "age": {"type": "integer", "minimum": 0, "maximum": 130}},
    "required": ["name", "age"],
}
SHAPES: dict[str, Any] = {
    "record": {**PERSON, "properties": {**PERSON["properties"], "email": TEXT}},
    "list": {"type": "array", "items": PERSON, "minItems": 2, "maxItems": 4},
    "choice": {"anyOf": [PERSON, {"enum": ["none", "several"]}, {"type": "number"}]},
    "any object": {"type": "object"},
    "arithmetic": 'start: sum\nsum: term (("+" | "-") term)*\nterm: /[0-9]{1,6}/ | "(" sum ")"',
}


class Clock:
    """Seconds of each token: in the constraint, on the engine's thread, and in the forward pass."""

    def __init__(self) -> None:
        self.constraint: list[float] = []
        self.forward: list[float] = []

    def timed(self, into: str, method: Callable[..., Any], *, fresh: bool) -> Callable[..., Any]:
        """The method, its seconds added. fresh: each call begins a new token."""

        def call(*arguments: Any, **named: Any) -> Any:
            begun = time.perf_counter()
            try:
                return method(*arguments, **named)
            finally:
                seconds, taken = getattr(self, into), time.perf_counter() - begun
                if fresh:
                    seconds.append(taken)
                elif seconds:
                    seconds[-1] += taken

        return call


@contextmanager
def measured(clock: Clock, engine: Engine, *, overlap: bool) -> Iterator[None]:
    """Every constraint and forward pass is timed; forced text is not drafted."""
    decode = engine.executor.decode
    methods = {name: getattr(Constraint, name) for name in ("prefetch", "restrict", "advance")}
    kept = {"settled": Choice.settled, "prepare": Choice.prepare}
    Choice.settled = lambda self: []  # type: ignore[method-assign]
    if not overlap:
        Choice.prepare = lambda self: None  # type: ignore[method-assign]
    engine.executor.decode = clock.timed("forward", decode, fresh=True)  # type: ignore
    for name, method in methods.items():
        setattr(Constraint, name, clock.timed("constraint", method, fresh=name == "restrict"))
    try:
        yield
    finally:
        engine.executor.decode = decode  # type: ignore[method-assign]
        for name, method in {**methods}.items():
            setattr(Constraint, name, method)
        for name, method in kept.items():
            setattr(Choice, name, method)


def answer(engine: Engine, grammar: Grammar | None, *, seed: int, tokens: int) -> Any:
    """One finished answer."""
    prompt = np.random.default_rng(7).integers(300, 5000, 64).tolist()
    config = SamplingConfig(max_tokens=tokens, temperature=1.0, seed=seed)
    handle = engine.submit(Request(tuple(prompt), config, frozenset({2, 73440}), grammar))
    while not handle.done:
        engine.step()
    assert handle.error is None, str(handle.error)
    return handle


def main() -> int:
    """Measure, print, write; 1 where the limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "constrain.json")
    flags = parser.parse_args()
    data = Path(os.environ.get("ENDSIDE_TEST_DATA") or HERE.parent.parent / "shared" / "data")
    tokenizer = Tokenizer.load(data / "minicpm4-8b", whole=False)
    plan = Plan(quant="int4", context=1024, threads=flags.threads, max_batch=1)
    executor = random_executor("minicpm4-0.5b", plan)
    table = tokenizer.token_bytes(executor.vocab_size)
    engine, vocabulary = Engine(executor, table), Vocabulary(table)
    begun = time.perf_counter()
    assert vocabulary.parser, "built on first use"
    report: dict[str, Any] = {"vocabulary": len(table), "build_s": time.perf_counter() - begun}
    report["rows"] = [measure(engine, vocabulary, name, flags.rounds) for name in SHAPES]
    means = [row["overlapped"]["overhead"] for row in report["rows"]]
    report |= {"mean_overhead": statistics.mean(means), "limit": LIMIT, "threads": executor.threads}
    report["machine"] = platform.processor() or platform.machine()
    print(table_of(report))
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    flags.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(report["mean_overhead"] > LIMIT)


def measure(engine: Engine, vocabulary: Vocabulary, name: str, rounds: int) -> dict[str, Any]:
    """One shape: the three kinds in turn, so that whatever else runs hits all of them."""
    begun = time.perf_counter()
    make = Grammar.lark if isinstance(SHAPES[name], str) else Grammar.json_schema
    grammar = make(SHAPES[name], vocabulary)
    compile_s = time.perf_counter() - begun
    clocks: dict[str, list[Clock]] = {kind: [] for kind in KINDS}
    passes = tokens = 0
    for seed in range(rounds + 1):
        length, round_ = 2, {}
        for kind in KINDS:
            round_[kind] = clock = Clock()
            with measured(clock, engine, overlap=kind == "overlapped"):
                one = grammar if kind != "plain" else None
                most = MOST if one else max(length, 2)
                length = len(answer(engine, one, seed=seed, tokens=most).token_ids)
        # the first round warms up; an answer of one token is the prompt's, no pass was made for it
        if seed and all(one.forward for one in round_.values()):
            for kind, clock in round_.items():
                clocks[kind].append(clock)
        drafted = answer(engine, grammar, seed=seed, tokens=MOST)
        passes, tokens = passes + drafted.runs, tokens + len(drafted.token_ids)
    passed = {kind: [statistics.median(one.forward) for one in clocks[kind]] for kind in KINDS}
    plain = statistics.median(passed["plain"])
    row: dict[str, Any] = {"shape": name, "compile_s": compile_s, "plain_forward_s": plain}
    for kind in KINDS[:2]:
        inside = [seconds for one in clocks[kind] for seconds in one.constraint]
        slower = [a / b - 1 for a, b in zip(passed[kind], passed["plain"], strict=True)]
        row[kind] = {
            "tokens": len(inside),
            "constraint": {
                "mean": statistics.mean(inside) / plain,
                "p99": percentile(inside, 99) / plain,
            },
            "forward_slower": {
                "min": min(slower), "median": statistics.median(slower), "max": max(slower),
            },
        }  # fmt: skip
        row[kind]["overhead"] = statistics.mean(inside) / plain + statistics.median(slower)
    return {**row, "tokens_per_pass_with_forced_text": tokens / passes}


def percentile(values: list[float], share: float) -> float:
    return float(np.percentile(values, share))


def table_of(report: dict[str, Any]) -> str:
    lines = [
        f"{report['vocabulary']:,} tokens, {report['threads']} thread(s); shares of the plain "
        "forward pass: time in the constraint (mean, p99), and how much slower the pass is "
        "(median, min to max of the rounds)",
        f"{'':<12}{'forward':>9}{'compile':>9}{'beside the pass':>38}{'after it':>38}"
        "   tokens per pass with forced text",
    ]
    for row in report["rows"]:
        shown = []
        for kind in KINDS[:2]:
            own, pace = row[kind]["constraint"], row[kind]["forward_slower"]
            shown.append(
                f"{own['mean']:.1%}, {own['p99']:.1%}; "
                f"{pace['median']:+.1%}, {pace['min']:+.1%} to {pace['max']:+.1%}"
            )
        lines.append(
            f"{row['shape']:<12}{row['plain_forward_s'] * 1e3:>6.1f} ms"
            f"{row['compile_s'] * 1e3:>6.1f} ms{shown[0]:>38}{shown[1]:>38}"
            f"   {row['tokens_per_pass_with_forced_text']:.2f}"
        )
    return "\n".join([*lines, f"mean overhead {report['mean_overhead']:.1%}, limit {LIMIT:.0%}"])


if __name__ == "__main__":
    raise SystemExit(main())
