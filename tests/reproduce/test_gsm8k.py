"""The fine-tuning example: what it makes of the data set's lines, and that its judge is just."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from endside.train.sft import SftConfig
from tests.train.sums import write_start

ROOT = Path(__file__).resolve().parents[2]
LINES = [
    {"question": "Two bags of 3?", "answer": "2*3=<<2*3=6>>6 in all.\n#### 6"},
    {"question": "A thousand and 5?", "answer": "1000+5=<<1000+5=1005>>1,005\n#### 1,005"},
    {"question": "Three twos?", "answer": "3*2=<<3*2=6>>6\n#### 6"},
]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gsm8k", ROOT / "runs" / "gsm8k.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["gsm8k"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in LINES))
    return tmp_path


def test_problems_become_conversations(script: ModuleType, source: Path) -> None:
    script.write_split(source / "train.jsonl", source / "out" / "train.jsonl")
    lines = (source / "out" / "train.jsonl").read_text().splitlines()
    assert json.loads(lines[1])["messages"] == [
        {"role": "user", "content": "A thousand and 5?"},
        {"role": "assistant", "content": "1005", "reasoning_content": "1000+5=1,005"},
    ]
    items = list(script._talks(source / "test.jsonl"))
    assert script.best_guess(source / "train.jsonl", items) == pytest.approx(2 / 3)


def config(script: ModuleType, source: Path, start: Path) -> tuple[SftConfig, Any]:
    for split in ("train", "test"):
        script.write_split(source / f"{split}.jsonl", source / "out" / f"{split}.jsonl")
    flags = script.Gsm8k(model=start, out=source, steps=3, threads=1, tokens=4)
    return script._config(flags, source / "out"), flags


@pytest.mark.parametrize(
    ("answer", "thought", "reason", "exact", "valid"),
    [("6", True, "stop", 2 / 3, 1.0), ("6", False, "stop", 2 / 3, 0.0),
     ("it is 6.", True, "stop", 2 / 3, 0.0), ("6", True, "length", 2 / 3, 0.0),
     ("1,005", True, "stop", 1 / 3, 1.0), ("7", True, "stop", 0.0, 1.0), ("", True, "stop", 0, 0)],
)  # fmt: skip
def test_the_judge(
    script: ModuleType, source: Path, monkeypatch: pytest.MonkeyPatch,
    answer: str, thought: bool, reason: str, exact: float, valid: float,
) -> None:  # fmt: skip
    class Says:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def chat(self, _: Any, *, think: bool, **__: Any) -> SimpleNamespace:
            usage = SimpleNamespace(completion_tokens=7)
            reasoning = "so" if think == thought else ""
            return SimpleNamespace(
                text=answer, reasoning=reasoning, finish_reason=reason, usage=usage
            )

    cfg, flags = config(script, source, source)
    monkeypatch.setattr(script, "LLM", Says)
    monkeypatch.setattr(script, "_losses", lambda *_: {"think": 0.0, "no_think": 1.0})
    judged = script.judge(source, cfg, list(script._talks(source / "test.jsonl")), flags)
    assert judged["think"] == script.Judged(1.0, pytest.approx(exact), pytest.approx(valid), 7.0)


def test_the_whole_of_it(
    script: ModuleType, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    data, start = source / "data" / "benchmarks" / "gsm8k", write_start(source / "start")
    data.mkdir(parents=True)
    for split in ("train", "test"):
        (source / f"{split}.jsonl").rename(data / f"{split}.jsonl")
    monkeypatch.setenv("ENDSIDE_TEST_DATA", str(source / "data"))
    options = {"model": start, "out": source / "out", "results": source / "r.json", "items": 1,
               "steps": 3, "threads": 1, "tokens": 4}  # fmt: skip
    monkeypatch.setattr(
        sys, "argv", ["gsm8k.py", *(f"--{key}={value}" for key, value in options.items())]
    )
    script.main()
    report = json.loads((source / "r.json").read_text())
    for mode in ("think", "no_think"):
        before, after = report["before"][mode], report["after"][mode]
        assert 100 < before["perplexity"] < 1000  # of a random model with 320 tokens
        assert after["perplexity"] < before["perplexity"]
        assert before["exact"] == before["valid"] == 0
    assert report["always_one_number"] == 1
    printed = capsys.readouterr().out
    for part in ("3 steps of 4,096 tokens", "before think", "after no_think", "always one number"):
        assert part in printed
