"""What a long job tells: one JSON object per line in metrics.jsonl, and a live view for a person.

The file is the record: a line is flushed as it is written, so a killed process loses at most the
line in the making, and a resumed run cuts off what its checkpoint does not know (`keep_until`). The
live view goes to stderr, so that stdout stays clean for pipes: a line or a small board rewritten in
place on a terminal, and a line printed every few seconds elsewhere.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from endside.atomic import atomic_file
from endside.errors import UserError

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

QUIET_SECONDS = 5.0  # between two progress lines where there is no terminal
BOARD_SECONDS = 0.1  # between two drawings of a board: faster is unreadable and costs time
BARS = "▁▂▃▄▅▆▇█"


class Metrics:
    """Appends records to a metrics.jsonl; every record carries its step."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # Unbuffered: nothing is left to be written when it is closed.
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (lives as long as the run)

    def append(self, step: int, values: dict[str, Any]) -> None:
        """Write one record; it survives the death of this process. A full disk is a UserError."""
        line = (json.dumps({"step": step, **values}) + "\n").encode()
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise UserError(
                f"cannot write {self.path}: {error.strerror or error}; free space and start the "
                "same run again, which goes on from its newest checkpoint"
            ) from error

    def sync(self) -> None:
        """Return once everything written is on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Finish; append is not allowed afterwards."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, without a last line that was cut off in the middle."""
    if not path.is_file():
        raise UserError(f"no metrics in {path}: give a folder that a training run has written")
    return [json.loads(line) for line in _whole_lines(path)]


def keep_until(path: Path, step: int) -> None:
    """Drop every record after `step`, atomically; what is kept stays byte for byte."""
    if not path.exists():
        return
    kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= step]
    with atomic_file(path) as file:
        file.writelines(line.encode() for line in kept)


def _whole_lines(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8") as file:
        yield from (line for line in file if line.endswith("\n"))


class Progress:
    """A live line or board on a terminal; plain lines, a few seconds apart, anywhere else."""

    def __init__(
        self, stream: TextIO | None = None, *, quiet_seconds: float = QUIET_SECONDS
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty()
        self._quiet_seconds = quiet_seconds
        self._last = float("-inf")
        self._shown = False
        self._unsaid = ""  # the latest line, where it came too early to be printed
        self._view: Live | None = None

    def update(self, text: str) -> None:
        """Replace the live line; without a terminal, print it if the last one is old enough."""
        now = time.monotonic()
        if self._live:
            # Return to the first column, write, and erase what a longer line left behind.
            self._stream.write(f"\r{text}\x1b[K")
            self._shown = True
        elif now - self._last >= self._quiet_seconds:
            self._stream.write(text + "\n")
            self._last, self._unsaid = now, ""
        else:
            self._unsaid = text
        self._stream.flush()

    def board(
        self, line: str, cells: Mapping[str, str], *, share: float, trend: Sequence[float] = ()
    ) -> None:
        """Show named values, how much is done and a curve; without a terminal, `line` instead."""
        if not self._live:
            self.update(line)
            return
        now = time.monotonic()
        if self._view is not None and now - self._last < BOARD_SECONDS and share < 1:
            return
        self._last = now
        if self._view is None:
            from rich.console import Console
            from rich.live import Live

            console = Console(file=self._stream, force_terminal=True)
            self._view = Live(console=console, auto_refresh=False)
            self._view.start()
        self._view.update(_drawn(cells, share, trend), refresh=True)

    def note(self, text: str) -> None:
        """Print a line that stays, above the live one."""
        if self._view is not None:
            self._view.console.print(text, markup=False, highlight=False)
            return
        self._stream.write(f"\r{text}\x1b[K\n" if self._live else text + "\n")
        self._stream.flush()
        self._shown = False

    def close(self, text: str = "") -> None:
        """End the live view, leaving `text` (or what was last shown, or held back)."""
        if self._view is not None:
            self._view.stop()
            self._view = None
        if text or self._unsaid:
            self.note(text or self._unsaid)
        elif self._shown:
            self._stream.write("\n")
            self._stream.flush()
        self._shown, self._unsaid = False, ""


def _drawn(cells: Mapping[str, str], share: float, trend: Sequence[float]) -> Table:
    """A bar of what is done above a table of names and values."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    shown = {name: value for name, value in cells.items() if value}
    table.add_row(*(f"[dim]{name}[/dim]" for name in shown), "[dim]loss of late[/dim]")
    table.add_row(*(f"[bold]{value}[/bold]" for value in shown.values()), curve(trend))
    whole = Table.grid(expand=True)
    whole.add_row(ProgressBar(total=1.0, completed=share))
    whole.add_row(table)
    return whole


def curve(values: Sequence[float]) -> str:
    """Values as one character each, from the lowest bar to the highest."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    step = (high - low) / (len(BARS) - 1) or 1.0
    return "".join(BARS[round((value - low) / step)] for value in values)


def duration(seconds: float) -> str:
    """Seconds as 59s, 3m05s or 2h07m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
