"""Records survive, partial lines do not; the live line is live only on a terminal."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from endside.errors import UserError
from endside.log import Metrics, Progress, curve, duration, keep_until, read_metrics


def test_metrics_are_in_the_file_at_once_and_appended_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = Metrics(path)
    first.append(1, {"loss": 0.1 + 0.2})
    assert read_metrics(path) == [{"step": 1, "loss": 0.30000000000000004}]
    first.close()
    second = Metrics(path)
    second.append(2, {"loss": 1.5})
    second.close()
    assert [record["step"] for record in read_metrics(path)] == [1, 2]


def test_a_line_cut_off_by_a_kill_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]
    keep_until(path, 5)
    assert path.read_text() == '{"step": 1, "loss": 2.0}\n'


def test_keep_until_drops_later_records_and_keeps_bytes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    kept = '{"step":1,"loss":2.50}\n{"step": 2, "heldout_loss": 2e0}\n'
    path.write_text(kept + '{"step": 3, "loss": 1}\n')
    keep_until(path, 2)
    assert path.read_text() == kept
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
    keep_until(tmp_path / "absent.jsonl", 2)
    assert not (tmp_path / "absent.jsonl").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_the_users_error_and_closing_is_quiet() -> None:
    metrics = Metrics(Path("/dev/full"))
    with pytest.raises(UserError, match=r"cannot write /dev/full: No space.*newest checkpoint"):
        metrics.append(1, {"loss": 1.0})
    metrics.close()


def test_no_metrics_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no metrics in"):
        read_metrics(tmp_path / "metrics.jsonl")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_one_line_rewritten() -> None:
    stream = Terminal()
    progress = Progress(stream)
    progress.update("step 1")
    progress.update("step 2")
    progress.note("saved")
    progress.update("step 3")
    progress.close()
    lines = stream.getvalue().split("\n")
    assert lines[0].count("\r") == 3
    assert "saved" in lines[0]
    assert "step 3" in lines[1]
    assert lines[2] == ""


def test_a_pipe_gets_plain_lines_some_seconds_apart() -> None:
    stream = io.StringIO()
    progress = Progress(stream, quiet_seconds=3600)
    for step in range(5):
        progress.update(f"step {step}")
    progress.note("saved")
    progress.close("done")
    assert stream.getvalue() == "step 0\nsaved\ndone\n"


CELLS = {"step": "3/9", "loss": "2.5000", "held out": "", "MFU": "41%"}


def test_a_terminal_gets_a_board_that_notes_do_not_tear() -> None:
    stream = Terminal()
    progress = Progress(stream)
    progress.board("a line", CELLS, share=3 / 9, trend=[3.0, 2.75, 2.5])
    progress.note("saved [bold]")
    progress.board("a line", {**CELLS, "loss": "1.0000"}, share=1.0)
    progress.close()
    text = stream.getvalue()
    for part in ("3/9", "2.5000", "1.0000", "MFU", "41%", "█▅▁", "saved [bold]"):
        assert part in text
    assert "a line" not in text
    assert "held out" not in text


def test_a_pipe_gets_the_line_of_a_board() -> None:
    stream = io.StringIO()
    Progress(stream).board("step 3/9  loss 2.5", CELLS, share=3 / 9)
    assert stream.getvalue() == "step 3/9  loss 2.5\n"


def test_a_curve_spans_all_bars() -> None:
    assert curve([]) == ""
    assert curve([4.0, 4.0]) == "▁▁"
    assert curve([0.0, 3.5, 7.0]) in ("▁▅█", "▁▄█")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.4, "59s"), (59.6, "1m00s"), (185, "3m05s"), (3600, "1h00m"), (7620, "2h07m")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_last_line_is_printed_however_early_it_came() -> None:
    stream = io.StringIO()
    progress = Progress(stream, quiet_seconds=3600)
    for number in range(4):
        progress.update(f"step {number}")
    progress.close()
    progress.close()
    assert stream.getvalue() == "step 0\nstep 3\n"
