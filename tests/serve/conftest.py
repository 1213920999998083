"""A real server process on a tiny model, and what talks to it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from endside import native
from endside.formats.hf import save
from endside.model.config import ModelConfig
from endside.model.transformer import Transformer
from endside.tokenizer import train_bpe

EXECUTOR = "native" if native.available_isas() else "torch"


@dataclass
class Running:
    """A process and its address."""

    process: subprocess.Popen[str]
    url: str
    lines: list[str] = field(default_factory=list)  # of its log

    def stop(self, sign: int = signal.SIGTERM, within: float = 20) -> int:
        """Send a signal and wait for the end; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(sign)
        return self.process.wait(within)

    @property
    def memory(self) -> int:
        """Bytes of main memory it holds."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) * 1024


def launch(model: Path, *flags: str) -> Running:
    """Start `endside serve` on a free port and wait until it listens."""
    process = subprocess.Popen(
        [sys.executable, "-m", "endside", "serve", str(model), "--port", "0", "--threads", "1",
         "--executor", EXECUTOR, *flags],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    running = Running(process, "")
    begun = threading.Event()

    def read() -> None:
        assert process.stderr is not None, "its stderr is a pipe"
        for line in process.stderr:
            running.lines.append(line.rstrip())
            found = re.search(r"chat at (http://\S+?)/,", line)
            if found:
                running.url = found[1]
                begun.set()
        begun.set()

    threading.Thread(target=read, daemon=True).start()
    assert begun.wait(60), "the server did not start in a minute"
    assert running.url, "the server ended: " + "\n".join(running.lines)
    return running


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with chat tokens, one of 2,048 tokens of context."""
    import torch

    words = "the quick brown fox jumps over a lazy dog and says hello to you in 17 ways é 你好"
    # The merges must be many enough that tokens are longer than a byte.
    tokenizer = train_bpe(iter([words] * 30), 400)
    config = ModelConfig(
        vocab_size=400, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, intermediate_size=128, max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_id, eos_token_ids=tuple(tokenizer.eos_ids),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("serve")
    made = Transformer(config)
    made.init_weights(torch.Generator().manual_seed(3))
    tokenizer.save(folder / "tokenizer")
    return save(made, folder / "tiny", tokenizer_files=folder / "tokenizer")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Running]:
    """One for the tests of a file."""
    running = launch(model, "--queue", "40")
    yield running
    code = running.stop()
    assert code == 0, "\n".join(running.lines[-20:])
    assert not [line for line in running.lines if "failure" in line], running.lines[-20:]


def wait_until(true, seconds: float = 15) -> None:
    """Until a condition holds; fails when it does not come."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
