"""This engine against llama.cpp on this CPU: the same shape, the same threads, in one run.

    python bench/vs_llamacpp.py [--quick] [--cells NAMES] [--threads 2] [--peer-dir DIR]
    python bench/vs_llamacpp.py --validate      are repeated cache states as slow as real ones?

The peer is llama_decode itself (bench/peer_bench.cc) in a library built from source for this
processor (bench/peer_llamacpp.py), with Q4_0 and the Q6_K head of its own quantizer or TQ2_0, f16
cache (ours: f16, and bf16 on processors with tiles), and in each cell the faster of flash attention
on and off. Random weights and random tokens
on both sides. Rounds are A B A B with the bandwidth probe between, on a buffer as large as our
bytes per token and in the same kind of pages (bench/peer_duel.py); a cell's ratio is the median of
its rounds', and its spread is printed. Depths are repeated states, validated by --validate. What
the peer needs for a whole prompt of 32K is integrated from its speed at depths, and marked so.
A sparse cell counts only where fewer than half of the available tokens are seen: asserted.

Writes bench/results/vs_llamacpp.json and a plot beside it; exits with 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import peer_llamacpp
from peer_duel import Probe, Rounds, Worker, duel, page_kind, spread, worker

from endside import native
from endside.engine.executors import Plan
from endside.engine.executors.native_plan import cache_type
from endside.model.presets import preset

RESULTS = Path(__file__).resolve().parent / "results"
PREFIX = {"ours": 4096, "peer": 512}  # tokens of a depth that are computed; the rest are copies
POINTS = (0, 4096, 16384, 32256)  # depths at which the peer's whole prompt is sampled
ROOM = 1024  # tokens of context behind a depth


@dataclass(frozen=True)
class Engine:
    """A loaded pair: our command-line flags, and the peer's model."""

    preset: str
    flags: tuple[str, ...]
    context: int
    peer: str


_INT4 = ("--quant", "int4", "--group", "128", "--head", "int4")
ENGINES = {
    "dense": Engine("minicpm4-0.5b", (*_INT4, "--attention", "dense"), 32768, "0.5b-q4_0"),
    "sparse": Engine("minicpm4-0.5b", (*_INT4, "--attention", "sparse"), 131072, "0.5b-q4_0"),
    "ternary": Engine(
        "minicpm4-0.5b", ("--quant", "ternary", "--head", "int8", "--attention", "dense"),
        4096, "0.5b-tq2_0",
    ),
    "8b": Engine("minicpm4-8b", (*_INT4, "--attention", "dense"), 4096, "8b-q4_0"),
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One line of the table."""

    name: str
    engine: str
    kind: str  # "decode", "prefill", "prompt"
    depth: int
    tokens: int  # timed at once
    rounds: int
    seconds: float  # no round begins after that
    target: float  # of the ratio; for `limit` cells of the share of bandwidth
    limit: bool = False
    peer_tokens: int | None = None  # where fewer are enough to time the peer
    choose_tokens: int | None = None  # for the choice of flash attention


CELLS = (
    Cell("decode", "dense", "decode", 0, 64, 9, 30, 0.85, limit=True),
    Cell("prefill 512", "dense", "prefill", 0, 512, 5, 60, 1.9),
    Cell("prefill 4096", "dense", "prefill", 0, 4096, 2, 120, 2.2, choose_tokens=2048),
    Cell("decode at 16K", "dense", "decode", 16384, 16, 5, 40, 3.5, peer_tokens=4),
    Cell("decode at 32K", "dense", "decode", 32768, 16, 5, 40, 4.5, peer_tokens=3),
    Cell("sparse decode at 32K", "sparse", "decode", 32768, 32, 5, 40, 9, peer_tokens=3),
    Cell("sparse decode at 128K", "sparse", "decode", 131072, 32, 4, 40, 30, peer_tokens=2),
    Cell("sparse prefill at 32K", "sparse", "prefill", 32768, 512, 2, 60, 10, choose_tokens=64),
    Cell("sparse prefill at 64K", "sparse", "prefill", 65536, 512, 2, 100, 20, choose_tokens=64),
    Cell("sparse prompt of 32K", "sparse", "prompt", 0, 32768, 1, 0, 6, choose_tokens=64),
    Cell("ternary decode", "ternary", "decode", 0, 64, 9, 30, 1.5),
    Cell("ternary prefill 512", "ternary", "prefill", 0, 512, 5, 60, 2.6),
    Cell("8B decode", "8b", "decode", 0, 8, 5, 60, 0.85, limit=True),
)
SLOW = {"sparse prefill at 64K", "sparse prompt of 32K", "8B decode"}


class Pair:
    """Our worker and the peer's, and what they need between cells."""

    def __init__(self, name: str, folder: Path, threads: int, ours: Worker, peer: Worker) -> None:
        self.name, self.ours, self.peer = name, ours, peer
        self.bytes = int(ours.ask("weights")["bytes"])
        ours.ask("depth", 0, PREFIX["ours"])
        ours.ask("decode", 2)
        self._standing: tuple[int, int] | None = None  # depth and flash setting of the peer
        pages = page_kind(ours.pid, self.bytes)
        self.probe = Probe(peer_llamacpp.limits(folder), threads, self.bytes, pages)

    def run(self, cell: Cell, rounds: int) -> dict[str, Any]:
        """The cell's rounds, summed up."""
        if cell.kind == "prompt":
            found, extra = self._prompt(cell)
        else:
            found, extra = self._duel(cell, rounds)
        return {**_summary(cell, found, self.bytes, self.probe.pages), **extra}

    def _duel(self, cell: Cell, rounds: int) -> tuple[Rounds, dict[str, Any]]:
        flash, tried = self._choose_flash(cell)
        self.ours.ask("depth", cell.depth, PREFIX["ours"])
        self._peer_stands(cell.depth, flash)
        sparse = cell.engine == "sparse"
        verb = "sight" if sparse else "expected"  # counted where it matters
        sight = self.ours.ask(verb, 1 if cell.kind == "decode" else cell.tokens)
        if sparse:
            assert sight["visible"] < 0.5 * sight["available"], f"{cell.name}: not sparse: {sight}"
        peer_tokens = cell.peer_tokens or cell.tokens
        sides = ((self.ours, cell.tokens), (self.peer, peer_tokens))
        for one, count in sides:  # once unmeasured: first touches, clocks, caches
            rate(one, cell.kind, min(count, 8 if cell.depth else 512))()
        ours, peer = (rate(one, cell.kind, count) for one, count in sides)
        found = duel(ours, peer, self.probe, rounds=rounds, seconds=cell.seconds)
        extra = {"flash": flash, "peer_by_flash": tried, "peer_tokens": peer_tokens,
                 "depth_made_of_copies": cell.depth > 0, **sight}  # fmt: skip
        return found, extra

    def _choose_flash(self, cell: Cell) -> tuple[int, dict[str, float]]:
        """The faster setting of the peer, and its rate with each (the better of two tries)."""
        count, tried = cell.choose_tokens or cell.peer_tokens or cell.tokens, {}
        for flash in (0, 1):
            self._peer_stands(cell.depth, flash)
            measured = rate(self.peer, cell.kind, count)
            tried[flash] = max(measured() for _ in range(1 if cell.choose_tokens else 2))
        return max(tried, key=tried.__getitem__), {str(key): tried[key] for key in tried}

    def _peer_stands(self, depth: int, flash: int) -> None:
        if self._standing != (depth, flash):
            self.peer.ask("context", depth + ROOM + (0 if depth else 4096), flash)
            self.peer.ask("depth", depth, PREFIX["peer"])
        self._standing = (depth, flash)

    def _prompt(self, cell: Cell) -> tuple[Rounds, dict[str, Any]]:
        """A whole prompt: ours run, the peer's integrated over the depth (trapezoids)."""
        before = self.probe()
        self.ours.ask("depth", 0, PREFIX["ours"])
        ours = self.ours.ask("prefill", cell.tokens)["seconds"]
        flash, tried = self._choose_flash(replace(cell, kind="prefill", depth=POINTS[2]))
        costs = []
        for depth in POINTS:
            self._peer_stands(depth, flash)
            costs.append(self.peer.ask("prefill", 512)["seconds"] / 512)
        # The cost of a token grows linearly with depth; each point is the middle of its 512.
        places = [point + 256 for point in POINTS]
        peer = costs[0] * places[0] + costs[-1] * (cell.tokens - places[-1])
        pieces = zip(itertools.pairwise(places), itertools.pairwise(costs), strict=True)
        peer += sum((b - a) * (x + y) / 2 for (a, b), (x, y) in pieces)
        found = Rounds([cell.tokens / ours], [cell.tokens / peer], [before, self.probe()])
        self.ours.ask("depth", 0, PREFIX["ours"])
        sight = self.ours.ask("expected", cell.tokens)
        assert sight["visible"] < 0.5 * sight["available"], f"{cell.name}: not sparse: {sight}"
        self.ours.ask("depth", cell.tokens - 512, PREFIX["ours"])
        counted = self.ours.ask("sight", 512)
        points = dict(zip(map(str, POINTS), costs, strict=True))
        return found, {"peer_integrated": True, "peer_seconds_per_token": points, "flash": flash,
                       "peer_by_flash": tried, "at_the_end": counted, **sight}  # fmt: skip


def rate(one: Worker, kind: str, count: int) -> Callable[[], float]:
    """Tokens per second of one measurement of `count` tokens."""
    verb = "decode" if kind == "decode" else "prefill"
    return lambda: count / one.ask(verb, count)["seconds"]


def _summary(cell: Cell, found: Rounds, size: int, pages: str) -> dict[str, Any]:
    shares = found.limit_shares(size) if cell.kind == "decode" else []
    ratio = spread(found.ratios)
    reached = spread(shares)["median"] if cell.limit else ratio["median"]
    return {
        **asdict(cell), "rounds": asdict(found), "ours": spread(found.ours),
        "peer": spread(found.peer), "ratio": ratio, "bandwidth": spread(found.bandwidth),
        "weight_bytes": size, "pages": pages,
        "share_of_bandwidth": spread(shares) if shares else None,
        "reached": reached, "met": reached >= cell.target,
    }  # fmt: skip


def _commands(engine: Engine, folder: Path, threads: int) -> tuple[list, list]:
    ours = [sys.executable, "-m", "endside", "bench", f"random:{engine.preset}", "--serve",
            *engine.flags, "--threads", threads,
            "--context", engine.context]  # fmt: skip
    model = peer_llamacpp.model(folder, engine.peer)
    return ours, [peer_llamacpp.driver(folder), "serve", model, threads]


def _run_cells(
    cells: list[Cell], flags: argparse.Namespace, done: Callable[[dict[str, Any]], None]
) -> None:
    """Every cell; each is handed to `done` at once, so that an interrupted run keeps its rows."""
    for name, group in itertools.groupby(cells, key=lambda cell: cell.engine):
        ours, peer = _commands(ENGINES[name], flags.peer_dir, flags.threads)
        with worker(ours) as one, worker(peer) as other:
            pair = Pair(name, flags.peer_dir, flags.threads, one, other)
            for cell in group:
                begun = time.monotonic()
                row = pair.run(cell, 2 if flags.quick else cell.rounds)
                row["took_s"] = time.monotonic() - begun
                row["at"] = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
                print(_line(row), flush=True)
                done(row)


def _memory(flags: argparse.Namespace) -> dict[str, Any]:
    """Most resident memory at 128K. The peer's prompt piece is short: a lower bound of its peak."""
    ours, peer = _commands(ENGINES["sparse"], flags.peer_dir, flags.threads)
    depth, peaks = 131072, {}
    with worker(ours) as one:
        one.ask("depth", depth, PREFIX["ours"])
        one.ask("prefill", 512)
        one.ask("decode", 2)
        peaks["ours"] = one.ask("memory")["peak_bytes"]
    with worker(peer) as one:
        one.ask("context", depth + ROOM, 1)
        one.ask("depth", depth, PREFIX["peer"])
        one.ask("forget")  # building the repeated state took memory that a user would not need
        one.ask("prefill", 32)
        one.ask("decode", 1)
        peaks["peer"] = one.ask("memory")["peak_bytes"]
    ratio = peaks["ours"] / peaks["peer"]
    print(f"{'memory at 128K':<24}{peaks['ours'] / 2**20:>10,.0f} MiB, peer at least "
          f"{peaks['peer'] / 2**20:,.0f} MiB: {ratio:.2f} x, target at most 1: "
          f"{_verdict(ratio <= 1)}", flush=True)  # fmt: skip
    return {**peaks, "ratio": ratio, "target": 1, "met": ratio <= 1}


def _validate(flags: argparse.Namespace) -> dict[str, Any]:
    """Seconds behind a real prefill and behind a repeated state, in turn, of both engines."""
    report: dict[str, Any] = {}
    for name in ("dense", "sparse"):
        ours, peer = _commands(ENGINES[name], flags.peer_dir, flags.threads)
        sides = {f"ours {name}": (ours, PREFIX["ours"]), "peer": (peer, PREFIX["peer"])}
        for side, (command, prefix) in sides.items():
            if side in report:
                continue
            with worker(command) as one:
                report[side] = {}
                for depth in (4096, 16384):
                    if side == "peer":
                        one.ask("context", depth + ROOM, 1)
                    base = min(prefix, depth // 4)
                    # The peer keeps both states and may go back and forth; ours once.
                    turns = 2 if side == "peer" else 1
                    report[side][str(depth)] = _real_and_copied(one, depth, base, turns)
                    print(side, depth, report[side][str(depth)]["ratio"], flush=True)
    return report


def _real_and_copied(one: Worker, depth: int, base: int, turns: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {"decode real": [], "decode copied": [],
                                       "prefill real": [], "prefill copied": []}  # fmt: skip
    for way, real in (("copied", base), ("real", depth)) * turns:
        one.ask("depth", depth, real)
        for _ in range(3):
            seconds[f"decode {way}"].append(one.ask("decode", 6)["seconds"])
            seconds[f"prefill {way}"].append(one.ask("prefill", 64)["seconds"])
    ratio = {kind: spread([a / b for a, b in
                           zip(seconds[f"{kind} copied"], seconds[f"{kind} real"], strict=True)])
             for kind in ("decode", "prefill")}  # fmt: skip
    return {**seconds, "ratio": ratio}


def _line(row: dict[str, Any]) -> str:
    ratio = row["ratio"]
    text = (f"{row['name']:<24}{row['ours']['median']:>10.1f} {row['peer']['median']:>9.2f}"
            f"{ratio['median']:>8.2f} [{ratio['min']:.2f} .. {ratio['max']:.2f}]")  # fmt: skip
    if row["share_of_bandwidth"]:
        text += f"  {row['share_of_bandwidth']['median']:.0%} of bandwidth"
    goal = f"{row['target']:.0%} of bandwidth" if row["limit"] else f"{row['target']:g} x"
    seen = f", sees {row['visible']:,.0f} of {row['available']:,.0f}" if "visible" in row else ""
    integrated = ", peer integrated" if row.get("peer_integrated") else ""
    return f"{text}  target {goal}: {_verdict(row['met'])}{seen}{integrated}"


def _verdict(met: bool) -> str:
    return "met" if met else "MISSED"


def _machine(flags: argparse.Namespace) -> dict[str, Any]:
    named = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().split("\n")
             if line.startswith("model name")]  # fmt: skip
    return {"cpu": named[0] if named else platform.machine(), "cores": os.cpu_count(),
            "threads": flags.threads, "load": os.getloadavg()[0],
            "ours": native.status(),
            "our_cache": cache_type(Plan(), preset(ENGINES["dense"].preset)),
            "peer": peer_llamacpp.PACKAGE,
            "peer_system": peer_llamacpp.system(flags.peer_dir, flags.threads)}  # fmt: skip


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.45 * len(rows) + 1.2))
    names, ratios = [row["name"] for row in rows], [row["ratio"] for row in rows]
    middle = [ratio["median"] for ratio in ratios]
    ends = [[ratio["median"] - ratio["min"] for ratio in ratios],
            [ratio["max"] - ratio["median"] for ratio in ratios]]  # fmt: skip
    axes.barh(names, middle, xerr=ends, color="#4c78a8", capsize=3)
    goals = [(row["name"], row["target"]) for row in rows if not row["limit"]]
    axes.scatter([goal for _, goal in goals], [name for name, _ in goals], marker="|", s=200,
                 color="#e45756", zorder=3, label="target")  # fmt: skip
    axes.set_xscale("log")
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_xlabel("tokens per second over llama.cpp's, median and extremes of paired rounds")
    axes.invert_yaxis()
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two rounds, without the slow cells")
    parser.add_argument("--cells", help="names separated by commas; `memory` is one")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--peer-dir", type=Path, default=peer_llamacpp.default_folder())
    parser.add_argument("--validate", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "vs_llamacpp.json")
    flags = parser.parse_args()
    known = [*(cell.name for cell in CELLS), "memory"]
    chosen = flags.cells.split(",") if flags.cells else [
        name for name in known if not (flags.quick and name in SLOW)]  # fmt: skip
    unknown = sorted(set(chosen) - set(known))
    if unknown:
        parser.error(f"no cell is called {', '.join(unknown)}: use {', '.join(known)}")
    flags.chosen = chosen
    return flags


def main() -> int:
    """Measure, print, write; 1 where a target is missed."""
    flags = _flags()
    # Results of another kind, from an earlier run, stay in the file.
    report = json.loads(flags.out.read_text()) if flags.out.exists() else {}
    report |= {"machine": _machine(flags), "cells": report.get("cells", [])}
    print(report["machine"]["peer_system"])
    flags.out.parent.mkdir(parents=True, exist_ok=True)

    def done(row: dict[str, Any] | None = None) -> None:
        kept = {one["name"]: one for one in report["cells"]} | ({row["name"]: row} if row else {})
        report["cells"] = [kept[cell.name] for cell in CELLS if cell.name in kept]
        flags.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    if flags.validate:
        report["validation"] = _validate(flags)
    else:
        print(f"{'cell':<24}{'ours tok/s':>10} {'peer':>9}{'ratio':>8} [of paired rounds]")
        _run_cells([cell for cell in CELLS if cell.name in flags.chosen], flags, done)
        if "memory" in flags.chosen:
            report["memory"] = _memory(flags)
    done()
    if report["cells"]:
        _plot(report["cells"], flags.out.with_suffix(".png"))
    verdicts = [row["met"] for row in [*report.get("cells", []), report.get("memory")] if row]
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
