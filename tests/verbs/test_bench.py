"""`endside bench`: the table, the JSON, the commands on standard input, and what is refused."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from endside import cli, native

pytestmark = pytest.mark.skipif(
    not native.available_isas(), reason="the native core is not built here"
)

FLAGS = ("random:tiny-sparse", "--quant", "int4", "--threads", "1", "--tokens", "2",
         "--repeats", "2", "--base", "1024")  # fmt: skip


def _bench(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        cli.main(["bench", *flags])
    said = capsys.readouterr()
    return left.value.code or 0, said.out, said.err


def test_json_says_what_was_measured_and_how(capsys: pytest.CaptureFixture[str]) -> None:
    """Lengths in order, speeds with their spread, sight from the core, share of the bandwidth."""
    code, out, _ = _bench(capsys, *FLAGS, "--context", "3000,65", "--json")
    report = json.loads(out)
    assert code == 0 and report["executor"] == "native" and report["threads"] == 1
    short, long = report["rows"]
    assert (short["context"], short["prefill_tokens"], short["tiled"]) == (65, 65, False)
    assert (short["visible"], short["available"]) == (66, 66)
    assert (long["context"], long["prefill_tokens"], long["tiled"]) == (3000, 512, True)
    assert long["visible"] < 0.5 * long["available"] == 1500.5
    for row in report["rows"]:
        speed = row["decode_tokens_per_s"]
        assert 0 < speed["min"] <= speed["median"] <= speed["max"]
        assert row["bytes_per_token"] > report["weight_bytes"]
        rate = row["bytes_per_token"] * speed["median"]
        assert row["bytes_per_s"] == pytest.approx(rate, abs=1)
        share = rate / report["bandwidth_bytes_per_s"]
        assert row["share_of_bandwidth"] == pytest.approx(share, rel=1e-4)


def test_the_table_marks_copies(capsys: pytest.CaptureFixture[str]) -> None:
    """One line per length; a star where the depth is made of copies."""
    code, out, _ = _bench(capsys, *FLAGS, "--context", "65,1500")
    lines = out.splitlines()
    assert code == 0 and lines[3].endswith("66 of 66") and lines[4].endswith("of 1,501 *")


def test_serve_answers_each_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands of the peer's driver; a wrong one is answered and does not end the process."""
    commands = ["depth 2048 1024", "decode 3", "prefill 65", "sight 1", "expected 1", "weights",
                "memory", "dance 3", "decode 9000", "decode x", "quit", "decode 1"]  # fmt: skip
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(commands) + "\n"))
    code, out, _ = _bench(capsys, *FLAGS, "--context", "4000", "--serve")
    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and len(answers) == 11
    ready, depth, decode, prefill, sight, expected, weights, memory, *wrong = answers
    assert ready["ready"] and depth["depth"] == 2048 and depth["seconds"] > 0
    assert len(decode["each"]) == 3 and decode["seconds"] == pytest.approx(sum(decode["each"]))
    assert prefill["tokens"] == 65 and weights["bytes"] > 0
    assert sight["available"] == 2049 and {**expected, "did": "sight"} == sight
    assert memory["peak_bytes"] >= memory["resident_bytes"] > 1 << 20
    assert all("error" in answer for answer in wrong) and "context" in wrong[1]["error"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--context", "512,many"), "give lengths separated by commas"),
        (("--context", "0"), "start at 1"),
        (("--repeats", "0"), "start at 1"),
        (("--quant", "int5"), "int5"),
        (("--executor", "torch"), "random:PRESET"),
    ],
)
def test_wrong_flags_are_refused(
    flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2 and one line that says what to do."""
    code, _, err = _bench(capsys, "random:tiny-sparse", *flags)
    assert code == 2 and message in err


def test_no_such_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder that is not there, and a preset that is none."""
    assert _bench(capsys, str(tmp_path / "nowhere"))[0] == 2
    assert "no preset is called" in _bench(capsys, "random:minicpm9", "--quant", "int4")[2]
