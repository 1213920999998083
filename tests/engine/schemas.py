"""Random JSON schemas whose strings and arrays are bounded, so that every answer can end."""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any]
NAMES = ["a", "b", "name", "first name", "x-1", "été", '"', "id", "properties", "required"]
VALUES = [1, 2.5, "a", "bc d", '"q\\', "é", None, True, False, [1, "x"], {"k": 1}, {"a": {"b": []}}]
PATTERNS = ["^[a-z]{1,5}$", r"^\d{3}-\d{2}$", "^(yes|no)$", "^a.?b$"]
LEAVES = ("string", "integer", "number", "plain", "enum", "const", "choice", "pattern", "format")
BRANCHES = ("array", "object", "object", "any of", "reference")


def schema(seed: int) -> Schema:
    """One schema; the same for the same seed."""
    draw = random.Random(seed)
    made = _any(draw, 0)
    return {**made, "$defs": {"leaf": {"type": "string", "maxLength": 3}}}


def _any(draw: random.Random, depth: int) -> Schema:
    kind = draw.choice(LEAVES + BRANCHES if depth < 3 else LEAVES)
    if kind in BRANCHES:
        return _branch(draw, kind, depth)
    if kind == "string":
        return {"type": kind, **_range(draw, "Length", draw.randint(0, 12))}
    if kind in ("integer", "number"):
        return {"type": kind, **_bounds(draw, whole=kind == "integer")}
    if kind == "choice":
        return {"type": draw.sample(["integer", "boolean", "null", "number"], draw.randint(1, 3))}
    return {
        "plain": {"type": draw.choice(["boolean", "null"])},
        "enum": {"enum": draw.sample(VALUES, draw.randint(1, 4))},
        "const": {"const": draw.choice(VALUES)},
        "pattern": {"type": "string", "pattern": draw.choice(PATTERNS)},
        "format": {"type": "string", "format": draw.choice(["date", "uuid", "ipv4", "time"])},
    }[kind]


def _branch(draw: random.Random, kind: str, depth: int) -> Schema:
    if kind == "array":
        made = {"type": kind, **_range(draw, "Items", draw.randint(0, 4))}
        if draw.random() < 0.3:
            made["prefixItems"] = [_any(draw, depth + 1) for _ in range(draw.randint(1, 2))]
        return {**made, "items": _any(draw, depth + 1)}
    if kind == "any of":
        return {"anyOf": [_any(draw, depth + 1) for _ in range(draw.randint(1, 3))]}
    if kind == "reference":
        leaf = {"$ref": "#/$defs/leaf"}
        return {"type": "object", "properties": {"n": leaf, "m": leaf}, "required": ["m"]}
    names = draw.sample(NAMES, draw.randint(0, 4))
    made = {"type": kind, "properties": {name: _any(draw, depth + 1) for name in names}}
    made["required"] = [name for name in names if draw.random() < 0.6]
    if not names or draw.random() < 0.5:
        made["additionalProperties"] = False
    return made


def _range(draw: random.Random, what: str, most: int) -> Schema:
    least = {f"min{what}": draw.randint(0, most)} if draw.random() < 0.4 else {}
    return {f"max{what}": most, **least}


def _bounds(draw: random.Random, *, whole: bool) -> Schema:
    kind = draw.random()
    low = draw.randint(-500, 500) if whole else round(draw.uniform(-5, 5), 2)
    made: Schema = {}
    if kind < 0.3:
        made["minimum"] = low
    if 0.2 < kind < 0.5:
        made["maximum" if whole else "exclusiveMaximum"] = low + draw.randint(1, 5000)
    if kind > 0.9:
        made["multipleOf"] = draw.randint(1, 12) if whole else 0.5
    return made
