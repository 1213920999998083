"""Starting, stopping, dying: what clients see, and that nothing is left broken."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2
import pytest

from .conftest import launch, wait_until

CHAT = "/v1/chat/completions"


def body(tokens: int, **more) -> dict:
    messages = [{"role": "user", "content": "hello"}]
    # Ids that end the answer are made impossible, so that it takes its time.
    bias = {str(one): -100 for one in range(0, 8)}
    return {"messages": messages, "max_tokens": tokens, "seed": 1, "logit_bias": bias, **more}


def stream(url: str, tokens: int) -> tuple[threading.Thread, list[str]]:
    """Read a stream in a thread; the lines so far."""
    lines: list[str] = []

    def read() -> None:
        try:
            with httpx2.stream(
                "POST", url + CHAT, json=body(tokens, stream=True), timeout=60
            ) as got:
                lines.extend(line for line in got.iter_lines() if line)
        except httpx2.TransportError as error:
            lines.append(f"broken: {type(error).__name__}")

    thread = threading.Thread(target=read)
    thread.start()
    return thread, lines


def test_a_stop_lets_streams_end_and_takes_nothing_new(model: Path) -> None:
    running = launch(model)
    thread, lines = stream(running.url, 1500)
    wait_until(
        lambda: b"endside_requests_running 1.0" in httpx2.get(running.url + "/metrics").content
    )
    running.process.send_signal(signal.SIGTERM)
    thread.join(60)
    assert lines[-1] == "data: [DONE]" and len(lines) > 500, lines[-3:]
    assert running.process.wait(30) == 0
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(running.url + "/health")


def test_a_second_stop_cuts_and_closes_properly(model: Path) -> None:
    running = launch(model, "--context", "2048")
    thread, lines = stream(running.url, 1900)
    wait_until(
        lambda: b"endside_requests_running 1.0" in httpx2.get(running.url + "/metrics").content
    )
    for _ in range(2):
        running.process.send_signal(signal.SIGTERM)
        time.sleep(0.15)
    assert running.process.wait(15) == 0, "\n".join(running.lines[-5:])
    thread.join(10)
    assert any("cut" in line for line in running.lines) or lines[-1] == "data: [DONE]"


def test_kill_9_is_seen_at_once_and_restart_serves(model: Path) -> None:
    running = launch(model)
    before = httpx2.post(running.url + CHAT, json=body(20)).json()["choices"]
    thread, lines = stream(running.url, 1900)
    wait_until(
        lambda: b"endside_requests_running 1.0" in httpx2.get(running.url + "/metrics").content
    )
    running.process.kill()
    thread.join(10)
    assert "[DONE]" not in lines[-1], "a client took a cut answer for a whole one"
    again = launch(model)
    try:
        assert httpx2.post(again.url + CHAT, json=body(20)).json()["choices"] == before
    finally:
        assert again.stop() == 0


def test_an_answer_that_takes_too_long_is_ended(model: Path) -> None:
    running = launch(model, "--timeout", "0.05")
    try:
        answer = httpx2.post(running.url + CHAT, json=body(1900, n=8), timeout=30)
        assert answer.status_code == 504, answer.text
        assert "--timeout" in answer.json()["error"]["message"]
        thread, lines = stream(running.url, 1900)
        thread.join(30)
        assert '"code": "timeout"' in lines[-1] and "[DONE]" not in lines[-1]
    finally:
        assert running.stop() == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--host", "0.0.0.0"], "--api-key-file"),
        (["--host", "::"], "--api-key-file"),
        (["--api-key-file", "nowhere"], "cannot read --api-key-file"),
        (["--port", "99999"], "--port 99999"),
        (["--host", "999.1.1.1", "--insecure"], "cannot listen"),
        (["--quee", "3"], "--queue"),
    ],
)
def test_wrong_flags_are_one_message(model: Path, flags: list[str], message: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "endside", "serve", str(model), *flags],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_port_in_use_is_told_before_the_model_is_loaded(model: Path) -> None:
    running = launch(model)
    try:
        port = running.url.rsplit(":", 1)[1]
        done = subprocess.run(
            [sys.executable, "-m", "endside", "serve", "no-such-model", "--port", port],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 2 and "give another --port" in done.stderr, done.stderr
    finally:
        running.stop()
