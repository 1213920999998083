"""Installation: which torch is taken, what it says, and that nothing is done twice."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("endside_setup", ROOT / "runs" / "setup.py")
    assert spec and spec.loader, "runs/setup.py cannot be found"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def report(*requires: str, name: str = "torch") -> dict:
    """What `pip install --dry-run --report` writes, cut to the parts that are read."""
    metadata = {"name": name, "version": "2.13.0", "requires_dist": list(requires)}
    return {"version": "1", "install": [{"requested": True, "metadata": metadata}]}


PLAIN = ("filelock", "sympy>=1.13.3", 'optree>=0.13.0; extra == "optree"')
CPU = report(*PLAIN)
# As published for x86-64 Linux.
CUDA = report(
    *PLAIN,
    'cuda-toolkit[cublas,cudart]==13.0.3; platform_system == "Linux"',
    'nvidia-cudnn-cu13==9.20.0.48; platform_system == "Linux"',
    'triton==3.7.1; platform_system == "Linux" and python_version < "3.15"',
)


def test_cpu_build_without_driver_is_taken_silently(setup: ModuleType) -> None:
    assert setup.decide(CPU, driver=False, linux=True) == ("cpu", "")


def test_cuda_build_with_driver_is_taken_silently(setup: ModuleType) -> None:
    assert setup.decide(CUDA, driver=True, linux=True) == ("cuda", "")


def test_cuda_build_without_driver_says_size_and_way_out(setup: ModuleType) -> None:
    build, remark = setup.decide(CUDA, driver=False, linux=True)
    assert build == "cuda"
    assert "2.7 GB" in remark
    assert "TORCH_INDEX=https://download.pytorch.org/whl/cpu" in remark


def test_cpu_build_with_driver_names_the_gpu_index(setup: ModuleType) -> None:
    build, remark = setup.decide(CPU, driver=True, linux=True)
    assert build == "cpu"
    assert "TORCH_INDEX=https://download.pytorch.org/whl/cu" in remark


def test_linux_only_requirements_do_not_count_elsewhere(setup: ModuleType) -> None:
    assert setup.decide(CUDA, driver=False, linux=False) == ("cpu", "")


def test_an_extra_that_mentions_cuda_does_not_count(setup: ModuleType) -> None:
    only_extra = report(*PLAIN, 'nvidia-cudnn-cu13; extra == "gpu"')
    assert setup.torch_build(only_extra, linux=True) == "cpu"


def test_report_without_torch_is_refused(setup: ModuleType) -> None:
    with pytest.raises(setup.SetupError, match="does not mention torch"):
        setup.torch_build(report(name="numpy"), linux=True)


def test_no_nvidia_package_where_the_cpu_build_was_chosen(setup: ModuleType) -> None:
    record = Path(sys.prefix) / setup.DECISION
    if not record.exists():
        pytest.skip("this environment was not made by runs/setup.py")
    decision = json.loads(record.read_text(encoding="utf-8"))
    if setup.has_nvidia_driver() or decision["build"] != "cpu":
        pytest.skip(f"torch's {decision['build']} build was chosen here")
    names = {dist.metadata["Name"].lower() for dist in importlib.metadata.distributions()}
    assert not [name for name in names if name.startswith(("nvidia-", "nvidia_", "cuda-"))]
    assert importlib.metadata.version("torch").split("+")[0] == setup.pinned_torch()


def test_constraints_pin_torch_and_its_triton(setup: ModuleType) -> None:
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    names = [line.split("==")[0] for line in pins if line and not line.startswith("#")]
    assert names == ["torch", "triton"]


def test_fingerprint_follows_every_ingredient(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pyproject.toml", "CMakeLists.txt", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "endside" / "native" / "src", tmp_path / "endside" / "native" / "src")
    monkeypatch.setattr(setup, "ROOT", tmp_path)
    monkeypatch.setattr(setup, "CONSTRAINTS", tmp_path / "constraints.txt")
    monkeypatch.delenv("TORCH_INDEX", raising=False)
    seen = [setup.fingerprint()]
    assert setup.fingerprint() == seen[0]
    declared = tmp_path / "pyproject.toml"
    text = declared.read_text(encoding="utf-8")
    declared.write_text(text.replace("line-length = 100", "line-length = 99"), encoding="utf-8")
    assert setup.fingerprint() == seen[0], "a linter's setting is no reason to install again"
    declared.write_text(text.replace('"numpy>=2.2"', '"numpy>=2.3"'), encoding="utf-8")
    seen.append(setup.fingerprint())
    for path in sorted([*tmp_path.glob("*.txt"), *(tmp_path / "endside").rglob("*.*")]):
        path.write_bytes(path.read_bytes() + b"\n")
        seen.append(setup.fingerprint())
    monkeypatch.setenv("TORCH_INDEX", "https://example.org/whl")
    seen.append(setup.fingerprint())
    monkeypatch.setattr(setup, "compiler", lambda: "another")
    seen.append(setup.fingerprint())
    assert len(set(seen)) == len(seen) > 8


def test_done_steps_are_skipped(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    python = tmp_path / "python"
    python.touch()
    monkeypatch.setattr(setup, "VENV", tmp_path)
    monkeypatch.setattr(setup, "PYTHON", python)
    monkeypatch.setattr(setup, "install_package", lambda: done.append("core"))
    monkeypatch.setattr(setup, "install_group", done.append)
    setup.install("test")
    setup.install("test")
    setup.install("")
    assert done == ["core", "test"]
    monkeypatch.setattr(setup, "fingerprint", lambda: "changed")
    setup.install("")
    assert done == ["core", "test", "core"]


def test_a_failed_step_is_tried_again(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise setup.SetupError("no network")

    monkeypatch.setattr(setup, "VENV", tmp_path)
    monkeypatch.setattr(setup, "PYTHON", tmp_path / "python")
    monkeypatch.setattr(setup, "install_package", fail)
    (tmp_path / "python").touch()
    for _ in range(2):
        with pytest.raises(setup.SetupError):
            setup.install("")


def test_torch_index_is_remembered(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "VENV", tmp_path)
    monkeypatch.setenv("TORCH_INDEX", "")
    assert setup.torch_index() == ""
    (tmp_path / setup.DECISION).write_text('{"index": "https://example.org/cpu"}')
    assert setup.torch_index() == "https://example.org/cpu"
    monkeypatch.setenv("TORCH_INDEX", "https://example.org/other")
    assert setup.torch_index() == "https://example.org/other"


def test_another_torch_index_starts_a_fresh_environment(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "VENV", tmp_path / "venv")
    monkeypatch.setattr(setup, "PYTHON", tmp_path / "venv" / "bin" / "python")
    monkeypatch.setattr(setup, "pip_install", lambda *arguments, doing: None)
    monkeypatch.delenv("TORCH_INDEX", raising=False)
    setup.make_environment()
    left_over = tmp_path / "venv" / "left-over"
    left_over.touch()
    record = tmp_path / "venv" / setup.DECISION
    record.write_text('{"index": "https://example.org/cpu"}')
    setup.make_environment()
    assert left_over.exists(), "nothing changed: the environment stays"
    monkeypatch.setenv("TORCH_INDEX", "https://example.org/other")
    setup.make_environment()
    assert setup.PYTHON.exists() and not left_over.exists()


def test_old_python_is_refused(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 4, "final", 0))
    with pytest.raises(setup.SetupError, match=r"Python 3\.10\.4 is too old"):
        setup.check_python()


def test_readme_commands_are_those_of_make_and_ci() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make demo" in readme and "make test" in readme
    ci = ROOT / ".ci" / "run"
    assert os.access(ci, os.X_OK) and "make test" in ci.read_text(encoding="utf-8")
    for target in ("demo", "test", "slow", "bench", "lint", "gpu-check", "size"):
        shown = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert shown.returncode == 0, f"make {target}: {shown.stderr}"


@pytest.mark.slow
def test_installs_without_a_compiler(tmp_path: Path) -> None:
    """No compiler, no cmake on the PATH: the package arrives, and says what is missing."""
    source = tmp_path / "source"
    skipped = shutil.ignore_patterns(".venv", ".git", "build", "__pycache__", "*.so")
    shutil.copytree(ROOT, source, ignore=skipped)
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("sh", "env", "uname"):
        (tools / tool).symlink_to(str(shutil.which(tool)))
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    environment = {**os.environ, "PATH": str(tools), "CXX": "/bin/false"}
    pip = [str(python), "-m", "pip", "install", "-q"]
    subprocess.run([*pip, "numpy"], check=True)
    subprocess.run([*pip, "--no-deps", "-e", str(source)], check=True, env=environment)
    ask = "from endside import native; print(native.status()); assert native.load() is None"
    told = subprocess.run([python, "-c", ask], cwd=tmp_path, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert "no working C++ compiler" in told.stdout
    assert told.stderr.count("continuing on PyTorch") == 1
