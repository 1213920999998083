"""The core itself: it is built where it can be, says so where it is not, and needs no Python."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from endside import native
from endside.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


@pytest.mark.skipif(not COMPILER, reason="no C++ compiler here")
def test_built_where_there_is_a_compiler() -> None:
    assert native.load() is not None, native.status()
    assert native.available_isas()[0] == "portable"


def test_absence_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    reason = "not built: no working C++ compiler at installation"
    monkeypatch.setattr(native, "_import_core", lambda: (None, reason))
    native.load.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert native.load() is None
            assert native.load() is None
        assert [record.getMessage() for record in caplog.records] == [
            f"native core: {reason}; continuing on PyTorch"
        ]
        assert native.status() == f"native core: {reason}"
        assert native.available_isas() == []
        with pytest.raises(UserError, match="install a C\\+\\+ compiler"):
            native.rmsnorm(None, None, 1e-5)  # type: ignore[arg-type]
    finally:
        native.load.cache_clear()


@pytest.mark.skipif(not COMPILER, reason="no C++ compiler here")
def test_core_without_python(tmp_path: Path) -> None:
    """The same library inside a C++ program: CMake alone builds both. Unoptimised, for time's sake;
    `make native-test` builds what is installed."""
    cmake = shutil.which("cmake")
    if not cmake:
        pytest.skip("no cmake here")
    run([cmake, "-S", ROOT, "-B", tmp_path, "-DCMAKE_BUILD_TYPE=Debug"])
    run([cmake, "--build", tmp_path, "-j", os.cpu_count() or 1])
    done = run([tmp_path / "core_test", "isa", "pool", "rmsnorm", "linear_extremes"])
    for isa in native.available_isas():
        assert f"rmsnorm {isa}: ok" in done
        assert f"linear_extremes {isa}: ok" in done


def run(command: list[object]) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "needs"),
    [
        ("native-test", ["cmake", "c++"]),
        ("native-sanitize", ["cmake", "c++"]),
        ("native-arm", ["cmake", "aarch64-linux-gnu-g++", "qemu-aarch64-static"]),
        ("native-avx512", ["cmake", "c++"]),
    ],
)
def test_every_native_target(target: str, needs: list[str]) -> None:
    absent = [need for need in needs if not shutil.which(need)]
    if target == "native-avx512" and not Path("/usr/include/simde").is_dir():
        absent.append("the SIMDe headers")
    if absent:
        pytest.skip(f"{', '.join(absent)} not here")
    assert ", 0 wrong" in run(["make", "-C", ROOT, target])
