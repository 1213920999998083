"""`endside demo`: the tour."""

from __future__ import annotations


def main(argv: list[str]) -> None:
    """Parse the flags and walk."""
    from endside.demo import Demo, tour
    from endside.verbs import parse

    tour(parse(Demo, argv, "demo"))
