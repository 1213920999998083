"""`make gpu-check`: every GPU test, then the benchmarks, within ten minutes.

Prints a table and writes JSON. Runs from the source tree with the machine's own Python: nothing is
imported beyond torch, triton and numpy. Without a CUDA device it says so and exits 0. Exits 1 when
a test fails; the benchmarks of kernels that are wrong are not run.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def device_facts() -> dict[str, Any]:
    """What ran: device, driver, versions, commit."""
    import torch
    import triton

    properties = torch.cuda.get_device_properties(0)
    found = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "capability": list(torch.cuda.get_device_capability(0)),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": found.stdout.strip() or None,
        "date": time.strftime("%Y-%m-%d"),
    }


def run_tests(deadline: float) -> list[dict[str, Any]]:
    """Run the tests in order, each reported as it ends."""
    import torch
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources

    from bench import gpu_tests
    from endside.errors import UserError

    failures = (
        AssertionError,
        RuntimeError,
        ValueError,
        UserError,
        CompilationError,
        OutOfResources,
    )
    results = []
    for test in gpu_tests.TESTS:
        if time.monotonic() > deadline:
            results.append({"test": test.__name__, "outcome": "skipped: the time is up"})
            print(f"{'skipped':8} {test.__name__}")
            continue
        start = time.monotonic()
        try:
            detail, outcome = test(), "passed"
            torch.cuda.synchronize()
        except failures as error:
            detail, outcome = f"{type(error).__name__}: {error}"[:600], "failed"
        seconds = time.monotonic() - start
        print(f"{outcome:8} {test.__name__}  {seconds:.1f} s  {detail}", flush=True)
        results.append(
            {"test": test.__name__, "outcome": outcome, "seconds": seconds, "detail": detail}
        )
        torch.cuda.empty_cache()
    return results


def main(arguments: list[str] | None = None) -> int:
    """Check, measure, report; the exit code says whether every test passed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=570, help="time for tests and benchmarks")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--tests-only", action="store_true", help="leave the benchmarks out")
    options = parser.parse_args(arguments)
    import torch

    if not torch.cuda.is_available():
        print("gpu-check: no CUDA device here, nothing was checked")
        return 0
    start = time.monotonic()
    deadline = start + options.seconds
    facts = device_facts()
    print(f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}")
    tests = run_tests(deadline)
    failed = any(test["outcome"] == "failed" for test in tests)
    report: dict[str, Any] = {**facts, "tests": tests}
    if failed:
        print("benchmarks: not run, a test failed")
    elif not options.tests_only:
        from bench import attend_gpu, train_gpu

        report["attend"] = attend_gpu.measure(deadline)
        report["train"] = train_gpu.measure(deadline)
    report["seconds"] = time.monotonic() - start
    options.out.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "_", facts["device"].lower()).strip("_")
    path = options.out / f"gpu_{name}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")
    return int(failed)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
