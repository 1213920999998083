"""Two servers, one model: tokens per second of `endside serve` and of llama.cpp's llama-server.

    python bench/serve_vs_llamacpp.py [--rounds 5] [--tokens 48] [--threads 2] [--peer-dir DIR]

Both serve the MiniCPM4-0.5B shape with the same random weights: llama-server a Q4_0 file made by
its own quantizer (Q6_K head), we the f16 file it was made from, quantized to int4 at load (groups
of 128, int4 head). llama-server is built from source for this processor (bench/peer_llamacpp.py),
with 16 slots, continuous batching and flash attention as `--flash` says (its default: auto); ours
has 16 places. Drafting is off on our side, and every prompt is new, so neither a cache nor a guess
helps. Requests are streams of `--tokens` greedy tokens after `--prompt` random token ids, over HTTP
from one client process, 1, 4 and 16 at once. Rounds are A B A B; the server that waits is stopped
(SIGSTOP), so that its idle threads cost the other nothing. A ratio is that of one round.

Writes bench/results/serve_vs_llamacpp.json; exits with 1 where a median ratio misses `--target`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import peer_llamacpp
from peer_duel import spread

RESULTS = Path(__file__).resolve().parent / "results"
PLACES = 16
CONTEXT = 512  # of one request
CROWDS = (1, 4, 16)
INT4 = ("--quant", "int4", "--group", "128", "--head", "int4")


@dataclass
class Peer:
    """A running server. fields: what a request needs so that it gives all its tokens."""

    name: str
    process: subprocess.Popen[bytes]
    port: int
    fields: dict[str, Any]
    rates: dict[int, list[float]] = field(default_factory=dict)
    firsts: dict[int, list[float]] = field(default_factory=dict)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Running inside, stopped outside."""
        self.process.send_signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGSTOP)


@contextmanager
def serving(name: str, command: list[str | Path], port: int, fields: dict[str, Any]) -> Any:
    """Start a server, wait until it is well, end it afterwards."""
    words = [str(one) for one in command]
    with open(Path("/tmp") / f"endside-{name}.log", "wb") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log)
    peer = Peer(name, process, port, fields)
    try:
        wait(peer)
        process.send_signal(signal.SIGSTOP)
        yield peer
    finally:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def wait(peer: Peer, seconds: float = 300) -> None:
    """Until /health says 200."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if peer.process.poll() is not None:
            raise SystemExit(f"{peer.name} ended at once: see /tmp/endside-{peer.name}.log")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{peer.port}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise SystemExit(f"{peer.name} did not start in {seconds:.0f} s")


async def stream(peer: Peer, prompt: list[int], tokens: int) -> tuple[float, int]:
    """One request; when its first token came, and how many tokens the server says it gave."""
    body = json.dumps({"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True,
                       "stream_options": {"include_usage": True}, **peer.fields})  # fmt: skip
    reader, writer = await asyncio.open_connection("127.0.0.1", peer.port, limit=1 << 22)
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    first, tail = 0.0, b""
    while b"[DONE]" not in tail:
        data = await reader.read(65536)
        if not data:
            raise SystemExit(f"{peer.name} hung up: {tail[-300:]!r}")
        if not first and b"data:" in data:
            first = time.perf_counter()
        tail = (tail + data)[-4096:]
    writer.close()
    counted = re.findall(rb'"completion_tokens":\s*(\d+)', tail)
    return first, int(counted[-1]) if counted else 0


async def crowd(peer: Peer, prompts: list[list[int]], tokens: int) -> tuple[float, list[float]]:
    """Tokens per second of all requests at once, and seconds to each first token."""
    begun = time.perf_counter()
    found = await asyncio.gather(*(stream(peer, one, tokens) for one in prompts))
    took = time.perf_counter() - begun
    short = [count for _, count in found if count != tokens]
    if short:
        raise SystemExit(f"{peer.name} gave {short[0]} tokens instead of {tokens}")
    return tokens * len(prompts) / took, [first - begun for first, _ in found]


def measure(peers: list[Peer], flags: argparse.Namespace) -> None:
    """All rounds of all crowds, after one that does not count."""
    rng = np.random.default_rng(0)
    for count in CROWDS:
        for at in range(flags.rounds + 1):
            prompts = rng.integers(300, 70_000, (count, flags.prompt)).tolist()
            for peer in peers:
                with peer.awake():
                    rate, firsts = asyncio.run(crowd(peer, prompts, flags.tokens))
                if at:
                    peer.rates.setdefault(count, []).append(rate)
                    peer.firsts.setdefault(count, []).extend(firsts)
        print(f"{count} at once: " + ", ".join(
            f"{one.name} {spread(one.rates[count])['median']:.1f}/s" for one in peers
        ), file=sys.stderr, flush=True)  # fmt: skip


def report(ours: Peer, theirs: Peer) -> list[dict[str, Any]]:
    """One line for each crowd."""
    return [
        {
            "at_once": count,
            "ratio": spread([a / b for a, b in zip(ours.rates[count], theirs.rates[count])]),
            "endside_tokens_per_s": spread(ours.rates[count]),
            "llama_server_tokens_per_s": spread(theirs.rates[count]),
            "endside_first_token_s": spread(ours.firsts[count]),
            "llama_server_first_token_s": spread(theirs.firsts[count]),
        }
        for count in CROWDS
    ]


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def main() -> None:
    """Start both, run, print, write, judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-dir", type=Path, default=peer_llamacpp.default_folder())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--flash", default="auto", choices=("auto", "on", "off"))
    parser.add_argument("--target", type=float, default=1.2)
    parser.add_argument("--note", default="")
    parser.add_argument("--out", type=Path, default=RESULTS / "serve_vs_llamacpp.json")
    flags = parser.parse_args()
    server = peer_llamacpp.server(flags.peer_dir)
    quantized = peer_llamacpp.model(flags.peer_dir, "0.5b-q4_0")
    plain = peer_llamacpp.plain(flags.peer_dir, "minicpm4-0.5b")
    mine, other = free_port(), free_port()
    ours = [
        sys.executable, "-m", "endside", "serve", plain, "--port", mine, "--draft", "none",
        "--max-batch", PLACES, "--context", CONTEXT, "--capacity", PLACES * CONTEXT,
        "--attention", "dense", "--threads", flags.threads, *INT4,
    ]  # fmt: skip
    theirs = [
        server, "-m", quantized, "--port", other, "-t", flags.threads, "-np", PLACES,
        "-c", PLACES * CONTEXT, "-fa", flags.flash, "--no-ui",
    ]  # fmt: skip
    ends = {str(one): -100 for one in (1, 2)}
    with (
        serving("endside", ours, mine, {"logit_bias": ends}) as a,
        serving("llama-server", theirs, other, {"ignore_eos": True, "cache_prompt": False}) as b,
    ):
        measure([a, b], flags)
    names = ("rounds", "tokens", "prompt", "threads", "flash", "target", "note")
    found = {**{name: getattr(flags, name) for name in names}, "crowds": report(a, b)}
    print(json.dumps(found, indent=1))
    flags.out.write_text(json.dumps(found, indent=1) + "\n")
    if any(one["ratio"]["median"] < flags.target for one in found["crowds"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
