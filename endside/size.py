"""How large this package is: lines per room, and how long its functions are.

Small rooms and small functions are a rule of the house (file at most 500 lines, function at most
80, median about 10); this is the ruler. Lines are counted as they stand, comments and all.
"""

from __future__ import annotations

import ast
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Measure:
    """Python lines and files per room (a folder or module of endside), and function lengths."""

    lines: dict[str, int]
    files: dict[str, int]
    functions: tuple[int, ...]  # lines of each function, shortest first

    def quantile(self, q: float) -> int:
        """The length that a share q of the functions does not exceed; 0 without functions."""
        last = len(self.functions) - 1
        return self.functions[round(q * last)] if self.functions else 0


def measure(package: Path = PACKAGE) -> Measure:
    """Read every Python file and every native source below `package`."""
    lines: Counter[str] = Counter()
    files: Counter[str] = Counter()
    functions: list[int] = []
    for path in sorted(package.rglob("*")):
        if path.suffix not in (".py", ".cc", ".h"):
            continue
        text = path.read_text(encoding="utf-8")
        room = path.relative_to(package).parts[0]
        lines[room] += len(text.splitlines())
        files[room] += 1
        if path.suffix == ".py":
            functions += function_lengths(ast.parse(text))
    return Measure(dict(lines), dict(files), tuple(sorted(functions)))


def function_lengths(tree: ast.AST) -> list[int]:
    """Lines from `def` to the last statement, of methods and nested functions too."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    return [(node.end_lineno or node.lineno) - node.lineno + 1 for node in nodes]


def report(package: Path = PACKAGE) -> str:
    """The table that `endside size` prints."""
    found = measure(package)
    width = max((len(room) for room in found.lines), default=0)
    rooms = sorted(found.lines, key=lambda room: -found.lines[room])
    rows = [f"{room:<{width}}  {found.lines[room]:>6}  {found.files[room]:>3}" for room in rooms]
    total = f"{'total':<{width}}  {sum(found.lines.values()):>6}  {sum(found.files.values()):>3}"
    lengths = (
        f"function length: median {found.quantile(0.5)}, p95 {found.quantile(0.95)}, "
        f"max {found.quantile(1.0)} lines ({len(found.functions)} functions)"
    )
    head = f"{'room':<{width}}  {'lines':>6}  {'files':>3}"
    return "\n".join([head, *rows, total, "", lengths])
