"""One module per verb of the command line: its flags as a dataclass, and `main(argv)`."""

from __future__ import annotations

from typing import TypeVar

Flags = TypeVar("Flags")


def parse(flags: type[Flags], argv: list[str], verb: str) -> Flags:
    """`argv` as an instance of the dataclass `flags`; tyro prints help or the error and exits."""
    import tyro

    marks = [tyro.conf.FlagCreatePairsOff, tyro.conf.UseAppendAction]
    if not {"-h", "--help"} & set(argv):
        # reading the sources for their comments takes 0.1 s, and nobody asked for them
        marks.append(tyro.conf.HelptextFromCommentsOff)
    return tyro.cli(flags, args=argv, prog=f"endside {verb}", config=tuple(marks))
