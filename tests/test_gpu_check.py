"""`make gpu-check` starts where only torch, triton and numpy are installed."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Run in a fresh interpreter: everything outside the standard library, torch, triton, numpy and what
# torch itself needs is hidden, then the check and all it would run on a GPU are imported.
STRIPPED = """
import importlib.abc, sys
import numpy, torch, triton

needed_by_torch = {"sympy", "mpmath", "networkx", "jinja2", "markupsafe", "fsspec", "filelock",
                   "typing_extensions", "torchgen", "functorch"}
ours = {"torch", "triton", "numpy", "endside", "bench"}
allowed = sys.stdlib_module_names | needed_by_torch | ours

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in allowed:
            raise ImportError(f"{name} is hidden")

sys.meta_path.insert(0, Hidden())
try:
    import pydantic
except ImportError:
    pass
else:
    raise SystemExit("nothing was hidden")
from bench import attend_gpu, gpu_check, gpu_tests, train_gpu
import endside.ops.infllm.triton
assert len(gpu_tests.TESTS) >= 7, "tests are missing"
torch.cuda.is_available = lambda: False
raise SystemExit(gpu_check.main([]))
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed on this platform")
def test_runs_with_torch_triton_and_numpy_only() -> None:
    done = subprocess.run(
        [sys.executable, "-c", STRIPPED], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-1500:]
    assert "no CUDA device" in done.stdout
