"""Two engines in turn, A B A B, with a look at the memory between: what a fair ratio needs.

A machine drifts, by a factor of two within a minute where it is shared. So both engines stay
loaded, each in a process of its own that answers commands on standard input; one round asks the
memory probe, then ours, then the peer; and only ratios within a round are compared.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class Worker:
    """A process that answers each line of input with one line of JSON."""

    def __init__(self, command: list[str | Path]) -> None:
        words = [str(word) for word in command]
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.pid = self._process.pid
        self.greeting = self._read("start")

    def ask(self, *words: object) -> dict[str, Any]:
        """One command; its answer. Raises SystemExit with what went wrong."""
        line = " ".join(str(word) for word in words)
        assert self._process.stdin is not None, "opened with a pipe"
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._read(line)

    def close(self) -> None:
        """End the process."""
        self._process.communicate("quit\n", timeout=60)

    def _read(self, line: str) -> dict[str, Any]:
        assert self._process.stdout is not None, "opened with a pipe"
        text = self._process.stdout.readline()
        if not text:
            raise SystemExit(f"{self._process.args[0]} ended at {line!r}")  # type: ignore[index]
        answer = json.loads(text)
        if "error" in answer:
            raise SystemExit(f"{self._process.args[0]}: {answer['error']}")  # type: ignore[index]
        return answer


@contextmanager
def worker(command: list[str | Path]) -> Iterator[Worker]:
    """A worker that is gone afterwards."""
    one = Worker(command)
    try:
        yield one
    finally:
        one.close()


@dataclass(frozen=True)
class Probe:
    """Memory bandwidth for a buffer of `size` bytes: bytes per second, median of some reads."""

    program: Path
    threads: int
    size: int
    pages: str  # "small" or "huge": what the weights lie in

    def __call__(self) -> float:
        words = ["bandwidth", self.threads, self.size, self.pages, 5]
        done = subprocess.run(
            [str(one) for one in (self.program, *words)], capture_output=True, text=True, check=True
        )
        return json.loads(done.stdout)["gb_s"]["median"] * 1e9


@dataclass
class Rounds:
    """Rates (tokens per second) and bandwidths of the rounds of one cell."""

    ours: list[float] = field(default_factory=list)
    peer: list[float] = field(default_factory=list)
    bandwidth: list[float] = field(default_factory=list)  # one more: before, between and after

    @property
    def ratios(self) -> list[float]:
        """Ours over the peer's, round by round."""
        return [a / b for a, b in zip(self.ours, self.peer, strict=True)]

    def limit_shares(self, token_bytes: float) -> list[float]:
        """How much of the bandwidth measured around it each round of ours reached."""
        around = zip(self.bandwidth, self.bandwidth[1:], strict=False)
        means = [(before + after) / 2 for before, after in around]
        return [rate * token_bytes / mean for rate, mean in zip(self.ours, means, strict=True)]


def duel(
    ours: Callable[[], float],
    peer: Callable[[], float],
    probe: Callable[[], float],
    *,
    rounds: int,
    seconds: float,
) -> Rounds:
    """At most `rounds` rounds; no further one begins after `seconds`."""
    found, begun = Rounds([], [], [probe()]), time.monotonic()
    for _ in range(rounds):
        found.ours.append(ours())
        found.peer.append(peer())
        found.bandwidth.append(probe())
        if time.monotonic() - begun > seconds:
            break
    return found


def spread(values: list[float]) -> dict[str, float]:
    """Median and extremes."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def page_kind(pid: int, size: int) -> str:
    """ "huge" where more than half of `size` bytes of that process lie in huge pages."""
    huge = 0
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, rest = line.split(":", 1)
        if name in ("AnonHugePages", "ShmemPmdMapped", "FilePmdMapped"):
            huge += int(rest.split()[0]) * 1024
    return "huge" if huge > size / 2 else "small"
