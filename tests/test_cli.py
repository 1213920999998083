"""The command line as a user meets it: answers, JSON, exit codes, and a chat at a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from endside import cli, native, verbs
from endside.formats import hf
from endside.model.presets import preset
from endside.model.transformer import Transformer
from endside.tokenizer import train_bpe
from endside.verbs import run

needs_core = pytest.mark.skipif(not native.available_isas(), reason="no native core here")
TEXT = ["the quick brown fox jumps over the lazy dog, again and again. " * 40]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny checkpoint with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("cli")
    tokenizer = train_bpe(iter(TEXT), 300)
    tokenizer.save(folder / "tokenizer")
    config = replace(
        preset("tiny"), vocab_size=tokenizer.vocab_size, max_position_embeddings=256,
        bos_token_id=tokenizer.bos_id, eos_token_ids=tuple(tokenizer.eos_ids),
    )  # fmt: skip
    made = Transformer(config)
    made.init_weights(torch.Generator().manual_seed(3))
    return hf.save(made, folder / "model", tokenizer_files=folder / "tokenizer")


def _run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        cli.main([str(one) for one in argv])
    said = capsys.readouterr()
    return left.value.code or 0, said.out, said.err


def test_run_prints_the_answer_and_the_same_for_the_same_seed(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sampling with a seed repeats; another seed does not; stdout holds the text alone."""
    flags = ("--max-tokens", "12", "--temperature", "1.5")
    texts = [_run(capsys, "run", model, "the fox", *flags, "--seed", s) for s in ("1", "1", "2")]
    assert [code for code, _, _ in texts] == [0, 0, 0]
    assert texts[0][1] == texts[1][1] != texts[2][1]


def test_json_has_the_public_shape(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One object with the fields of the interface; token ids are as many as were counted."""
    code, out, _ = _run(capsys, "run", model, "the fox", "--max-tokens", "5", "--json")
    made = json.loads(out)
    assert code == 0
    wanted = {"text", "token_ids", "finish_reason", "usage", "timings", "attention", "executor"}
    assert wanted | {"peak_memory_bytes"} <= made.keys()
    assert len(made["token_ids"]) == made["usage"]["completion_tokens"] <= 5
    assert made["attention"]["mode"] == "dense"


@pytest.mark.parametrize("kind", ["--json-schema", "--regex", "--grammar"])
def test_answers_take_the_shape_asked_for(
    kind: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Piped on, stdout holds the answer alone; --json has the fields of a chat as well."""
    given = {"--json-schema": '{"enum": [[1]]}', "--grammar": 'start: "[" "1" "]"'}
    (tmp_path / "file").write_text(given.get(kind, ""))
    flags = (kind, tmp_path / "file" if kind in given else r"\[1\]")
    code, out, err = _run(capsys, "run", model, "the fox", *flags)
    assert (code, err) == (0, "")
    assert json.loads(out) == [1]
    made = json.loads(_run(capsys, "run", model, "the fox", *flags, "--json")[1])
    assert (made["finish_reason"], made["reasoning"], made["tool_calls"]) == ("stop", "", [])


def test_a_thought_goes_to_stderr(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "thinks"
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("endside.manifest.json"))
    template = "{{ messages[0].content }}<think>\n"
    (folder / "chat_template.jinja").write_text(template)
    flags = ("--thinking-budget", "6", "--regex", "yes|no", "--temperature", "2", "--seed", "1")
    code, out, err = _run(capsys, "run", folder, "the fox", *flags)
    assert (code, out.strip()) in ((0, "yes"), (0, "no"))
    assert err.strip() and "think>" not in err
    assert _run(capsys, "run", folder, "the fox", "--max-tokens", "5")[1].strip() == ""


def test_inspect_counts_and_explains(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The published 8B shape has its size; sparse attention is planned when asked for."""
    flags = ("--context", "32768", "--attention", "sparse", "--json")
    code, out, _ = _run(capsys, "inspect", "random:minicpm4-0.5b", *flags)
    report = json.loads(out)
    assert code == 0
    assert report["parameters"]["total"] == pytest.approx(433.9e6, rel=1e-3)
    seen = report["attention"]
    assert (seen["mode"], seen["selection"], seen["blocks"]) == ("sparse", "4.1", 96)
    assert seen["visible_tokens"] / seen["available_tokens"] < 0.5
    code, out, _ = _run(capsys, "inspect", model)
    assert "no sparse_config" in out, "inspect does not say why attention is dense"


@needs_core
def test_inspect_prints_the_native_plan(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights by part, the cache per token, the steps, threads and the instruction set."""
    flags = ("--quant", "int4", "--context", "2048", "--threads", "1")
    code, out, _ = _run(capsys, "inspect", "random:minicpm4-0.5b", *flags)
    assert code == 0
    for said in (
        "int4-g128-head-int4",
        "threads 1",
        "bytes per token",
        "head weights",
        "attention weights",
        "attention's scratch",
        "one step",
        "qkv",
    ):
        assert said in out, f"{said!r} is not in:\n{out}"
    code, out, _ = _run(capsys, "inspect", "random:minicpm4-0.5b", *flags, "--json")
    report = json.loads(out)
    assert report["executor"]["name"] == "native"
    memory = report["memory"]
    # 24 layers, 2 heads of 64, keys and values in 2 bytes
    assert memory["cache_bytes_per_token"] == pytest.approx(24 * 2 * 64 * 2 * 2, rel=0.05)
    # 4.125 bits for 359 M weights and for the head's 75 M
    assert memory["weights_bytes"] == pytest.approx(433.9e6 * 4.125 / 8, rel=0.01)
    assert memory["weights_bytes"] + memory["cache_bytes"] < memory["total_bytes"]


@needs_core
def test_a_context_that_cannot_fit_is_refused_with_the_largest(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`inspect` and `run` say the same, and the length they name does fit."""
    monkeypatch.setattr("endside.engine.executors.native_plan.free_memory", lambda: 2 * 10**9)
    flags = ("random:minicpm4-0.5b", "--quant", "int4", "--context")
    code, _, err = _run(capsys, "inspect", *flags, "1000000")
    largest = re.search(r"the largest context that fits is ([\d,]+)", err)
    assert code == 2 and largest, err
    fitting = int(largest[1].replace(",", ""))
    assert 50_000 < fitting < 200_000
    assert _run(capsys, "inspect", *flags, str(fitting))[0] == 0
    assert _run(capsys, "inspect", *flags, str(fitting + 1024))[0] == 2
    monkeypatch.setattr("endside.engine.executors.native_plan.free_memory", lambda: 70 * 2**20)
    code, _, err = _run(capsys, "run", model, "a", "--context", "200000")
    assert code == 2 and "the largest context that fits" in err, err


@pytest.mark.parametrize(
    "argv",
    [
        ["m", "text"], ["--json", "m", "two words", "--max-tokens", "5", "--stats"],
        ["m", "--stop", "a", "--stop", "b", "--temperature", "0.5", "--file", "x/y.txt"],
        ["m", "--quant", "int4", "--group", "32", "--context", "1_000", "--seed", "0"],
        ["m", "--json-schema", "a/b.json", "--thinking-budget", "0", "--think"],
        ["m", "a", "--regex", "a+ b", "--grammar", "x.lark"],
    ],
)  # fmt: skip
def test_plain_lines_are_read_as_tyro_reads_them(
    argv: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = verbs.parse(run.Run, argv, "run")
    assert quick == verbs._plain(run.Run, argv)

    def never(*_: object) -> object:
        raise verbs._NotPlain

    monkeypatch.setattr(verbs, "_plain", never)
    assert verbs.parse(run.Run, argv, "run") == quick


@pytest.mark.parametrize(
    "argv",
    [
        ["-h"], ["m", "--help"], ["m", "a", "b"], ["m", "--model", "x"], ["m", "--nothing"],
        ["m", "--max-tokens"], ["m", "--max-tokens", "x"], ["m", "--max-tokens=5"],
        ["m", "--max-tokens", "1", "--max-tokens", "2"], ["m", "--max_tokens", "1"],
        ["m", "--top-k", "-1"], ["m", "--quant", "int5"], ["m", "--seed", "None"], ["m", "-x"],
    ],
)  # fmt: skip
def test_everything_else_is_left_to_tyro(argv: list[str]) -> None:
    with pytest.raises(verbs._NotPlain):
        verbs._plain(run.Run, argv)


BAD = {
    "nothing": (["run"], "MODEL is missing"),
    "empty prompt": (["run", "{model}", ""], "prompt is empty"),
    "long prompt": (["run", "{model}", "fox " * 400], "cache holds 256"),
    "nan": (["run", "{model}", "a", "--temperature", "nan"], "temperature"),
    "negative": (["run", "{model}", "a", "--top-k", "-1"], "top_k"),
    "contradiction": (["run", "{model}", "a", "--temperature", "0", "--top-p", "0.5"], "top_p"),
    "both thoughts": (["run", "{model}", "a", "--think", "--no-think"], "contradict"),
    "no template": (["run", "{model}", "a", "--system", "be kind"], "chat template"),
    "no model": (["run", "{tmp}", "a"], "config.json"),
    "missing": (["run", "{tmp}/nowhere", "a"], "nowhere"),
    "pickle": (["run", "{tmp}/weights.bin", "a"], "pickle"),
    "verb": (["rum", "x"], "did you mean run"),
    "preset": (["inspect", "random:huge"], "minicpm4-8b"),
    "unwritable": (["convert", "{model}", "{tmp}/weights.bin/out", "--to", "llama"], "weights.bin"),
    "bits on torch": (["run", "{model}", "a", "--quant", "int4", "--executor", "torch"], "--quant"),
    "dtype natively": (
        ["run", "{model}", "a", "--quant", "int4", "--dtype", "float32"],
        "dtype float32",
    ),
    "no file": (["run", "{model}", "--file", "{tmp}/none.txt"], "none.txt"),
    "no toml": (["pretrain", "{tmp}/none.toml"], "none.toml"),
    "no schema": (["run", "{model}", "a", "--json-schema", "{tmp}/no.json"], "no.json"),
    "no json": (["run", "{model}", "a", "--json-schema", "{tmp}/a.lark"], "no JSON"),
    "bad grammar": (["run", "{model}", "a", "--grammar", "{tmp}/a.lark"], "cannot be used"),
    "bad regex": (["run", "{model}", "a", "--regex", "(a"], "unclosed group"),
    "two shapes": (
        ["run", "{model}", "a", "--regex", "a", "--grammar", "{tmp}/a.lark"],
        "give one",
    ),
    "no thought": (["run", "{model}", "a", "--no-think", "--thinking-budget", "3"], "give one"),
    "raw thought": (["run", "{model}", "a", "--raw", "--thinking-budget", "3"], "--raw"),
    "budget": (["run", "{model}", "a", "--thinking-budget", "3"], "chat template"),
    "demo out": (["demo", "--out", "{tmp}/weights.bin/x", "--steps", "1"], "weights.bin"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_message_and_code_2(
    case: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, one message that names the thing, no traceback, nothing written."""
    (tmp_path / "weights.bin").write_bytes(b"\x80\x04not weights")
    (tmp_path / "a.lark").write_text("start: nothing")
    argv, said = BAD[case]
    before = sorted(tmp_path.rglob("*"))
    filled = [one.format(model=model, tmp=tmp_path) for one in argv]
    code, out, err = _run(capsys, *filled)
    assert code == 2, err
    assert said in err and "Traceback" not in err
    assert out == "" and len(err.strip().splitlines()) == 1, f"more than one message: {err}"
    assert sorted(tmp_path.rglob("*")) == before, "something was written"


def test_chat_at_a_terminal_survives_an_interrupt(model: Path) -> None:
    """Ctrl-C stops the answer, the next question is answered, Ctrl-D leaves with code 0."""
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "endside", "run", str(model), "--temperature", "1"]
    process = subprocess.Popen(
        command, stdin=follower, stdout=follower, stderr=follower, start_new_session=True
    )
    os.close(follower)
    try:
        _until(leader, b"> ")
        os.write(leader, b"the fox\n")
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _until(leader, b"> ")
        os.write(leader, b"the dog\n")
        _until(leader, b"> ")
        os.write(leader, b"\x04")
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        os.close(leader)


def _until(leader: int, wanted: bytes, seconds: float = 60.0) -> None:
    """Read the terminal until a prompt stands at the end of what it shows."""
    seen, end = b"", time.monotonic() + seconds
    while not seen.endswith(wanted):
        assert time.monotonic() < end, f"no {wanted!r} within {seconds} s: {seen[-300:]!r}"
        if select.select([leader], [], [], 0.5)[0]:
            seen += os.read(leader, 65536)
