"""`endside serve MODEL`: an OpenAI-compatible server and a web chat on this machine.

It listens on 127.0.0.1 unless told otherwise, and refuses to be reached from elsewhere without an
API key, because whoever reaches it can use the machine.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from endside.engine.executors import Plan
from endside.errors import UserError
from endside.verbs import lazily, parse

if TYPE_CHECKING:
    import tyro
else:
    tyro = lazily("tyro")


BACKLOG = 2048  # connections that may wait to be taken


@dataclass(frozen=True)
class Serve:
    """OpenAI-compatible server and web chat."""

    model: tyro.conf.Positional[str]
    """Local folder, .gguf file or hub name."""
    host: str = "127.0.0.1"
    """Address to listen on; one that others can reach needs --api-key-file or --insecure."""
    port: int = 8000
    """0: any free one."""
    name: str | None = None
    """What clients call the model; default: the folder's name."""
    api_key_file: Path | None = None
    """File with API keys, one per line."""
    insecure: bool = False
    """Let anybody who reaches the address use the model."""
    cors_origin: tuple[str, ...] = ()
    """Web origin that may call the API from a browser; repeatable."""
    queue: int = 64
    """Answers that may wait beside those that run."""
    timeout: float = 600.0
    """Seconds an answer may take, waiting included; 0: any."""
    max_body: int = 32 << 20
    """Bytes of a request's body at most."""
    plan: Annotated[Plan, tyro.conf.arg(name="")] = field(default_factory=Plan)


def main(argv: list[str]) -> None:
    """Check the flags, take the port, load the model, serve."""
    flags = parse(Serve, argv, "serve")
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError("the server needs more packages: pip install 'endside[serve]'") from error
    from endside.api import LLM
    from endside.serve import auth, server
    from endside.serve.app import build
    from endside.serve.runner import Runner

    keys = auth.read_keys(flags.api_key_file) if flags.api_key_file is not None else ()
    _check(flags, protected=bool(keys), local=server.is_local(flags.host))
    listening = server.bind(flags.host, flags.port)
    server.one_heap()
    llm = LLM(flags.model, **{one.name: getattr(flags.plan, one.name) for one in fields(Plan)})
    runner = Runner(llm, queue=flags.queue, timeout=flags.timeout or None)
    name = flags.name or Path(flags.model).name or flags.model
    app = build(runner, model=name, keys=keys, cors=flags.cors_origin, largest_body=flags.max_body)
    host = f"[{flags.host}]" if ":" in flags.host else flags.host
    port = listening.getsockname()[1]
    listening.listen(BACKLOG)  # before the address is told: whoever reads it may connect
    print(f"{name}: chat at http://{host}:{port}/, API at http://{host}:{port}/v1", file=sys.stderr)
    server.run(app, runner, listening)


def _check(flags: Serve, *, protected: bool, local: bool) -> None:
    if not local and not protected and not flags.insecure:
        raise UserError(
            f"--host {flags.host} can be reached from other machines: give --api-key-file, or "
            "--insecure if everybody there may use the model"
        )
    if not 0 <= flags.port <= 65535:
        raise UserError(f"--port {flags.port}: give 0 to 65535")
    if flags.queue < 0 or flags.timeout < 0 or flags.max_body < 1024:
        raise UserError("--queue and --timeout are at least 0, --max-body at least 1024")
