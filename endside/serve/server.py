"""Running the application: the socket, signals, and an end that loses no answer.

The first SIGTERM or SIGINT takes no more requests and lets running answers end; a second one cuts
them. Either way the streams are closed properly, so clients see an end or an error, never silence.
"""

from __future__ import annotations

import ctypes
import ipaddress
import socket
import sys
from typing import TYPE_CHECKING

from endside.errors import UserError
from endside.serve.log import event
from endside.serve.runner import Runner

if TYPE_CHECKING:
    from fastapi import FastAPI

LARGEST_HEADERS = 64 * 1024
M_ARENA_MAX = -8  # of mallopt(3)


def one_heap() -> None:
    """Let all threads share one heap of the C library, where that is glibc; before they start.

    Every thread that reads a request otherwise gets a heap of its own, and under a crowd each of
    them grows to the most it ever needed at once: memory that creeps up for as long as the server
    runs (`bench/serve_load.py`). Nothing here allocates so much in parallel that sharing costs.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(M_ARENA_MAX, 1)


def is_local(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name: what it stands for may change


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, before the model is loaded: a port in use is told at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        raise UserError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; give another --port"
        ) from error
    return made


def run(app: FastAPI, runner: Runner, listening: socket.socket) -> None:
    """Serve until a signal; returns when the last answer has ended."""
    import uvicorn

    from endside.serve.connection import Connection

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: object) -> None:
            if self.should_exit:
                event("cut", reason="second signal")
                runner.cut()
                self.force_exit = True
            else:
                event("stopping", running=len(runner.engine.scheduler.running))
            runner.close()
            self.should_exit = True

    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, lifespan="off",
        h11_max_incomplete_event_size=LARGEST_HEADERS, timeout_keep_alive=30, http=Connection,
        ws="none",
    )  # fmt: skip
    runner.start()
    Server(config).run(sockets=[listening])
    runner.close()
    runner.join(30)
    event("stopped")
