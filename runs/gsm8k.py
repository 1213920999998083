"""A real fine-tuning: GSM8K's training split into a model, judged on problems it has not seen.

    make demo && .venv/bin/python runs/gsm8k.py               about 9 minutes on one core
    .venv/bin/python runs/gsm8k.py --model DIR --steps 2000   another model, longer

Each problem becomes a conversation: the question, the worked solution as the thought, the final
number as the answer. `runs/gsm8k.toml` shows most with their thought and some without. Before and
after are judged alike on the first problems of the test split:

    perplexity    of the held-out answers, per token, with their thought and without
    exact match   the answer's last number is the right one, greedy decoding
    valid         the answer ends by itself, is a number alone, and has a thought where one is asked
    guess         what one gets by always saying the most frequent number of the training split

GSM8K (MIT licence) is read from `$ENDSIDE_TEST_DATA/benchmarks/gsm8k`, else from
`../shared/data/benchmarks/gsm8k`; nothing of it is kept in the repository.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro

from endside import config as configuration
from endside.api import LLM
from endside.atomic import write_atomic
from endside.data.conversations import gather
from endside.errors import UserError
from endside.log import Progress
from endside.train import sft
from endside.train.run_folder import RunFolder
from endside.train.sft import SftConfig

ROOT = Path(__file__).resolve().parent.parent
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
MODES = {"think": True, "no_think": False}


@dataclass(frozen=True)
class Gsm8k:
    """Fine-tune a model on GSM8K's training split and judge it on the test split."""

    model: Path = ROOT / "runs" / "demo" / "model"
    """The model to begin with; `make demo` makes the default one."""
    data: Path | None = None
    """Folder of train.jsonl and test.jsonl; default: the published test data."""
    out: Path = ROOT / "runs" / "gsm8k"
    """Work folder: conversations, run, models. The same command again resumes."""
    items: int = 100
    """Problems of the test split that are answered."""
    steps: int = 0
    """Training steps; 0: as runs/gsm8k.toml says."""
    threads: int | None = None
    """CPU threads; default: PyTorch's choice."""
    tokens: int = 256
    """Tokens an answer may have, its thought included."""
    results: Path = ROOT / "reproduce" / "results" / "gsm8k.json"
    """Where the figures go."""


@dataclass(frozen=True)
class Judged:
    """One model in one mode."""

    perplexity: float  # per token of the held-out answers
    exact: float  # shares of the items
    valid: float
    tokens: float  # mean length of an answer


def main() -> None:
    """Data, training, judgement; prints a table and writes the figures."""
    flags = tyro.cli(Gsm8k, config=(tyro.conf.FlagCreatePairsOff,))
    source = _source(flags.data)
    folder = flags.out / "conversations"
    for split in ("train", "test"):
        write_split(source / f"{split}.jsonl", folder / f"{split}.jsonl")
    cfg = _config(flags, folder)
    items = [talk for _, talk in zip(range(flags.items), _talks(source / "test.jsonl"))]
    before = judge(_with_template(cfg, flags.out / "before"), cfg, items, flags)
    begun = time.monotonic()
    with RunFolder(flags.out / "run") as run:
        sft.main(cfg, run)
    trained = time.monotonic() - begun
    after = judge(flags.out / "run" / "model", cfg, items, flags)
    report = {
        "parameters": _parameters(flags.out / "run" / "model"),
        "steps": cfg.steps,
        "tokens_per_step": cfg.batch * cfg.accumulate * cfg.seq_len,
        "items": len(items),
        "always_one_number": best_guess(source / "train.jsonl", items),
        "before": {mode: asdict(one) for mode, one in before.items()},
        "after": {mode: asdict(one) for mode, one in after.items()},
        "training_seconds": round(trained),
        "machine": f"{platform.system()} {platform.machine()}, {cfg.threads or 'all'} threads",
    }
    _show(report)
    flags.results.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(flags.results, json.dumps(report, indent=1) + "\n")
    print(f"figures: {flags.results}\nask it: endside run {flags.out / 'run' / 'model'} --think")


def _source(given: Path | None) -> Path:
    base = os.environ.get("ENDSIDE_TEST_DATA")
    folder = given or (Path(base) if base else ROOT.parent / "shared" / "data") / "benchmarks/gsm8k"
    if not (folder / "train.jsonl").is_file():
        raise UserError(
            f"no GSM8K in {folder}: give --data a folder with its train.jsonl and test.jsonl"
        )
    return folder


def _talks(path: Path) -> Iterator[tuple[str, str, str]]:
    """Question, worked solution without its calculator marks, final number."""
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        worked, _, number = record["answer"].partition("####")
        thought = re.sub(r"<<[^>]*>>", "", worked).strip()
        yield record["question"].strip(), thought, number.strip().replace(",", "")


def write_split(source: Path, target: Path) -> None:
    """A split of GSM8K as conversations."""
    lines = [
        json.dumps({"messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": number, "reasoning_content": thought},
        ]}, ensure_ascii=False)
        for question, thought, number in _talks(source)
    ]  # fmt: skip
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(target, "\n".join(lines) + "\n")


def _config(flags: Gsm8k, folder: Path) -> SftConfig:
    values = configuration.read(ROOT / "runs" / "gsm8k.toml")
    values["start"] = str(flags.model)
    values["data"] |= {
        "sources": {str(folder / "train.jsonl"): 1.0}, "heldout": [str(folder / "test.jsonl")],
    }  # fmt: skip
    if flags.steps:
        values["steps"] = flags.steps
        values["schedule"] = {"warmup": flags.steps // 15, "decay": flags.steps // 3}
    if flags.threads:
        values["threads"] = flags.threads
    return configuration.build(SftConfig, values, source="runs/gsm8k.toml")


def _with_template(cfg: SftConfig, folder: Path) -> Path:
    """The model as it was, with the template that it will be trained in."""
    start = sft.open_start(cfg.start)
    return sft.export(start.model, start, sft.open_tokenizer(cfg, start), folder)


def judge(
    folder: Path, cfg: SftConfig, items: Sequence[tuple[str, str, str]], flags: Gsm8k
) -> dict[str, Judged]:
    """A model's figures in both modes."""
    losses = _losses(folder, cfg)
    llm = LLM(folder, context=1024, threads=flags.threads)
    progress, judged = Progress(), {}
    for mode, think in MODES.items():
        exact = valid = length = 0
        for place, (question, _, number) in enumerate(items):
            made = llm.chat(
                [{"role": "user", "content": question}],
                think=think, max_tokens=flags.tokens, temperature=0.0,
            )  # fmt: skip
            progress.update(f"{folder.name} {mode}: problem {place + 1}/{len(items)}")
            found = NUMBER.findall(made.text)
            exact += bool(found) and _value(found[-1]) == _value(number)
            alone = NUMBER.fullmatch(made.text.strip()) is not None
            thought = bool(made.reasoning.strip())
            valid += made.finish_reason == "stop" and alone and thought == think
            length += made.usage.completion_tokens
        shares = [count / len(items) for count in (exact, valid, length)]
        judged[mode] = Judged(math.exp(losses[mode]), *shares)
    progress.close()
    return judged


def _losses(folder: Path, cfg: SftConfig) -> dict[str, float]:
    """Nats per token of the held-out answers, each conversation shown both ways."""
    both = {**asdict(cfg), "thoughts": {"both": True}, "start": str(folder)}
    both["data"]["sources"] = dict.fromkeys(cfg.data.heldout, 1.0)
    shown = configuration.build(SftConfig, both, source="runs/gsm8k.py")
    start = sft.open_start(str(folder))
    tokenizer = sft.open_tokenizer(shown, start)
    examples = gather(
        shown.data, shown.thoughts, tokenizer, longest=shown.seq_len + 1, seed=shown.seed
    )
    evaluate = sft.heldout(examples, shown)
    assert evaluate is not None, "the test split is not empty"
    values = evaluate(start.model)
    return {mode: values[f"heldout_{mode}"] for mode in MODES}


def best_guess(train: Path, items: Sequence[tuple[str, str, str]]) -> float:
    """Share of the items that the most frequent training answer gets right."""
    common, _ = Counter(number for _, _, number in _talks(train)).most_common(1)[0]
    return sum(_value(number) == _value(common) for _, _, number in items) / len(items)


def _value(number: str) -> float:
    return float(number.replace(",", ""))


def _parameters(folder: Path) -> int:
    return sum(p.numel() for p in sft.open_start(str(folder)).model.parameters())


def _show(report: dict[str, Any]) -> None:
    print(
        f"{report['parameters'] / 1e6:.2f} M parameters, {report['steps']} steps of "
        f"{report['tokens_per_step']:,} tokens, {report['items']} problems of the test split"
    )
    print(f"{'':<18}{'perplexity':>12}{'exact':>10}{'valid':>10}{'tokens':>10}")
    for side in ("before", "after"):
        for mode, one in report[side].items():
            print(
                f"{side + ' ' + mode:<18}{one['perplexity']:>12.1f}{one['exact']:>10.1%}"
                f"{one['valid']:>10.1%}{one['tokens']:>10.0f}"
            )
    print(f"{'always one number':<30}{report['always_one_number']:>10.1%}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"endside: {error}")
