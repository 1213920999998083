"""The rules of the house, read from the source itself.

Each rule is a function from one parsed file to its offences; a test applies it to every file of the
package, and `test_rules_bite` shows that each rule does object to a file that breaks it.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "endside"

# Small modules that every stage may use, and those that deal in text. No stage is below them.
DESK = {"errors", "atomic", "config", "log", "dist", "shards", "checkpoint"}
TEXT = {"tokenizer", "chat"}

# Who may import whom: the rooms directly below. What is below those is allowed too.
ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "size": set(),
    "atomic": {"errors"},
    "config": {"errors"},
    "log": {"atomic"},
    "dist": {"errors"},
    "shards": {"errors"},
    "checkpoint": {"shards", "atomic"},
    "spm": {"errors"},
    "pieces": {"spm"},
    "tokenizer": {"pieces", "checkpoint"},
    "untrusted": {"errors"},
    "chatml": {"errors"},
    "chat": {"tokenizer", "untrusted", "chatml"},
    "native": {"errors"},
    "ops": {"native"},
    "model": {"ops"},
    "quant": {"model", *DESK},
    "formats": {"model", "quant", *DESK},
    "data": {*DESK, *TEXT},
    "synth": {*DESK, *TEXT},
    "train": {"data", "quant", "formats"},
    "engine": {"formats"},
    "calls": {"errors"},
    "answer": {"calls", "chat"},
    "stream": {"engine", "answer"},
    "api": {"stream", "engine", "models", *TEXT},
    "eval": {"api"},
    "serve": {"api"},
    "agents": {"api"},
    "tunnel": {"train", "eval"},
    "rl": {"train", "api"},
    "demo_answers": {"api"},
    "demo": {"demo_answers", "eval", "tunnel"},
    "gguf_tokenizer": {"formats", "tokenizer"},
    "models": {"gguf_tokenizer"},
    "verbs": {"models", "demo", "serve", "agents", "rl", "synth", "size"},
    "cli": {"verbs"},
    "__main__": {"cli"},
    # The package itself offers a few names, looked up lazily.
    "endside": {"api"},
}

# ops, model and native must run on a machine that has only these.
GROUND_FLOOR = {"ops", "native", "model"}
GROUND_FLOOR_PACKAGES = {"torch", "triton", "numpy"}

MAX_FILE, MAX_FUNCTION, MAX_LINE, MAX_PARAMETERS = 500, 80, 100, 8
# The one place where any exception may be caught: a request must not end the server.
BROAD_EXCEPT_ALLOWED = {"endside/serve/server.py"}
NAMELESS = {"utils.py", "helpers.py", "common.py", "misc.py"}


@dataclass(frozen=True)
class Source:
    """One file of the package."""

    name: str  # path from the repository root, with forward slashes
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.name)

    @cached_property
    def module(self) -> str:
        """Dotted name."""
        return self.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def room(self) -> str:
        """The folder or module directly under endside; "endside" for the package's own file."""
        return self.module.split(".")[1] if "." in self.module else "endside"

    def at(self, node: ast.AST, what: str) -> str:
        return f"{self.name}:{getattr(node, 'lineno', 1)}: {what}"


@cache
def package() -> tuple[Source, ...]:
    paths = sorted(PACKAGE.rglob("*.py"))
    return tuple(
        Source(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
        for path in paths
    )


@cache
def below(room: str) -> frozenset[str]:
    """Every room that `room` may import, directly or further down. A cycle never returns here."""
    found = set(ROOMS[room])
    for lower in ROOMS[room]:
        found |= below(lower)
    return frozenset(found)


def imported(source: Source) -> Iterator[tuple[ast.AST, str]]:
    """Absolute names that a file imports, wherever it does: statements, and names kept as text."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = f"{source.module}.x".split(".") if is_package(source) else None
                parts = (parts or source.module.split("."))[: -node.level]
                base = ".".join([*parts, *([base] if base else [])])
            yield from ((node, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # importlib.import_module("endside.x"), and tables of such names.
            named = re.fullmatch(r"(endside\.(\w+)(\.\w+)*)(:\w+)?", node.value)
            if named and named[2] in ROOMS:
                yield node, named[1]


def is_package(source: Source) -> bool:
    return source.name.endswith("/__init__.py")


def functions(source: Source) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def is_kernel(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("triton" in ast.unparse(mark) or "jit" in ast.unparse(mark)
               for mark in node.decorator_list)  # fmt: skip


def imports_go_down(source: Source) -> Iterator[str]:
    if source.room not in ROOMS:
        yield f"{source.name}: room {source.room!r} is not in the table of tests/test_house.py"
        return
    allowed = below(source.room) | {source.room}
    for node, name in imported(source):
        parts = name.split(".")
        if parts[0] != "endside" or name == "endside.__version__":
            continue
        # `from endside import LLM` asks the package itself; `from endside import native` a room.
        target = parts[1] if len(parts) > 1 and parts[1] in ROOMS else "endside"
        if target not in allowed:
            yield source.at(node, f"{source.room} must not import {target} ({name})")


def ground_floor_is_light(source: Source) -> Iterator[str]:
    if source.room not in GROUND_FLOOR:
        return
    for node, name in imported(source):
        top = name.split(".")[0]
        if top not in GROUND_FLOOR_PACKAGES | {"endside"} | set(sys.stdlib_module_names):
            yield source.at(node, f"{source.room} must not need {top}")


def no_broad_except(source: Source) -> Iterator[str]:
    if source.name in BROAD_EXCEPT_ALLOWED:
        return
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.ExceptHandler):
            continue
        names = ast.unparse(node.type) if node.type else "Exception"
        broad = re.search(r"\b(Base)?Exception\b", names)
        last = node.body[-1]
        # Tidying up and passing the same exception on hides nothing.
        passes_on = isinstance(last, ast.Raise) and last.exc is None
        if broad and not passes_on:
            yield source.at(node, "broad except")


def asserts_speak(source: Source) -> Iterator[str]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Assert) and node.msg is None:
            yield source.at(node, "assert without a message")


def public_names_are_documented(source: Source) -> Iterator[str]:
    if not is_empty(source) and not ast.get_docstring(source.tree):
        yield f"{source.name}:1: module without a docstring"
    yield from undocumented(source, source.tree.body)


def is_empty(source: Source) -> bool:
    return not source.text.strip()


def undocumented(source: Source, body: list[ast.stmt]) -> Iterator[str]:
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if node.name.startswith("_"):
            continue
        if not ast.get_docstring(node) and not is_stub(node):
            yield source.at(node, f"{node.name} has no docstring")
        # What autograd calls on a Function is described by the class.
        if isinstance(node, ast.ClassDef) and not any("Function" in ast.unparse(base)
                                                      for base in node.bases):  # fmt: skip
            yield from undocumented(source, node.body)


def is_stub(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> bool:
    """A method of a Protocol without a body: the class says what it is for."""
    last = node.body[-1]
    return isinstance(last, ast.Expr) and isinstance(last.value, ast.Constant) \
        and last.value.value is ... and not isinstance(node, ast.ClassDef)  # fmt: skip


def nothing_is_long(source: Source) -> Iterator[str]:
    lines = source.text.splitlines()
    if len(lines) > MAX_FILE:
        yield f"{source.name}: {len(lines)} lines, at most {MAX_FILE}"
    for number, line in enumerate(lines, 1):
        if len(line) > MAX_LINE:
            yield f"{source.name}:{number}: {len(line)} columns, at most {MAX_LINE}"
    for node in functions(source):
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        if length > MAX_FUNCTION:
            yield source.at(node, f"{node.name}: {length} lines, at most {MAX_FUNCTION}")


def few_parameters(source: Source) -> Iterator[str]:
    for node in functions(source):
        count = len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs)
        if count > MAX_PARAMETERS and not is_kernel(node):
            yield source.at(node, f"{node.name}: {count} parameters, at most {MAX_PARAMETERS}")


def names_say_something(source: Source) -> Iterator[str]:
    if Path(source.name).name in NAMELESS:
        yield f"{source.name}: name the file after what it holds"


def no_changing_globals(source: Source) -> Iterator[str]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Global):
            yield source.at(node, f"global {', '.join(node.names)}")


def no_machine_paths(source: Source) -> Iterator[str]:
    for number, line in enumerate(source.text.splitlines(), 1):
        if re.search(r"(?<![\w.~])/(root|home|work|Users|mnt)/", line):
            yield f"{source.name}:{number}: path of one machine"


RULES: list[Callable[[Source], Iterator[str]]] = [
    imports_go_down,
    ground_floor_is_light,
    no_broad_except,
    asserts_speak,
    public_names_are_documented,
    nothing_is_long,
    few_parameters,
    names_say_something,
    no_changing_globals,
    no_machine_paths,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(rule: Callable[[Source], Iterator[str]]) -> None:
    offences = [offence for source in package() for offence in rule(source)]
    assert not offences, "\n".join(offences)


def test_table_has_no_cycle() -> None:
    for room in ROOMS:
        assert room not in below(room), f"{room} is below itself"
        assert below(room) <= set(ROOMS), f"{room} may import rooms that the table does not know"


def test_never_pairs() -> None:
    """The directions that the plan of the house names as forbidden stay so when the table grows."""
    for upper, lower in [("model", "train"), ("model", "engine"), ("engine", "train"),
                         ("engine", "tokenizer"), ("data", "train"), ("synth", "engine"),
                         ("ops", "model"), ("ops", "config"), ("native", "ops")]:  # fmt: skip
        assert lower not in below(upper), f"{upper} must never import {lower}"


BAD = {
    "imports_go_down": [
        ("endside/model/x.py", "from endside.train import loop"),
        ("endside/engine/x.py", "def f():\n    from endside import tokenizer"),
        ("endside/ops/x/y.py", "from ...model import config"),
        ("endside/ops/x/__init__.py", "from ...config import load"),
        ("endside/data/x.py", "import endside.engine.engine"),
        ("endside/data/x.py", "import_module('endside.train.loop')"),
        ("endside/ops/x.py", "T = {'a': 'endside.model.x:f'}"),
        ("endside/train/x.py", "from endside import LLM"),
        ("endside/attic/x.py", ""),
    ],
    "ground_floor_is_light": [
        ("endside/model/x.py", "import pydantic"),
        ("endside/ops/x.py", "from einops import rearrange"),
    ],
    "no_broad_except": [
        ("endside/x.py", "try: f()\nexcept: pass"),
        ("endside/x.py", "try: f()\nexcept (OSError, Exception) as e: raise X from e"),
    ],
    "asserts_speak": [("endside/x.py", "assert x")],
    "public_names_are_documented": [
        ("endside/x.py", "x = 1"),
        ("endside/x.py", '"""D."""\ndef f(): pass'),
        ("endside/x.py", '"""D."""\nclass A:\n    """D."""\n    def f(self): pass'),
    ],
    "nothing_is_long": [
        ("endside/x.py", "\n" * 501),
        ("endside/x.py", "#" * 101),
        ("endside/x.py", "def f():\n" + "    g()\n" * 80),
    ],
    "few_parameters": [("endside/x.py", "def f(a, b, c, d, e, *, f, g, h, i): pass")],
    "names_say_something": [("endside/data/utils.py", "")],
    "no_changing_globals": [("endside/x.py", "def f():\n    global a\n    a = 1")],
    "no_machine_paths": [("endside/x.py", "open('/home/me/x')")],
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rules_bite(rule: Callable[[Source], Iterator[str]]) -> None:
    for name, text in BAD[rule.__name__]:
        assert list(rule(Source(name, text))), f"{rule.__name__} lets this pass: {text[:60]!r}"


def test_rules_let_good_code_pass() -> None:
    good = [
        ("endside/train/x.py", "from endside.model.transformer import T\nimport rich"),
        ("endside/verbs/x.py", "def _f():\n    from endside.train import pretrain"),
        ("endside/ops/x/y.py", "from ..rope import reference\nimport triton.language as tl"),
        ("endside/data/x.py", "try: f()\nexcept BaseException:\n    g()\n    raise"),
        ("endside/ops/x.py", "@triton.jit\ndef _f(a, b, c, d, e, f, g, h, i): pass"),
    ]
    for name, text in good:
        offences = [o for rule in RULES for o in rule(Source(name, f'"""D."""\n{text}'))]
        assert not offences, offences


def readme_map() -> set[str]:
    """Paths that README's map names: whatever its first column holds, and all that has a slash."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"^## Map$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, "README.md has no section '## Map'"
    first = [line.split("|")[1] for line in found[1].splitlines() if line.startswith("|")]
    names = re.findall(r"`([^`\n]+)`", " ".join(first))
    names += [name for name in re.findall(r"`([^`\n]+)`", found[1]) if "/" in name]
    return {name.rstrip("/") for name in names}


def test_map_names_only_what_exists() -> None:
    missing = sorted(name for name in readme_map() if not (ROOT / name).exists())
    assert not missing, f"README's map names what is not there: {missing}"


def test_map_names_every_room() -> None:
    rooms = [p for p in PACKAGE.iterdir() if (p / "__init__.py").exists() or p.suffix == ".py"]
    wanted = {p.relative_to(ROOT).as_posix() for p in rooms if not p.name.startswith("__")}
    assert wanted <= readme_map(), f"not in README's map: {sorted(wanted - readme_map())}"
