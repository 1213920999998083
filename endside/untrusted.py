"""Untrusted text: nothing a stranger writes may become a control token.

A template pastes contents between control tokens that it writes as text. So each name of a control
token in a content is replaced, before rendering, by one private-use character that occurs nowhere
in the input, and put back into the plain text afterwards. One character, so that a template which
strips or cuts contents cannot leave half of it.

A name can also be put together by two strings side by side ("<|im_" and "end|>"). Hence the longest
half of a name at either edge of a string is replaced too. Halves that are ordinary words are left:
schemas compare such words, and templates put signs around them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any

from endside.errors import UserError

NOTHING: frozenset[str] = frozenset()


class Cover:
    """Replaces names of control tokens by private characters, one for each different text."""

    def __init__(self, names: Iterable[str], used: set[str]) -> None:
        self.literals: dict[int, str] = {}
        self._codes: dict[str, int] = {}
        self._names = _halves(tuple(names))
        planes = chain(range(0x100000, 0x10FFFE), range(0xF0000, 0xFFFFE), range(0xE000, 0xF900))
        self._free = (code for code in planes if chr(code) not in used)

    def hide(self, text: str, *, keep: frozenset[str] = NOTHING) -> str:
        """The text without names of control tokens, except those to keep."""
        names = self._names
        if names.pattern is None or not text:
            return text
        text = names.pattern.sub(
            lambda match: match[0] if match[0] in keep else self._cover(match[0]), text
        )
        longest = range(min(names.longest - 1, len(text)), 0, -1)
        for size in longest:
            if text[-size:] in names.beginnings:
                text = text[:-size] + self._cover(text[-size:])
                break
        for size in longest:
            if text[:size] in names.endings:
                return self._cover(text[:size]) + text[size:]
        return text

    def _cover(self, literal: str) -> str:
        if literal not in self._codes:
            code = next(self._free, None)
            if code is None:
                raise UserError("the conversation uses every private-use character: remove some")
            self._codes[literal] = code
            self.literals[code] = literal
        return chr(self._codes[literal])


@dataclass(frozen=True)
class Names:
    """The names of control tokens, and the halves that two strings side by side could join."""

    pattern: re.Pattern[str] | None
    beginnings: frozenset[str] = NOTHING
    endings: frozenset[str] = NOTHING
    longest: int = 0


@lru_cache(maxsize=8)
def _halves(names: tuple[str, ...]) -> Names:
    if not names:
        return Names(None)
    ordered = sorted(names, key=lambda one: (-len(one), one))
    starts = "".join(sorted({re.escape(one[0]) for one in names}))
    pattern = re.compile(f"(?=[{starts}])(?:{'|'.join(map(re.escape, ordered))})")
    # a half that is all letters is an ordinary word, and no template glues words to names
    halves = [(one[:at], one[at:]) for one in names for at in range(1, len(one))]
    beginnings = frozenset(half for half, _ in halves if re.search(r"\W", half))
    endings = frozenset(half for _, half in halves if re.search(r"\W", half))
    return Names(pattern, beginnings, endings, len(ordered[0]))


def walk(value: Any, change: Callable[[str], str]) -> Any:
    """The same structure with every string in it changed, names of fields too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {walk(key, change): walk(one, change) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [walk(one, change) for one in value]
    return value


def characters(value: Any) -> set[str]:
    """Every character of every string in a structure."""
    found: set[str] = set()

    def note(text: str) -> str:
        found.update(text)
        return text

    walk(value, note)
    return found
