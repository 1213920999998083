"""Low-bit projections of the native core: every instruction set of this machine, in turn.

    python bench/native_kernels.py [--rows 1,4,8,16,64,512] [--kind int4] [--group 128]
                                   [--n 4096] [--k 1024] [--threads 1] [--repeats 20]

Each repeat runs every instruction set once, so that a change of the machine meets all alike; the
fastest repeat counts. The time is that of a whole call: quantizing x, the product, storing y.
Prints multiply-adds a second, and for one row the bytes of weights a second.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from endside import native
from endside.native.packed import aligned, linear, pack

SLOW = ("portable",)  # not asked for speed


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


def main() -> None:
    """One line for each number of rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", default="1,4,8,16,64,512")
    parser.add_argument("--kind", default="int4", choices=("int8", "int4", "ternary2", "ternary3"))
    for name, value in (("group", 128), ("n", 4096), ("k", 1024), ("threads", 1), ("repeats", 20)):
        parser.add_argument(f"--{name}", type=int, default=value)
    flags = parser.parse_args()
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
