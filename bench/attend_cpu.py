"""One attention layer on this CPU: InfLLM v2 against dense attention, as the context grows.

    python bench/attend_cpu.py [--quick] [--depths 4096,8192,...] [--repeats 7] [--threads 2]

Two layers are measured, of the 0.5B and of the 8B shape, each with 512 new tokens and with one
decode step behind every depth. Sparse includes choosing blocks; summaries come from the cache, as
they do in the model. Dense is the fastest of several ways to call PyTorch's attention, found anew
for every row and named in the result. Both run alternately in the same process, on float32 normal
random numbers: choices then overlap little between queries, which is the slow case for sparse.

A row counts only where sparsity acts: fewer than half of the available tokens visible. Totals over
all layers of a model are derived from one layer, not measured. The tests of the CPU path run first.
Writes bench/results/attend_cpu.json and a plot of cost against depth beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from endside.ops.attention.sdpa import attend as attend_dense
from endside.ops.infllm import attend, attend_stats
from endside.ops.infllm.config import SparseConfig
from endside.ops.infllm.reference import summarise

ROOT = Path(__file__).resolve().parent.parent
DEPTHS = (4096, 8192, 16384, 32768, 65536, 131072)
SPARSE = SparseConfig(dense_len=-1)  # as released, except that no length is dense by decree

Call = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """One attention layer."""

    name: str
    heads: int
    groups: int
    width: int
    layers: int  # of the whole model, for derived totals


SHAPES = (Shape("0.5B", 16, 2, 64, 24), Shape("8B", 32, 2, 128, 32))


@dataclass(frozen=True)
class Row:
    """One measurement: milliseconds of every repeat, and what they mean."""

    shape: str
    new: int
    depth: int  # tokens in the cache before the new ones
    dense_ms: list[float]
    sparse_ms: list[float]
    dense_call: str
    visible: float  # mean tokens a query attends to
    available: float
    counts: bool  # visible / available < 0.5
    layers: int

    @property
    def ratio(self) -> float:
        """Dense over sparse, of medians: above 1 sparse is faster."""
        return statistics.median(self.dense_ms) / statistics.median(self.sparse_ms)

    def record(self) -> dict:
        """All fields, the medians, and totals that are derived from one layer."""
        medians = {
            name: statistics.median(values)
            for name, values in (("dense", self.dense_ms), ("sparse", self.sparse_ms))
        }
        return asdict(self) | {
            "median_ms": medians,
            "dense_over_sparse": self.ratio,
            "visible_over_available": self.visible / self.available,
            "derived_all_layers_ms": {k: self.layers * v for k, v in medians.items()},
        }

    def line(self) -> str:
        """The row of the printed table."""
        dense, sparse = (_spread(x) for x in (self.dense_ms, self.sparse_ms))
        share = self.visible / self.available
        note = "" if self.counts else "  (does not count)"
        return (
            f"{self.shape:>5}{self.new:>5}{self.depth:>8}{dense:>30}{sparse:>30}"
            f"{self.ratio:>7.2f}{share:>7.2f}  {self.dense_call}{note}"
        )


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} [{min(values):.2f} .. {max(values):.2f}]"


def main() -> int:
    """Test, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depths", type=lambda s: tuple(map(int, s.split(","))), default=DEPTHS)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--quick", action="store_true", help="two depths, 3 repeats, no tests")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/attend_cpu.json")
    flags = parser.parse_args()
    if flags.quick:
        flags.depths, flags.repeats = (4096, 16384), 3
    elif subprocess.call([sys.executable, "-m", "pytest", "-q", "tests/ops/infllm"], cwd=ROOT):
        return 1
    torch.set_num_threads(flags.threads)
    torch.set_grad_enabled(False)
    header = ("shape", "new", "depth", "dense ms", "sparse ms", "ratio", "seen")
    print("{:>5}{:>5}{:>8}{:>30}{:>30}{:>7}{:>7}  fastest dense call".format(*header))
    rows = []
    for shape in SHAPES:
        for depth in flags.depths:
            for new in (512, 1):
                rows.append(measure(shape, new, depth, flags.repeats))
                print(rows[-1].line(), flush=True)
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine(), "sparse_config": asdict(SPARSE), "dtype": "float32"}
    report["rows"] = [row.record() for row in rows]
    flags.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    draw(rows, flags.out.with_suffix(".png"))
    return 0


def measure(shape: Shape, new: int, depth: int, repeats: int) -> Row:
    """Time both, alternating, after one untimed call each."""
    length = depth + new
    make = torch.Generator().manual_seed(depth + new)
    q = 2 * torch.randn(1, new, shape.heads, shape.width, generator=make)
    k, v = (torch.randn(1, length, shape.groups, shape.width, generator=make) for _ in range(2))
    summaries = summarise(k, SPARSE)
    stats = attend_stats(new, length, SPARSE)
    counts = stats.ratio < 0.5
    assert counts or depth < 2 * SPARSE.budget, f"sparsity does not act at depth {depth}: {stats}"
    name, dense = fastest(dense_calls(q, k, v))
    sparse = lambda: attend(q, k, v, sparse=SPARSE, summaries=summaries, impl="vectorised")
    sparse()
    dense_ms, sparse_ms = [], []
    for _ in range(repeats):
        dense_ms.append(milliseconds(dense))
        sparse_ms.append(milliseconds(sparse))
    return Row(
        shape.name, new, depth, dense_ms, sparse_ms, name,
        stats.visible, stats.available, counts, shape.layers,
    )  # fmt: skip


def milliseconds(call: Call) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def fastest(calls: dict[str, Call]) -> tuple[str, Call]:
    """The call with the shortest of two runs, after a first one to warm up (skipped when slow)."""
    best, winner = float("inf"), ""
    for name, call in calls.items():
        took = milliseconds(call)
        if took < 2e3:
            took = min(milliseconds(call), milliseconds(call))
        if took < best:
            best, winner = took, name
    return winner, calls[winner]


def dense_calls(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, Call]:
    """Ways to attend densely; preparing another layout of the keys is not charged to them."""
    new, length, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    query = q.transpose(1, 2)
    keys, values = (x.transpose(1, 2).contiguous() for x in (k, v))
    attention = F.scaled_dot_product_attention
    if new == 1:
        rows = q.view(1, k.shape[2], group, -1)  # the heads of a group as rows
        product = lambda: torch.bmm(
            (torch.bmm(rows[0], keys[0].transpose(1, 2)) * q.shape[-1] ** -0.5).softmax(-1),
            values[0],
        )
        return {
            "heads as rows": lambda: attend_dense(q, k, v),
            "heads as rows, keys heads first": lambda: attention(rows, keys, values),
            "two products": product,
            "enable_gqa": lambda: attention(query, keys, values, enable_gqa=True),
        }
    mask = torch.ones(new, length, dtype=torch.bool).tril(length - new)
    bias = torch.zeros(new, length).masked_fill(~mask, -torch.inf)
    wide_keys, wide_values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
    return {
        "tiled mask": lambda: attend_dense(q, k, v),
        "enable_gqa": lambda: attention(query, keys, values, attn_mask=bias, enable_gqa=True),
        "expanded keys": lambda: attention(query, wide_keys, wide_values, attn_mask=bias),
    }


def machine() -> dict[str, str | int | None]:
    """Processor, threads, versions, commit."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((s.split(":")[1].strip() for s in lines if s.startswith("model name")), None)
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return {
        "processor": model or platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": found.stdout.strip() if found.returncode == 0 else None,
    }


def draw(rows: list[Row], path: Path) -> None:
    """Cost against depth, one panel per shape and number of new tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 2, figsize=(9, 7), sharex=True)
    for line, shape in zip(panels, SHAPES, strict=True):
        for panel, new in zip(line, (512, 1), strict=True):
            part = [row for row in rows if (row.shape, row.new) == (shape.name, new)]
            depths = [row.depth for row in part]
            for name in ("dense", "sparse"):
                runs = [getattr(row, f"{name}_ms") for row in part]
                panel.plot(depths, [statistics.median(r) for r in runs], "o-", label=name)
                panel.fill_between(
                    depths, [min(r) for r in runs], [max(r) for r in runs], alpha=0.2
                )
            panel.axvline(2 * SPARSE.budget, color="grey", linestyle=":", linewidth=1)
            panel.set(xscale="log", yscale="log", ylabel="ms per layer")
            panel.set_title(f"{shape.name} shape, {new} new token{'s' * (new > 1)}")
            panel.set_xticks(depths, [f"{d // 1024}K" for d in depths], minor=False)
            panel.minorticks_off()
            panel.legend()
    for panel in panels[1]:
        panel.set_xlabel("tokens in the cache")
    figure.suptitle(
        "One attention layer on the CPU, block choice included\n"
        "(right of the dotted line sparse sees fewer than half of the tokens)"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
