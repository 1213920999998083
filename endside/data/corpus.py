"""Where documents come from: the running Python's own library, or a folder of the user's text.

Any machine that can run this has megabytes of real, well-edited English and Python: the language
reference that `help()` shows, the documentation strings, and the sources of the standard library.
The order is the sorted path, so the same Python gives the same corpus, and nothing is downloaded.

A folder is read recursively: .txt .md .rst .py whole, .jsonl one document per line under "text".
What is not UTF-8 is an error that names the file, never a replacement character.
"""

from __future__ import annotations

import ast
import json
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from endside.data.document import Document
from endside.errors import UserError

Kind = Literal["topics", "docstrings", "source"]
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
# Tests and bundled packages say little; `encodings` is tables; the topics are read on their own.
_SKIPPED_PARTS = {
    "test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings",
    "pydoc_data", "ensurepip", "turtledemo",
}  # fmt: skip


def standard_library(
    kinds: tuple[Kind, ...] = ("topics", "docstrings", "source"), *, folder: Path | None = None
) -> Iterator[Document]:
    """Documents of the installed Python, kind by kind, in the order of their paths.

    folder: another library to read than the running Python's.
    """
    root = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    makers = {"topics": _topics, "docstrings": _docstrings, "source": _sources}
    for kind in kinds:
        yield from makers[kind](root)


def _topics(root: Path) -> Iterator[Document]:
    # Some distributions ship Python without the topics of help().
    if find_spec("pydoc_data.topics") is None:
        return
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield Document(f"topics/{name}", text.strip() + "\n", "topics")


def _sources(root: Path) -> Iterator[Document]:
    for name, text in _modules(root):
        yield Document(f"source/{name}", text, "source", group=name)


def _docstrings(root: Path) -> Iterator[Document]:
    for name, text in _modules(root):
        found = _documentation(ast.parse(text), name)
        if found:
            yield Document(f"docstrings/{name}", found, "docstrings", group=name)


def _modules(root: Path) -> Iterator[tuple[str, str]]:
    """(relative path, text) of every module worth reading."""
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        if _SKIPPED_PARTS.isdisjoint(relative.parts):
            # tokenize.open honours the encoding that a module declares (PEP 263).
            with tokenize.open(path) as file:
                text = file.read()
            if text.strip():
                yield relative.as_posix(), text


def _documentation(tree: ast.Module, name: str) -> str:
    """Every docstring of a module, each under the name it documents; "" without any."""
    parts = [(name.removesuffix(".py").replace("/", "."), ast.get_docstring(tree))]
    parts += _inner(tree, "")
    return "\n\n".join(f"{title}\n{text}" for title, text in parts if text) + "\n" * any(
        text for _, text in parts
    )


def _inner(node: ast.AST, prefix: str) -> list[tuple[str, str | None]]:
    found: list[tuple[str, str | None]] = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            title = prefix + child.name
            found.append((title, ast.get_docstring(child)))
            found += _inner(child, f"{title}.")
    return found


def read(path: str | Path) -> Iterator[Document]:
    """Documents of a text file or, in sorted order, of every text file below a folder."""
    root = Path(path)
    if not root.exists():
        raise UserError(f"no corpus at {root}: give a folder or file of text")
    files = [root] if root.is_file() else sorted(file for file in root.rglob("*") if file.is_file())
    chosen = [file for file in files if _reader(file) is not None]
    if not chosen:
        raise UserError(
            f"nothing to read in {root}: it holds no file ending in "
            f"{', '.join(TEXT_SUFFIXES)} or .jsonl"
        )
    base = root.parent if root.is_file() else root
    for file in chosen:
        yield from _reader(file)(file, file.relative_to(base).as_posix())


def _reader(file: Path) -> Callable[[Path, str], Iterator[Document]] | None:
    if file.suffix.lower() in TEXT_SUFFIXES:
        return _read_text
    return _read_jsonl if file.suffix.lower() == ".jsonl" else None


def _read_text(file: Path, name: str) -> Iterator[Document]:
    text = _decode(file)
    if text.strip():
        yield Document(name, text, "file")


def _read_jsonl(file: Path, name: str) -> Iterator[Document]:
    for number, line in enumerate(_decode(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{file} line {number} is not JSON ({error}): correct or remove it"
            ) from None
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise UserError(
                f'{file} line {number} has no "text": write {{"text": "..."}} on each line'
            )
        if record["text"].strip():
            yield Document(f"{name}:{number}", record["text"], "jsonl")


def _decode(file: Path) -> str:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot read {file}: {error.strerror}; correct its rights or remove it"
        ) from error
    if b"\0" in data:
        raise UserError(
            f"{file} is binary (a zero byte at {data.index(0)}): remove it, or convert it to "
            "UTF-8 text"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 (byte {error.start}): convert it to UTF-8") from None
