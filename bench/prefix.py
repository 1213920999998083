"""What a stored prefix saves: time to the first token of a second request, and of a new start.

    python bench/prefix.py [--shape minicpm4-0.5b] [--prefix 16384] [--attention dense,sparse]

The 0.5B shape with random weights, int4, native executor. A prompt of 16,384 tokens and 32 of its
own is answered from nothing ("cold"), then prompts with the same 16,384 and 32 others from what the
first has stored ("warm"). The cache is emptied and one of the second prompts answered cold again,
for a second time and to compare the tokens, which are sampled at temperature 1 with a seed: the
same bits or another text. Then the conversation is saved, loaded into a new executor, and answered
there ("session": loading and first token together).

Seconds run from the start of a request to its first token. Limits: warm >= 20 x sooner than cold,
and the session sooner than cold; all texts equal. Prints a table, writes bench/results/prefix.json,
and exits with 1 where a limit is missed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from endside.engine import session
from endside.engine.engine import Engine
from endside.engine.executors import Plan
from endside.engine.executors.native import random_executor
from endside.engine.request import Handle, Request, SamplingConfig

HERE = Path(__file__).resolve().parent
TAIL, ANSWER, WARM = 32, 16, 5  # tokens of each prompt's own, tokens answered, warm requests
LEAST = 20.0


def main() -> int:
    """Measure, print, write; 1 where a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="minicpm4-0.5b")
    parser.add_argument("--prefix", type=int, default=16384)
    parser.add_argument("--attention", default="dense,sparse")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "prefix.json")
    flags = parser.parse_args()
    report = {mode: measure(flags, mode) for mode in flags.attention.split(",")}
    missed = []
    for mode, row in report.items():
        print(
            f"{mode:<8}cold {' and '.join(f'{one:.2f}' for one in row['cold_s'])} s; warm "
            f"{row['warm_s']['median']:.3f} s [{row['warm_s']['min']:.3f} .. "
            f"{row['warm_s']['max']:.3f}]: {row['warm_ratio']:.0f} x sooner; session of "
            f"{row['session']['mib']:.0f} MiB saved in {row['session']['save_s']:.2f} s, loaded in "
            f"{row['session']['load_s']:.2f} s, first token {row['session']['ratio']:.0f} x "
            f"sooner; {row['keys_seen']} of {row['tokens']} keys seen; "
            f"tokens {'equal' if row['equal'] else 'DIFFER'}"
        )
        good = row["warm_ratio"] >= LEAST and row["session"]["ratio"] > 1 and row["equal"]
        missed += [] if good else [mode]
    print("limits missed: " + (", ".join(missed) or "none"))
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    written = {"shape": flags.shape, "prefix": flags.prefix, "least": LEAST, **report}
    flags.out.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    return 1 if missed else 0


def measure(flags: argparse.Namespace, mode: str) -> dict[str, Any]:
    """One attention mode -> seconds, ratios, and whether all texts agree."""
    engine = _engine(flags, mode)
    noise = np.random.default_rng(0)
    vocab = engine.executor.vocab_size
    prefix = noise.integers(3, vocab, flags.prefix).tolist()
    tails = noise.integers(3, vocab, (WARM + 1, TAIL)).tolist()
    first = _answer(engine, prefix + tails[0])
    warm = [_answer(engine, prefix + tail) for tail in tails[1:]]
    assert all(one.reused == flags.prefix for one in warm), "the prefix was not found"
    with tempfile.TemporaryDirectory() as folder:
        again = _session(flags, mode, engine, prefix + tails[-1], Path(folder) / "talk")
    engine.prefixes.clear()
    cold = _answer(engine, prefix + tails[-1])
    assert cold.reused == 0 and again.pop("reused") >= flags.prefix
    colds, warms = [_wait(first), _wait(cold)], [_wait(one) for one in warm]
    texts = [again.pop("token_ids"), warm[-1].token_ids, cold.token_ids]
    median = float(np.median(warms))
    again["ratio"] = min(colds) / (again["load_s"] + again["first_token_s"])
    return {
        "tokens": flags.prefix + TAIL,
        "keys_seen": engine.executor.attention(flags.prefix + TAIL)[1],
        "cold_s": colds,
        "warm_s": {"median": median, "min": min(warms), "max": max(warms)},
        "warm_ratio": min(colds) / median,
        "session": again,
        "equal": all(one == texts[0] for one in texts) and len(set(texts[0])) > 2,
    }


def _session(
    flags: argparse.Namespace, mode: str, engine: Engine, prompt: list[int], path: Path
) -> dict[str, Any]:
    """Save what the engine stored last, load it into a new one and answer `prompt` there."""
    begin = time.perf_counter()
    session.save(path, engine.prefixes, {})
    save_s = time.perf_counter() - begin
    fresh = _engine(flags, mode)
    begin = time.perf_counter()
    session.load(path, fresh.prefixes)
    load_s = time.perf_counter() - begin
    handle = _answer(fresh, prompt)
    return {
        "mib": path.stat().st_size / 2**20,
        "save_s": save_s,
        "load_s": load_s,
        "first_token_s": _wait(handle),
        "reused": handle.reused,
        "token_ids": handle.token_ids,
    }


def _engine(flags: argparse.Namespace, mode: str) -> Engine:
    context = flags.prefix + 1024
    plan = Plan(
        executor="native", attention=mode, quant="int4", context=context, threads=flags.threads,
        max_batch=4,
    )  # fmt: skip
    return Engine(random_executor(flags.shape, plan))


def _answer(engine: Engine, prompt: list[int]) -> Handle:
    sampling = SamplingConfig(temperature=1.0, seed=7, max_tokens=ANSWER)
    handle = engine.submit(Request(tuple(prompt), sampling))
    for _ in handle:
        pass
    return handle


def _wait(handle: Handle) -> float:
    """Seconds from handing in a request to its first token; the engine was idle."""
    return handle.times.first - handle.times.submitted


if __name__ == "__main__":
    raise SystemExit(main())
