"""Connections that say nothing, or say it slowly, are closed; patient ones are left alone."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from endside.serve import connection, limits

from .conftest import Running, wait_until

GET = b"GET /health HTTP/1.1\r\nHost: x\r\n"


async def app(scope, receive, send) -> None:
    """Answers with what it was sent."""
    body = (await receive())["body"]
    length = str(len(body)).encode()
    await send({"type": "http.response.start", "status": 200,
                "headers": [(b"content-length", length)]})  # fmt: skip
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, int]]:
    """A server that waits half a second for a header and one for a body."""
    import uvicorn

    monkeypatch.setattr(connection, "HEADERS", 0.5)
    monkeypatch.setattr(limits, "SECONDS", 1.0)
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        limits.Limits(app, largest=1000), http=connection.Connection, lifespan="off",
        log_level="error", timeout_keep_alive=5,
    )  # fmt: skip
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, args=([listening],), daemon=True)
    thread.start()
    wait_until(lambda: running.started)
    yield listening.getsockname()[:2]
    running.should_exit = True
    thread.join(10)


def dribble(place: tuple[str, int], parts: Iterator[bytes], every: float) -> tuple[float, bytes]:
    """Send bytes now and then until the server hangs up; after how long, and what it said."""
    with socket.create_connection(place, 20) as line:
        begun, said = time.monotonic(), b""
        line.settimeout(every)
        for part in parts:
            try:
                line.sendall(part)
                found = line.recv(65536)
            except TimeoutError:
                continue
            except OSError:
                break
            if not found:
                break
            said += found
        return time.monotonic() - begun, said


def repeated(part: bytes, count: int = 200) -> Iterator[bytes]:
    return iter([part] * count)


def test_silence_is_ended(place: tuple[str, int]) -> None:
    took, said = dribble(place, repeated(b""), 0.05)
    assert 0.4 < took < 3 and said == b""


def test_slow_header_is_ended(place: tuple[str, int]) -> None:
    took, said = dribble(place, iter([GET, *[b"X-A: a\r\n"] * 200]), 0.05)
    assert 0.4 < took < 3 and said == b"", "a line now and then must buy no time"


def test_slow_second_header_is_ended(place: tuple[str, int]) -> None:
    took, said = dribble(place, iter([GET + b"\r\n", GET, *[b"X-A: a\r\n"] * 200]), 0.05)
    assert 0.4 < took < 3 and said.startswith(b"HTTP/1.1 200")


def test_slow_body_is_ended(place: tuple[str, int]) -> None:
    head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n"
    took, said = dribble(place, iter([head, *[b" "] * 200]), 0.05)
    assert 0.8 < took < 5 and b" 408 " in said.split(b"\r\n")[0]


def test_rest_of_a_refused_body_is_not_listened_to_for_ever(place: tuple[str, int]) -> None:
    head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\n"
    took, said = dribble(place, iter([head, *[b" "] * 200]), 0.05)
    assert 0.4 < took < 5 and b" 413 " in said.split(b"\r\n")[0]


def test_kept_connection_and_slow_answerer_are_left_alone(place: tuple[str, int]) -> None:
    """Between requests the keep-alive limit counts, not that of headers."""
    with socket.create_connection(place, 5) as line:
        for _ in range(3):
            line.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
            said = b""
            while not said.endswith(b"{}"):
                said += line.recv(65536) or pytest.fail("it hung up")
            time.sleep(0.8)


@pytest.mark.slow
def test_the_real_server_waits_ten_seconds(server: Running) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    took, _ = dribble((host, int(port)), iter([GET, *[b"X-A: a\r\n"] * 200]), 0.2)
    assert 9 < took < 14
