"""Configuration: a TOML file plus `a.b=c` overrides become frozen dataclasses, or a message.

    runs/tiny.toml        [optim]                      dataclass TrainConfig:
    optim.betas=[0.9,0.9] learning_rate = 0.01    ->       optim: OptimConfig

The dataclass is the schema: a key it lacks is an error that names the nearest one, a value of
another type is an error that names the key, and nothing is converted silently (a string is never a
number, a truth value never a count). Checks between fields live in `__post_init__`, which raises
UserError. TOML has no null, so a missing key means the default, and the word "none" stands for None
where the field admits it. `dump` writes a configuration so that `load` returns an equal one.

Not done here: file inclusion, interpolation, environment variables. A configuration is one screen.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from endside.errors import UserError

T = TypeVar("T")
NONE = "none"  # how None is written in TOML


def load(path: str | Path, kind: type[T], overrides: Sequence[str] = ()) -> T:
    """The dataclass `kind` from a TOML file and overrides such as "optim.learning_rate=0.02"."""
    return build(kind, override(read(path), overrides), source=str(path))


def read(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file, unchecked."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no configuration file {path}: give the path of a .toml file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}; give a TOML text file") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None


def override(data: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `data` with "a.b=c" applied; c is a TOML value, else taken as a string."""
    result = json.loads(json.dumps(data, default=str))
    for item in overrides:
        dotted, equals, text = item.partition("=")
        keys = [key.strip() for key in dotted.split(".")]
        if not equals or not all(keys):
            raise UserError(
                f"override {item!r} is not key=value: write for example optim.learning_rate=0.02"
            )
        table = result
        for depth, key in enumerate(keys[:-1], start=1):
            table = table.setdefault(key, {})
            if not isinstance(table, dict):
                raise UserError(
                    f"override {item!r}: {'.'.join(keys[:depth])} is a value, not a table"
                )
        table[keys[-1]] = _value(text.strip())
    return result


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def build(kind: type[T], data: Mapping[str, Any], *, source: str) -> T:
    """`data` as the dataclass `kind`; raises UserError naming `source` and the key."""
    from pydantic import TypeAdapter, ValidationError

    known = _check_keys(kind, data, source=source, prefix="")
    try:
        # As JSON: strict then means what TOML means, arrays may become tuples and no more.
        return TypeAdapter(kind).validate_json(json.dumps(known, default=str), strict=True)
    except ValidationError as error:
        raise UserError(_explain(error.errors()[0], source)) from None


def _check_keys(kind: type, data: Mapping[str, Any], *, source: str, prefix: str) -> dict[str, Any]:
    """`data` with "none" turned into None, once every key in it is a field of `kind`."""
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    result = {}
    for key, value in data.items():
        if key not in names:
            raise UserError(_unknown(key, names, source=source, prefix=prefix))
        inner = _dataclass_in(hints[key])
        if value == NONE and _admits_none(hints[key]):
            value = None
        elif inner is not None and isinstance(value, Mapping):
            value = _check_keys(inner, value, source=source, prefix=f"{prefix}{key}.")
        elif inner is not None and isinstance(value, list):
            # an array of tables, [[data.mixture]]
            value = [
                _check_keys(inner, one, source=source, prefix=f"{prefix}{key}[{number}].")
                if isinstance(one, Mapping)
                else one
                for number, one in enumerate(value)
            ]
        result[key] = value
    return result


def _unknown(key: str, names: list[str], *, source: str, prefix: str) -> str:
    nearest = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    hint = f"did you mean {prefix}{nearest[0]}?" if nearest else f"known: {', '.join(names)}"
    return f"unknown key {prefix}{key} in {source}; {hint}"


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass that `hint` is or, in a union, holds."""
    for option in (hint, *typing.get_args(hint)):
        if isinstance(option, type) and dataclasses.is_dataclass(option):
            return option
    return None


def _admits_none(hint: Any) -> bool:
    return type(None) in typing.get_args(hint)


def _explain(error: Mapping[str, Any], source: str) -> str:
    place = ".".join(str(part) for part in error["loc"])
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, UserError):
        return f"{place + ': ' if place else ''}{cause} (in {source})"
    if error["type"] == "missing":
        return f"{place} is missing in {source}: add it"
    return f"{place} is {error['input']!r} in {source}: {error['msg'][0].lower()}{error['msg'][1:]}"


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every leaf of a dataclass as {"optim.learning_rate": 0.01, ...}, in field order."""
    leaves: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            leaves |= flatten(value, f"{prefix}{field.name}.")
        else:
            leaves[prefix + field.name] = value
    return leaves


def dump(config: Any) -> str:
    """TOML text of a configuration with every default resolved; `load` gives an equal one back."""
    return "\n".join(_tables(config, "")).strip() + "\n"


def _tables(config: Any, name: str) -> list[str]:
    lines = ["", f"[{name}]"] if name else []
    nested = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            nested.append((f"{name}.{field.name}" if name else field.name, value))
        else:
            lines.append(f"{field.name} = {_toml(value)}")
    for inner_name, inner in nested:
        lines += _tables(inner, inner_name)
    return lines


def _toml(value: Any) -> str:
    if value is None:
        return f'"{NONE}"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if dataclasses.is_dataclass(value):
        return _toml(
            {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        )
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    # A JSON string is a TOML string, but for DEL, which TOML wants escaped.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
