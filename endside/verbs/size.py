"""`endside size`: lines per room and function lengths of this package."""

from __future__ import annotations

from dataclasses import dataclass

from endside.verbs import parse


@dataclass(frozen=True)
class Size:
    """Print the lines per room and the function lengths of this package."""


def main(argv: list[str]) -> None:
    """Print the table."""
    from endside.size import report

    parse(Size, argv, "size")
    print(report())
