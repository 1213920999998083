"""Low-bit projections of the native core: every instruction set of this machine, in turn.

    python bench/native_kernels.py [--rows 1,4,8,16,64,512] [--kind int4] [--group 128]
                                   [--n 4096] [--k 1024] [--threads 1] [--repeats 20]

Each repeat runs every instruction set once, so that a change of the machine meets all alike; the
fastest repeat counts. The time is that of a whole call: quantizing x, the product, storing y.
Prints multiply-adds a second, and for one row the bytes of weights a second.

    python bench/native_kernels.py --step minicpm4-0.5b [--kind int4] [--head int4] [--threads 2]
                                   [--isa auto]

A whole decode step of a model with random weights instead: microseconds of each stage as the first
thread sees them, waiting included, and bytes of weights a second where it reads some; the repeat
with the fastest tokens counts.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from endside import native
from endside.native.packed import aligned, linear, pack

SLOW = ("portable",)  # not asked for speed
TOKENS = 32  # of a repeat with --step


def fastest(flags: argparse.Namespace, rows: int) -> tuple[dict[str, float], int]:
    """Seconds of the fastest call by instruction set, and the bytes of the weights."""
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((flags.n, flags.k), np.float32)
    packed = pack(weight, flags.kind, group=flags.group)
    x = generator.standard_normal((rows, flags.k), np.float32)
    out = aligned(rows * flags.n, np.float32).reshape(rows, flags.n)
    isas = [isa for isa in native.available_isas() if isa not in SLOW]
    best = dict.fromkeys(isas, float("inf"))
    for _ in range(flags.repeats):
        for isa in isas:
            begun = time.perf_counter()
            linear(x, packed, out=out, threads=flags.threads, isa=isa)
            best[isa] = min(best[isa], time.perf_counter() - begun)
    return best, packed.nbytes


def step(flags: argparse.Namespace) -> None:
    """One line for each stage of a decode step."""
    from endside.engine.executors import Plan
    from endside.engine.executors.native import random_executor
    from endside.engine.measure import Bench

    quant = "ternary" if flags.kind.startswith("ternary") else flags.kind
    plan = Plan(executor="native", attention="dense", quant=quant, group=flags.group,
                head=flags.head, isa=flags.isa, threads=flags.threads, context=1024)  # fmt: skip
    executor = random_executor(flags.step, plan)
    bench, found = Bench(executor), []
    for _ in range(flags.repeats):
        bench.decode(4)  # finds the weights gone from the last cache, as after any pause
        executor.model.set_timing(True)
        token = sum(bench.decode(TOKENS)) / TOKENS
        found.append((token, executor.model.timing()))
    token, stages = min(found, key=lambda one: one[0])
    matrices = executor.pack.matrices
    sizes = {name: sum(one.nbytes for key, one in matrices.items() if key.endswith(name))
             for name in stages}  # fmt: skip
    stages["between steps"] = token * TOKENS - sum(stages.values())
    for name, seconds in [*stages.items(), ("token", token * TOKENS)]:
        size = sum(sizes.values()) if name == "token" else sizes.get(name, 0)
        rate = f"{size * TOKENS / seconds / 1e9:8.1f} GB/s" if size else ""
        print(f"{name:<14}{seconds / TOKENS * 1e6:9.0f} us{rate}")


def main() -> None:
    """One line for each number of rows, or for each stage of a step."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", default="1,4,8,16,64,512")
    parser.add_argument("--kind", default="int4", choices=("int8", "int4", "ternary2", "ternary3"))
    for name, value in (("group", 128), ("n", 4096), ("k", 1024), ("threads", 1), ("repeats", 20)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--step", metavar="PRESET", help="a whole decode step of this shape")
    parser.add_argument("--head", default="int4", help="bits of the output head, with --step")
    parser.add_argument("--isa", default="auto", help="instruction set, with --step")
    flags = parser.parse_args()
    if flags.step:
        step(flags)
        return
    print(f"{flags.kind} group {flags.group}, W {flags.n} x {flags.k}, {flags.threads} thread(s)")
    for rows in map(int, flags.rows.split(",")):
        best, size = fastest(flags, rows)
        work = rows * flags.n * flags.k
        cells = [f"{isa} {work / seconds / 1e9:.0f}" for isa, seconds in best.items()]
        if rows == 1:
            cells += [f"{isa} {size / seconds / 1e9:.1f} GB/s" for isa, seconds in best.items()]
        print(f"{rows:5} rows, G multiply-adds/s: {', '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
