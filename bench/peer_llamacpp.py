"""llama.cpp on this machine: fetched, built for this processor, with models of random weights.

    python bench/peer_llamacpp.py [--peer-dir DIR] [--jobs N] [--models 0.5b-q4_0,8b-q4_0]

The source is what the package llama-cpp-python 0.3.36 carries on PyPI, taken with pip and built
with its own CMake files: Release, GGML_NATIVE (this processor's instructions), OpenMP; `peer_amx.h`
mends what GCC 12 makes of its tile instructions. Only the
library is built; `peer_bench.cc` here times llama_decode in it. Everything goes to a cache folder
outside the repository (10 to 25 minutes of one core the first time, nothing after that). Prints the
library's own account of the system, which says what it was built to use.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGE = "llama-cpp-python==0.3.36"
# Preset, and what the file is made with: `quantize` is llama.cpp's own, from f16.
MODELS = {
    "0.5b-q4_0": ("minicpm4-0.5b", "quantize"),
    "0.5b-tq2_0": ("minicpm4-0.5b", "quantize"),
    "8b-q4_0": ("minicpm4-8b", "blocks"),
}
OPTIONS = (
    "CMAKE_BUILD_TYPE=Release", "GGML_NATIVE=ON", "GGML_OPENMP=ON", "BUILD_SHARED_LIBS=ON",
    "LLAMA_CURL=OFF", "LLAMA_BUILD_TESTS=OFF", "LLAMA_BUILD_EXAMPLES=OFF",
    "LLAMA_BUILD_SERVER=OFF", "LLAMA_BUILD_TOOLS=OFF",
)  # fmt: skip


def default_folder() -> Path:
    """Where the peer lives when nobody says otherwise."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "endside" / "peer-llamacpp"


def driver(folder: Path, jobs: int = 1) -> Path:
    """The timing program, built where it is not there yet or older than its source."""
    folder.mkdir(parents=True, exist_ok=True)
    source, library = _source(folder), folder / "build" / "bin"
    if not list(library.glob("libllama.*")):
        _say("building llama.cpp: 10 to 25 minutes of one core")
        fix = f"-DCMAKE_CXX_FLAGS=-include '{HERE / 'peer_amx.h'}'"
        options = [*(f"-D{option}" for option in OPTIONS), fix]
        _run(["cmake", "-S", source, "-B", folder / "build", *options])
        _run(["cmake", "--build", folder / "build", "--target", "llama", "-j", str(jobs)])
    program, code = folder / "peer_bench", HERE / "peer_bench.cc"
    if not program.exists() or program.stat().st_mtime < code.stat().st_mtime:
        include = [f"-I{source / 'include'}", f"-I{source / 'ggml' / 'include'}"]
        link = [f"-L{library}", "-lllama", "-lggml", "-lggml-base", f"-Wl,-rpath,{library}"]
        _run(["g++", "-O2", "-std=c++17", *include, code, "-o", program, *link])
    return program


def server(folder: Path, jobs: int = 1) -> Path:
    """llama-server, built where it is not there yet, with the options of the library."""
    driver(folder, jobs)
    program = folder / "build" / "bin" / "llama-server"
    if not program.exists():
        _say("building llama-server: 10 to 20 minutes of one core")
        more = [f"-DLLAMA_BUILD_{one}=ON" for one in ("COMMON", "TOOLS", "SERVER")]
        _run(["cmake", "-S", _source(folder), "-B", folder / "build", *more])
        build = ["cmake", "--build", folder / "build", "--target", "llama-server"]
        _run([*build, "-j", str(jobs)])
    return program


def limits(folder: Path) -> Path:
    """The program that measures bandwidth and peaks, built for this processor."""
    folder.mkdir(parents=True, exist_ok=True)
    program, code = folder / "limits", HERE / "limits.cc"
    if not program.exists() or program.stat().st_mtime < code.stat().st_mtime:
        flags = ["-O3", "-march=native", "-std=c++17", "-pthread"]
        _run(["g++", *flags, code, "-o", program])
    return program


def model(folder: Path, name: str) -> Path:
    """The GGUF file of that name, written where it is not there yet."""
    preset, way = MODELS[name]
    path = folder / f"{name}.gguf"
    if path.exists():
        return path
    _say(f"writing {path.name}")
    unfinished = folder / f"{name}.part"
    maker = [sys.executable, HERE / "peer_gguf.py"]
    if way == "blocks":
        _run([*maker, unfinished, "--preset", preset, "--kind", "Q4_0"])
    else:
        _run(
            [driver(folder), "quantize", plain(folder, preset), unfinished, name.rsplit("-", 1)[1]]
        )
    unfinished.rename(path)
    return path


def plain(folder: Path, preset: str) -> Path:
    """The f16 file that llama.cpp's quantizer takes."""
    path = folder / f"{preset}-f16.gguf"
    if not path.exists():
        part = path.with_suffix(".part")
        _run([sys.executable, HERE / "peer_gguf.py", part, "--preset", preset, "--kind", "F16"])
        part.rename(path)
    return path


def system(folder: Path, threads: int) -> str:
    """What llama.cpp says it uses here."""
    serve = [driver(folder), "serve", model(folder, "0.5b-q4_0"), str(threads)]
    done = subprocess.run(serve, input="quit\n", capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[0])["system"]


def _source(folder: Path) -> Path:
    """The folder of llama.cpp inside the unpacked package."""
    found = list(folder.glob("llama_cpp_python-*/vendor/llama.cpp"))
    if found:
        return found[0]
    if not list(folder.glob("llama_cpp_python-*.tar.gz")):
        _say(f"fetching the source of {PACKAGE}")
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
        # pip asks even a source that is only unpacked for its metadata: in an environment apart.
        _run([*pip, "--dest", folder, PACKAGE])
    archive = next(folder.glob("llama_cpp_python-*.tar.gz"))
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    return next(folder.glob("llama_cpp_python-*/vendor/llama.cpp"))


def _run(command: list[str | Path]) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-30:])
        raise SystemExit(f"{Path(command[0]).name} failed with {done.returncode}:\n{tail}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Build, write the models, print what the peer says about itself."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-dir", type=Path, default=default_folder())
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--models", default=",".join(MODELS))
    flags = parser.parse_args()
    names = flags.models.split(",")
    unknown = sorted(set(names) - set(MODELS))
    if unknown:
        parser.error(f"no model is called {', '.join(unknown)}: use {', '.join(MODELS)}")
    driver(flags.peer_dir, flags.jobs)
    limits(flags.peer_dir)
    for name in names:
        path = model(flags.peer_dir, name)
        print(f"{path}: {path.stat().st_size / 1e6:,.1f} MB")
    print(system(flags.peer_dir, 1))


if __name__ == "__main__":
    main()
