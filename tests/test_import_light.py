"""What an import costs: nothing heavy on the way to the first line of help, and no third party's
package in the way of the model on a machine that has torch, triton and numpy alone."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from endside import native
from endside.formats import hf
from endside.model.presets import preset
from endside.model.transformer import Transformer
from endside.tokenizer import train_bpe

ROOT = Path(__file__).resolve().parent.parent

LIGHT = [
    "endside",
    "endside.cli",
    "endside.config",
    "endside.log",
    "endside.tokenizer",
    "endside.chat",
    "endside.checkpoint",
    "endside.native",
    "endside.engine.engine",
    "endside.api",
]
HEAVY = [
    "torch",
    "triton",
    "transformers",
    "matplotlib",
    "pydantic",
    "huggingface_hub",
    "llguidance",
]

LIST_HEAVY = """
import importlib, sys
importlib.import_module(sys.argv[1])
print(*[name for name in sys.argv[2:] if name in sys.modules])
"""

# Only the standard library, the three packages and what these themselves require may be found.
BLOCKED = """
import importlib, importlib.util, pkgutil, sys
import numpy, torch
if sys.platform == "linux":
    import triton
OWN = {"endside", "numpy", "torch", "triton", "sympy", "mpmath", "networkx", "jinja2", "markupsafe",
       "filelock", "fsspec", "typing_extensions", "setuptools", "_distutils_hack"}

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in OWN | set(sys.stdlib_module_names) | {"gpu_check"}:
            return None
        raise ModuleNotFoundError(f"No module named {name!r} (blocked by the test)", name=name)

sys.meta_path.insert(0, Blocker())
"""

WALK = """
count = 0
for room in ("endside.model", "endside.ops"):
    package = importlib.import_module(room)
    for found in pkgutil.walk_packages(package.__path__, room + "."):
        importlib.import_module(found.name)
        count += 1
print(count)
"""

LOAD_SCRIPT = """
spec = importlib.util.spec_from_file_location("gpu_check", sys.argv[1])
script = importlib.util.module_from_spec(spec)
sys.modules["gpu_check"] = script
spec.loader.exec_module(script)
print(script.__name__)
"""


def python(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{' '.join(arguments)}\n{done.stderr}"
    return done.stdout.strip()


@pytest.mark.parametrize("module", LIGHT)
def test_import_brings_nothing_heavy(module: str) -> None:
    heavy = python(LIST_HEAVY, module, *HEAVY)
    assert heavy == "", f"import {module} brings {heavy}"


RUN = """
import sys
from endside.cli import main
try:
    main(["run", sys.argv[1], "the fox", "--max-tokens", "3", "--executor", "native", "--json"])
finally:
    print("heavy", *[name for name in sys.argv[2:] if name in sys.modules])
"""


@pytest.mark.skipif(not native.available_isas(), reason="no native core here")
@pytest.mark.parametrize("chats", [False, True])
def test_run_with_the_native_executor_brings_no_torch(chats: bool, tmp_path: Path) -> None:
    """Packing, then mapping; a prompt as it is, or rendered with a chat template."""
    config = replace(preset("tiny"), vocab_size=300)
    tokenizer = train_bpe(["the quick brown fox jumps over the lazy dog. " * 40], 300)
    if chats:
        tokenizer = tokenizer.with_chat_template("{{ messages[0]['content'] }}")
    tokenizer.save(tmp_path / "text")
    model = Transformer(config)
    model.init_weights(torch.Generator().manual_seed(1))
    place = hf.save(model, tmp_path / "model", tokenizer_files=tmp_path / "text")
    for _ in range(2):
        answer, heavy = python(RUN, str(place), *HEAVY).splitlines()
        assert json.loads(answer)["executor"] == "native"
        assert heavy == "heavy", f"run brings {heavy}"


def test_heavy_is_noticed() -> None:
    assert python(LIST_HEAVY, "matplotlib.figure", *HEAVY) == "matplotlib"


def test_model_and_ops_need_only_torch_triton_numpy() -> None:
    assert int(python(BLOCKED + WALK)) > 20, "the walk found too few modules to mean anything"


def test_gpu_check_needs_only_torch_triton_numpy() -> None:
    assert python(BLOCKED + LOAD_SCRIPT, str(ROOT / "bench" / "gpu_check.py")) == "gpu_check"


def test_blocker_blocks() -> None:
    with pytest.raises(AssertionError, match="blocked by the test"):
        python(BLOCKED + "import tokenizers")
