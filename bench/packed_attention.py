"""Attention inside packed documents, forward and backward: one mask of the row, or segments.

    python bench/packed_attention.py [--threads 1] [--device cpu]

Rows of documents whose lengths are drawn around a mean; "causal" is the whole row as one document,
which computes more and means something else. On CUDA, bfloat16 and the variable-length kernel.
The results are compared with the reference before anything is timed. Prints milliseconds (the
median of the repeats, interleaved) and writes bench/results/packed_attention.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from endside.ops import attention
from endside.ops.attention.packing import Packing

HERE = Path(__file__).resolve().parent
HEADS, GROUPS, WIDTH = 8, 2, 64
CASES = ((8, 256, 60), (4, 512, 120), (2, 2048, 150), (2, 2048, 700), (1, 4096, 20), (1, 4096, 500))


def main() -> None:
    """Check, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "packed_attention.json")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    impls = ["sdpa", "segments"] + ["varlen"] * (flags.device == "cuda")
    print(f"{'rows x tokens':>14}{'mean':>6}" + "".join(f"{n:>12}" for n in (*impls, "causal")))
    rows = []
    for batch, length, mean in CASES:
        row = measure(batch, length, mean, impls, flags)
        rows.append({"rows": batch, "tokens": length, "mean_document": mean, "ms": row})
        print(
            f"{f'{batch} x {length}':>14}{mean:>6}" + "".join(f"{x:>12.2f}" for x in row.values())
        )
    machine = torch.cuda.get_device_name() if flags.device == "cuda" else platform.processor()
    facts = {"machine": machine, "threads": flags.threads, "torch": torch.__version__}
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    flags.out.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def measure(
    batch: int, length: int, mean: int, impls: list[str], flags: argparse.Namespace
) -> dict[str, float]:
    """Milliseconds of each way, and of the whole row as one document."""
    make = torch.Generator().manual_seed(0)
    documents = (torch.rand(batch, length, generator=make) < 1 / mean).cumsum(1).to(flags.device)
    dtype = torch.bfloat16 if flags.device == "cuda" else torch.float32
    leaves = [
        torch.randn(batch, length, n, WIDTH, generator=make)
        .to(flags.device, dtype)
        .requires_grad_()
        for n in (HEADS, GROUPS, GROUPS)
    ]
    truth = attention.attend(*leaves, documents, "reference")

    def way(impl: str) -> Callable[[], torch.Tensor]:
        # A new packing each time: finding the documents is part of the price.
        owners = (lambda: None) if impl == "causal" else (lambda: Packing(documents))
        name = "auto" if impl == "causal" else impl
        return lambda: attention.attend(*leaves, owners(), name)

    ways = {impl: way(impl) for impl in (*impls, "causal")}
    for impl in impls:
        error = (ways[impl]() - truth).abs().max().item()
        assert error < (0.05 if dtype == torch.bfloat16 else 1e-4), f"{impl} is off by {error}"
    spent: dict[str, list[float]] = {impl: [] for impl in ways}
    for _ in range(flags.repeats + 1):
        for impl, run in ways.items():
            begun = time.perf_counter()
            run().float().sum().backward()
            if flags.device == "cuda":
                torch.cuda.synchronize()
            spent[impl].append((time.perf_counter() - begun) * 1e3)
    return {impl: round(statistics.median(times[1:]), 3) for impl, times in spent.items()}


if __name__ == "__main__":
    main()
