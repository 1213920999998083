"""Attention inside packed documents, forward and backward: one mask, segments, or tiles.

    python bench/packed_attention.py [--threads 2] [--device cpu] [--dtypes float32,bfloat16]

Rows of documents whose lengths are drawn around a mean, or of one document ("one"). Columns are the
ways of `ops.attention`; "causal" is the whole row as one document through PyTorch's fused kernel,
which computes more and means something else. On CUDA, bfloat16 and the variable-length kernel.
Before anything is timed, the last rows of every way are compared with the reference. Printed are
milliseconds (the median, ways in turn), the way that training takes ("auto"), and how much longer
that one takes than the fastest; the last line has the worst of it. Pages stay with the process, as
they do in training. Writes bench/results/packed_attention.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.attend_cpu import machine
from endside.ops import attention
from endside.ops.attention.packing import Packing
from endside.train.pages import keep_pages

HERE = Path(__file__).resolve().parent
HEADS, GROUPS, WIDTH = 8, 2, 64
ONE = 0  # mean length of a row that is one document
CASES = (
    (4, 512, 150), (4, 512, ONE), (1, 2048, 150), (1, 2048, 1000), (1, 2048, ONE), (1, 4096, ONE),
    (1, 8192, 150), (1, 8192, 1000), (1, 8192, ONE),
)  # fmt: skip
CHECKED = 256  # queries of a row whose output is held against the reference
SECONDS, LEAST = 1.0, 2  # of one way in one case; repeats at least


def main() -> None:
    """Check, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--repeats", type=int, default=7, help="at most")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "packed_attention.json")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    keep_pages()
    cuda = flags.device == "cuda"
    dtypes = ["bfloat16"] if cuda else flags.dtypes.split(",")
    impls = ["sdpa", "segments", "varlen" if cuda else "tiles"]
    columns = "".join(f"{name:>10}" for name in (*impls, "causal"))
    rows = []
    for dtype in dtypes:
        print(f"{dtype:<9}{'rows x tokens':>14}{'mean':>6}{columns}  auto, beside the fastest")
        for case in CASES:
            rows.append({"dtype": dtype, **measure(case, dtype, impls, flags)})
            print(line(rows[-1]), flush=True)
    worst = max(row["beside_fastest"] for row in rows)
    print(f"auto takes at most {worst:.2f} times what the fastest way takes")
    facts = {"machine": machine(), "repeats": flags.repeats, "worst_beside_fastest": worst}
    if cuda:
        facts["gpu"] = torch.cuda.get_device_name()
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    flags.out.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def line(row: dict) -> str:
    """A printed row."""
    size = f"{row['rows']} x {row['tokens']}"
    return (
        f"{'':<9}{size:>14}{row['mean_document'] or 'one':>6}"
        + "".join(f"{x:>10.1f}" for x in row["ms"].values())
        + f"  {row['auto']} {row['beside_fastest']:.2f}"
    )


def owners(rows: int, length: int, mean: int) -> torch.Tensor:
    """(rows, length) int64: documents drawn around a mean length."""
    make = torch.Generator().manual_seed(0)
    begins = torch.rand(rows, length, generator=make) < (1 / mean if mean else 0.0)
    return begins.long().cumsum(1)


def measure(
    case: tuple[int, int, int], dtype: str, impls: list[str], flags: argparse.Namespace
) -> dict:
    """Milliseconds of each way, and of the whole row as one document."""
    rows, length, mean = case
    documents = owners(*case).to(flags.device)
    make = torch.Generator().manual_seed(1)
    leaves = [
        torch.randn(rows, length, n, WIDTH, generator=make)
        .to(flags.device, getattr(torch, dtype))
        .requires_grad_()
        for n in (HEADS, GROUPS, GROUPS)
    ]
    above = torch.randn(leaves[0].shape, generator=make).to(leaves[0])

    def way(impl: str) -> Callable[[], torch.Tensor]:
        # A new packing each time: finding the documents is part of the price.
        packed = (lambda: None) if impl == "causal" else (lambda: Packing(documents))
        name = "sdpa" if impl == "causal" else impl
        return lambda: attention.attend(*leaves, packed(), name)

    ways = {impl: way(impl) for impl in (*impls, "causal")}
    for impl in impls:
        check(impl, ways[impl](), leaves, documents)
    spent: dict[str, list[float]] = {impl: [] for impl in ways}
    for number in range(flags.repeats + 1):
        for impl, run in ways.items():
            if number > LEAST and sum(spent[impl]) > SECONDS * 1e3:
                continue
            begun = time.perf_counter()
            torch.autograd.grad(run(), leaves, above)
            if flags.device == "cuda":
                torch.cuda.synchronize()
            spent[impl].append((time.perf_counter() - begun) * 1e3)
    ms = {impl: round(statistics.median(times[1:]), 2) for impl, times in spent.items()}
    auto = attention.way(*leaves, Packing(documents))
    return {
        "rows": rows, "tokens": length, "mean_document": mean, "ms": ms, "auto": auto,
        "beside_fastest": round(ms[auto] / min(ms[impl] for impl in impls), 3),
    }  # fmt: skip


def check(
    impl: str, out: torch.Tensor, leaves: list[torch.Tensor], documents: torch.Tensor
) -> None:
    """The last queries of every row are the reference's, which never holds a whole square."""
    q, k, v = (leaf.detach() for leaf in leaves)
    truth = attention.attend(q[:, -CHECKED:], k, v, documents, "reference")
    error = (out.detach()[:, -CHECKED:] - truth).abs().max().item()
    assert error < (0.05 if q.dtype == torch.bfloat16 else 1e-4), f"{impl} is off by {error}"


if __name__ == "__main__":
    main()
