"""docs/serving.md and the unit file say nothing that the program does not know."""

from __future__ import annotations

import re
import shlex
import subprocess
from configparser import ConfigParser
from pathlib import Path

import httpx2
import pytest

from endside.engine.executors import Plan
from endside.verbs import parse
from endside.verbs.run import Run
from endside.verbs.serve import Serve

from .conftest import Running

DOCS = Path(__file__).resolve().parents[2] / "docs"
GUIDE = (DOCS / "serving.md").read_text(encoding="utf-8")
FIELDS = ("top_k", "min_p", "thinking_budget", "regex", "grammar", "repetition_penalty")


def commands() -> list[list[str]]:
    """What stands behind `endside` in the guide's blocks and in the unit."""
    unit = ConfigParser(strict=False)
    unit.read(DOCS / "endside.service", encoding="utf-8")
    lines = re.findall(r"^endside (.+?)(?:\s+#.*)?$", GUIDE, re.MULTILINE)
    return [shlex.split(line) for line in lines] + [
        shlex.split(unit["Service"]["ExecStart"])[1:],
    ]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_are_understood(words: list[str]) -> None:
    kinds = {"serve": Serve, "run": Run}
    assert parse(kinds[words[0]], words[1:], words[0])


def test_flags_and_fields_exist() -> None:
    names = {name.replace("_", "-") for kind in (Serve, Plan) for name in kind.__annotations__}
    told = set(re.findall(r"`--([a-z-]+)", GUIDE))
    assert told and told <= names, f"unknown: {sorted(told - names)}"
    assert all(f"`{name}`" in GUIDE for name in FIELDS)


def test_routes_exist(server: Running) -> None:
    """Every route of the table answers, and every route of the API is in the table."""
    rows = [line.split("|")[1] for line in GUIDE.splitlines() if line.startswith("| `")]
    told = {tuple(one.split()) for row in rows for one in re.findall(r"`((?:GET|POST) .+?)`", row)}
    paths = httpx2.get(server.url + "/openapi.json").json()["paths"]
    real = {(verb.upper(), path) for path, verbs in paths.items() for verb in verbs}
    api = {(verb, path) for verb, path in real if not path.startswith("/ui") and "{" not in path}
    assert api - {("GET", "/")} <= told, sorted(api - told)
    for verb, path in told:
        status = httpx2.request(verb, server.url + path, json={} if verb == "POST" else None)
        assert status.status_code not in (404, 405) or path == "/v1/embeddings", (verb, path)


def test_the_unit_is_one_that_systemd_takes(tmp_path: Path) -> None:
    try:
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", str(DOCS / "endside.service")],
            capture_output=True, text=True,
        )  # fmt: skip
    except FileNotFoundError:
        pytest.skip("systemd-analyze is not here")
    complaints = [line for line in done.stderr.splitlines() if "ExecStart" not in line
                  and "Command /opt/endside" not in line]  # fmt: skip
    assert not [line for line in complaints if "endside.service" in line], done.stderr


def test_python_example_is_python() -> None:
    (code,) = re.findall(r"```python\n(.+?)```", GUIDE, re.DOTALL)
    compile(code, "serving.md", "exec")
