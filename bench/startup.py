"""How long a user waits: `endside --help`, and the first token of `endside run`.

    python bench/startup.py [--model DIR] [--repeats 7]

Each figure is a fresh process, interleaved with `python -c "import torch"` in the same run, which
is the part of the torch executor's wait that is not ours. Limits: --help < 0.5 s; on the demo's
shape and the torch executor the first token at most 1.5 s after what `import torch` alone takes; on
the 0.5B shape (random weights, int4, 16-token prompt, packed before, files in memory) and the
native executor, which loads no torch, the first token < 1 s after the process begins. The 0.5B
model needs the published tokenizer ($ENDSIDE_TEST_DATA, else ../shared/data) and is left out, with
a line that says so, where that is absent. Without --model, a random demo model is written.
Prints a table, writes bench/results/startup.json, and exits with 1 where a limit is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIMITS = {"help": 0.5, "first_token_after_torch": 1.5, "native_0.5b": 1.0}  # seconds
PROMPT = " ".join(["token"] * 15)  # 16 tokens with the first, in the published tokenizer


def main() -> int:
    """Measure, print, write; 1 where a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", type=Path, help="a checkpoint folder; default: random demo shape"
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "startup.json")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = flags.model or _random_demo(Path(scratch) / "demo")
        seconds = _measure(model, _random_05b(Path(scratch) / "05b"), flags.repeats)
    report = {name: _summary(values) for name, values in seconds.items()}
    extra = [
        run - torch for run, torch in zip(seconds["first_token"], seconds["torch"], strict=True)
    ]
    report["first_token_after_torch"] = _summary(extra)
    report["limits_s"] = LIMITS
    report["machine"] = (
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}"
    )
    measured = {name: most for name, most in LIMITS.items() if name in report}
    missed = [name for name, most in measured.items() if report[name]["median_s"] >= most]
    for name, row in report.items():
        if isinstance(row, dict) and "median_s" in row:
            print(f"{name:<26}{row['median_s']:.3f} s  [{row['min_s']:.3f} .. {row['max_s']:.3f}]")
    print("limits missed: " + (", ".join(missed) or "none"))
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    flags.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 1 if missed else 0


def _measure(model: Path, half: Path | None, repeats: int) -> dict[str, list[float]]:
    endside = [sys.executable, "-m", "endside"]
    run = [*endside, "run", str(model), "def main", "--max-tokens", "1", "--executor", "torch"]
    commands = {
        "help": [*endside, "--help"],
        "torch": [sys.executable, "-c", "import torch"],
        "first_token": run,
    }
    if half is not None:
        options = [
            "--max-tokens",
            "1",
            "--executor",
            "native",
            "--quant",
            "int4",
            "--context",
            "4096",
            "--raw",
        ]
        commands["native_0.5b"] = [*endside, "run", str(half), PROMPT, *options]
    for command in commands.values():
        subprocess.run(command, check=True, capture_output=True)  # files into the page cache
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            begun = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - begun)
    return seconds


def _random_05b(folder: Path) -> Path | None:
    """A bfloat16 checkpoint of the 0.5B shape; None where there is no published tokenizer."""
    import torch

    from endside.formats import hf
    from endside.model.presets import preset
    from endside.model.transformer import Transformer

    data = Path(os.environ.get("ENDSIDE_TEST_DATA") or HERE.parent.parent / "shared" / "data")
    if not (data / "minicpm4-8b" / "tokenizer.json").exists():
        print("native_0.5b left out: no published tokenizer; set ENDSIDE_TEST_DATA")
        return None
    model = Transformer(preset("minicpm4-0.5b")).to(torch.bfloat16)
    model.init_weights(torch.Generator().manual_seed(0))
    hf.save(model, folder, tokenizer_files=data / "minicpm4-8b")
    return folder


def _random_demo(folder: Path) -> Path:
    import torch

    from endside.formats import hf
    from endside.model.presets import preset
    from endside.model.transformer import Transformer
    from endside.tokenizer import train_bpe

    model = Transformer(preset("demo"))
    model.init_weights(torch.Generator().manual_seed(0))
    text = [path.read_text(encoding="utf-8") for path in sorted(HERE.glob("*.py"))]
    tokenizer_folder = folder.parent / "tokenizer"
    train_bpe(iter(text), model.config.vocab_size).save(tokenizer_folder)
    hf.save(model, folder, tokenizer_files=tokenizer_folder)
    return folder


def _summary(values: list[float]) -> dict[str, float]:
    return {
        "median_s": round(statistics.median(values), 4),
        "min_s": round(min(values), 4),
        "max_s": round(max(values), 4),
    }


if __name__ == "__main__":
    sys.exit(main())
