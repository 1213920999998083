"""A crowd at the server: is every answer the one its request gets alone, and does memory stay flat?

    python bench/serve_load.py MODEL [--minutes 10] [--clients 200] [--leave 0.1] [--seed 0]

A real `endside serve MODEL` process answers `--clients` clients for `--minutes`. Each client asks,
reads the stream, asks again: chats and plain texts, prompts of a few to `--longest` words, 4 to 96
tokens, greedy and sampled with a seed, drawn from `--requests` fixed requests; a share of `--leave`
hangs up in the middle. The answers were fetched before, one request at a time from the same server:
a whole stream must equal its answer, and what came before a client left must be the beginning of
it. A stream without its end, an error status or a different text fails the run. Memory is the
resident set of the server: the median of the second minute against that of the last one (of the
second and the last tenth in runs below 10 minutes). Time to first token is what clients see, the
wait for one of the running places included: with far more clients than places it is mostly queue.

Writes bench/results/serve_load.json; exits with 1 where an answer is wrong or lost, or memory moved
by more than 5 %.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "and",
    "says",
    "hello",
]
FLAT = 0.05  # of the memory
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@dataclass(frozen=True)
class Ask:
    """One of the fixed requests."""

    path: str
    body: bytes


@dataclass
class Seen:
    """What the clients saw."""

    first: list[float] = field(default_factory=list)  # seconds to the first text
    whole: list[float] = field(default_factory=list)  # seconds of complete answers
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    tokens: int = 0


class Server:
    """The process, its address and its memory."""

    def __init__(self, model: Path, clients: int, flags: list[str]) -> None:
        words = [sys.executable, "-m", "endside", "serve", str(model), "--port", "0"]
        self.log: list[str] = []
        self.process = subprocess.Popen(
            [*words, "--queue", str(clients), *flags], stderr=subprocess.PIPE, text=True
        )
        assert self.process.stderr is not None, "its stderr is a pipe"
        for line in self.process.stderr:
            self.log.append(line)
            found = re.search(r"API at http://([^:/]+):(\d+)/", line)
            if found:
                self.host, self.port = found[1], int(found[2])
                threading.Thread(target=self.drain, daemon=True).start()
                return
        raise SystemExit("the server did not start:\n" + "".join(self.log))

    def drain(self) -> None:
        """Read its log, so that it never waits for us; keep what went wrong."""
        assert self.process.stderr is not None, "its stderr is a pipe"
        for line in self.process.stderr:
            if '"failure"' in line or "Traceback" in line or "engine failure" in line:
                self.log.append(line)

    @property
    def memory(self) -> int:
        """Resident bytes."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+)", text)
        assert found, "every process has a resident set"
        return int(found[1]) * 1024

    async def get(self, path: str) -> str:
        """A small page."""
        reader, writer = await asyncio.open_connection(self.host, self.port)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        text = (await reader.read()).decode()
        writer.close()
        return text


def requests(count: int, longest: int, rng: random.Random) -> list[Ask]:
    """Chats and texts of mixed lengths; half of them share their beginnings with others."""
    made = []
    for number in range(count):
        words = rng.choices(WORDS, k=int(longest ** rng.random()))
        if number % 2:
            words = WORDS * (len(words) // len(WORDS)) + words[:3]
        text = " ".join(words)
        body: dict[str, Any] = {
            "max_tokens": rng.randint(4, 96), "seed": number, "stream": True,
            "temperature": rng.choice([0.0, 0.8, 1.2]), "stream_options": {"include_usage": True},
        }  # fmt: skip
        if number % 3:
            made.append(Ask(TEXT, json.dumps({**body, "prompt": text}).encode()))
        else:
            messages = [{"role": "user", "content": text}]
            made.append(Ask(CHAT, json.dumps({**body, "messages": messages}).encode()))
    return made


async def answer(
    server: Server, ask: Ask, *, leave_after: int | None = None
) -> tuple[str, bool, float, int]:
    """Text as far as it was read, whether it was whole, seconds to its first piece, tokens."""
    begun, first, text, tokens = time.monotonic(), 0.0, "", 0
    reader, writer = await asyncio.open_connection(server.host, server.port, limit=1 << 20)
    head = f"POST {ask.path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    writer.write(head.encode() + f"Content-Length: {len(ask.body)}\r\n\r\n".encode() + ask.body)
    pieces, whole = 0, False
    try:
        status = await reader.readline()
        if b" 200 " not in status:
            raise ConnectionError(status.decode().strip() or "the connection was closed")
        # Every event is one chunk of the transfer, so its line is whole.
        while line := await reader.readline():
            if not line.startswith(b"data:"):
                continue
            if b"[DONE]" in line:
                whole = True
                break
            chunk = json.loads(line[5:])
            if "error" in chunk:
                raise ConnectionError(chunk["error"]["message"])
            tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
            for choice in chunk["choices"]:
                delta = choice.get("delta") or {}
                more = choice.get("text") or delta.get("content") or ""
                thought = delta.get("reasoning_content") or ""
                if more or thought:
                    first, pieces = first or time.monotonic() - begun, pieces + 1
                text += thought + more
            if leave_after is not None and pieces >= leave_after:
                break
    finally:
        writer.close()
    return text, whole, first, tokens


async def client(
    server: Server, wanted: list[tuple[Ask, str]], seen: Seen, flags: argparse.Namespace, seed: int
) -> None:
    """Ask until the time is over."""
    rng = random.Random(seed)
    while time.monotonic() < flags.end:
        number = rng.randrange(len(wanted))
        ask, alone = wanted[number]
        leave = rng.randint(1, 8) if rng.random() < flags.leave else None
        begun = time.monotonic()
        try:
            text, whole, first, tokens = await answer(server, ask, leave_after=leave)
        except (OSError, ValueError) as error:
            seen.counts["failed"] += 1
            seen.wrong.append(f"request {number}: {error}")
            await asyncio.sleep(1)
            continue
        if first:
            seen.first.append(first)
        if whole:
            seen.counts["whole"] += 1
            seen.whole.append(time.monotonic() - begun)
            seen.tokens += tokens
        else:
            seen.counts["left" if leave is not None else "lost"] += 1
        if text != alone if whole or leave is None else not alone.startswith(text):
            seen.counts["different"] += 1
            seen.wrong.append(f"request {number}: {text!r} instead of {alone!r}"[:500])


async def watch(server: Server, samples: list[int], every: float) -> None:
    """Note the memory again and again."""
    while True:
        samples.append(server.memory)
        await asyncio.sleep(every)


async def crowd(server: Server, flags: argparse.Namespace) -> dict[str, Any]:
    """The answers alone, then the crowd; what was seen."""
    asks = requests(flags.requests, flags.longest, random.Random(flags.seed))
    alone = []
    for number, ask in enumerate(asks):
        text, whole, *_ = await answer(server, ask)
        if not whole:
            raise SystemExit(f"request {number} alone had no end")
        alone.append(text)
    print(f"{len(asks)} answers alone; {flags.clients} clients begin", file=sys.stderr, flush=True)
    seen, samples, seconds = Seen(), [], flags.minutes * 60
    wanted, begun = list(zip(asks, alone, strict=True)), time.monotonic()
    flags.end = begun + seconds
    watching = asyncio.create_task(watch(server, samples, seconds / 200))
    await asyncio.gather(
        *(
            client(server, wanted, seen, flags, flags.seed * 100_003 + n)
            for n in range(flags.clients)
        )
    )
    took = time.monotonic() - begun
    watching.cancel()
    for _ in range(100):
        page = await server.get("/metrics")
        if "endside_requests_running 0.0" in page and "endside_requests_waiting 0.0" in page:
            break
        await asyncio.sleep(0.1)
    else:
        seen.wrong.append("answers still run after every client has gone")
    code = await asyncio.to_thread(stop, server)
    return {**report(seen, samples[:200], took), "exit_code": code, "failures": server.log[1:]}


def stop(server: Server) -> int:
    """End the server as a supervisor would; its exit code."""
    server.process.terminate()
    return server.process.wait(60)


def report(seen: Seen, samples: list[int], took: float) -> dict[str, Any]:
    """Figures of a run."""
    tenth = max(1, len(samples) // 10)
    early, late = (
        statistics.median(part) for part in (samples[tenth : 2 * tenth], samples[-tenth:])
    )
    return {
        "seconds": round(took, 1), **dict(seen.counts),
        "tokens_per_s": round(seen.tokens / took, 1),
        "answers_per_s": round(seen.counts["whole"] / took, 2),
        "first_token_s": spread(seen.first), "whole_answer_s": spread(seen.whole),
        "memory_mib": {
            "second_tenth": round(early / 2**20, 1), "last_tenth": round(late / 2**20, 1),
            "largest": round(max(samples) / 2**20, 1), "change": round(late / early - 1, 4),
        },
        "wrong": seen.wrong[:20],
    }  # fmt: skip


def spread(values: list[float]) -> dict[str, float]:
    """Median, 99th percentile and largest."""
    ordered = sorted(values) or [0.0]
    at = lambda share: round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3)
    return {"p50": at(0.5), "p99": at(0.99), "max": at(1.0)}


def main() -> None:
    """Run, print, write, judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--leave", type=float, default=0.1)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--longest", type=int, default=300, help="words of a prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "serve_load.json")
    parser.add_argument("--note", default="", help="kept in the result, e.g. what else ran")
    flags, more = parser.parse_known_args()
    server = Server(flags.model, flags.clients, more)
    try:
        found = asyncio.run(crowd(server, flags))
    finally:
        server.process.kill()
    settings = {name: getattr(flags, name) for name in ("minutes", "clients", "leave", "requests",
                "longest", "seed", "note")}  # fmt: skip
    found = {**settings, "server_flags": more, **found}
    print(json.dumps(found, indent=1, ensure_ascii=False))
    flags.out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    moved = abs(found["memory_mib"]["change"]) > FLAT
    if moved or found["wrong"] or found.get("lost") or found["exit_code"] or found["failures"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
