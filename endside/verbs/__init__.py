"""One module per verb of the command line: its flags as a dataclass, and `main(argv)`.

tyro makes the flags of a dataclass, its help and its messages. Importing and asking it takes a
quarter of a second, which is much of the wait for a first token, so plain lines such as
`run DIR "text" --max-tokens 5` are read here; whatever is not plain (help, an unknown flag, a value
that does not fit, an odd type) is left to tyro, so there is one set of rules and messages.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import ModuleType, NoneType, SimpleNamespace, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Flags = TypeVar("Flags")
NESTED, POSITIONAL = "nested", "positional"


def parse(flags: type[Flags], argv: list[str], verb: str) -> Flags:
    """`argv` as an instance of the dataclass `flags`; tyro prints help or the error and exits."""
    try:
        return _plain(flags, argv)
    except _NotPlain:
        pass
    import tyro

    marks = [tyro.conf.FlagCreatePairsOff, tyro.conf.UseAppendAction]
    if not {"-h", "--help"} & set(argv):
        # the comments beside the fields are for the help
        marks.append(tyro.conf.HelptextFromCommentsOff)
    return tyro.cli(flags, args=argv, prog=f"endside {verb}", config=tuple(marks))


def lazily(name: str) -> ModuleType:
    """The module, imported when something of it is first asked for."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.loader is not None, f"{name} is not installed"
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


class _NotPlain(Exception):
    """Left to tyro."""


class _Positional:
    """Stands for tyro.conf.Positional while hints are read."""

    def __class_getitem__(cls, kind: Any) -> Any:
        return Annotated[kind, POSITIONAL]


# What the hints of flags name of tyro, without importing it.
_STANDIN = SimpleNamespace(
    conf=SimpleNamespace(Positional=_Positional, arg=lambda name: NESTED if name == "" else name)
)


def _plain(flags: type[Flags], argv: list[str]) -> Flags:
    kinds, positional = _kinds(flags)
    named = kinds.keys() - set(positional)
    given: dict[str, Any] = {}
    words = iter(argv)
    for word in words:
        if not word.startswith("-"):
            if not positional:
                raise _NotPlain
            name, text = positional.pop(0), word
        else:
            name = word.removeprefix("--").replace("-", "_")
            if name not in named or not word.startswith("--") or "_" in word:
                raise _NotPlain
            text = "" if kinds[name] is bool else next(words, "-")
        if name in given and get_origin(kinds[name]) is not tuple:
            raise _NotPlain
        value = True if kinds[name] is bool else _value(kinds[name], text)
        given[name] = (*given.get(name, ()), *value) if isinstance(value, tuple) else value
    return _make(flags, given)


def _hints(flags: type) -> dict[str, Any]:
    names = {"tyro": _STANDIN, "Positional": _Positional}
    return get_type_hints(flags, localns=names, include_extras=True)


def _kinds(flags: type) -> tuple[dict[str, Any], list[str]]:
    """Field name -> its type, those of nested dataclasses among them; the positional ones."""
    kinds: dict[str, Any] = {}
    positional = []
    for name, hint in _hints(flags).items():
        marks = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
        kind = get_args(hint)[0] if marks else hint
        if is_dataclass(kind):
            if NESTED not in marks:
                raise _NotPlain
            kinds |= _kinds(kind)[0]  # type: ignore[arg-type]
        else:
            kinds[name] = kind
            positional += [name] * (POSITIONAL in marks)
    return kinds, positional


def _value(kind: Any, text: str) -> Any:
    if text.startswith("-") or text == "None":
        raise _NotPlain
    options = get_args(kind)
    if get_origin(kind) in (UnionType, Union) and len(options) == 2 and options[1] is NoneType:
        return _value(options[0], text)
    if get_origin(kind) is Literal:
        chosen = [one for one in options if str(one) == text]
        if chosen:
            return chosen[0]
        raise _NotPlain
    if get_origin(kind) is tuple and options == (str, ...):
        return (text,)
    if kind not in (str, int, float, Path):
        raise _NotPlain
    try:
        return kind(text)
    except ValueError as error:
        raise _NotPlain from error


def _make(flags: type[Flags], given: dict[str, Any]) -> Flags:
    values = {}
    hints = _hints(flags)
    for one in fields(flags):  # type: ignore[arg-type]
        hint = hints[one.name]
        kind = get_args(hint)[0] if get_origin(hint) is Annotated else hint
        if is_dataclass(kind):
            values[one.name] = _make(kind, given)  # type: ignore[arg-type]
        elif one.name in given:
            values[one.name] = given[one.name]
        elif one.default is MISSING and one.default_factory is MISSING:
            raise _NotPlain
    return flags(**values)
