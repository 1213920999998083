"""Makes `.venv` and installs endside into it: what `make demo` and `make test` do first.

    python3 runs/setup.py [GROUP]      GROUP: a dependency group of pyproject.toml (test, lint, dev)

Needs nothing but Python with its venv module. A C++ compiler is used where there is one. Every
step says what it does in a line; a step that is done already is skipped, because a stamp in `.venv`
records what it was made from.

torch comes first and alone, since it alone can be either 0.2 GB or 2.7 GB. pip is asked what it
would take (`--dry-run --report`); a CPU build is simply taken; a CUDA build on a machine without an
NVIDIA driver is taken too, but not silently. `TORCH_INDEX=URL` in the environment names the index
to take torch from.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
CONSTRAINTS = ROOT / "constraints.txt"
DECISION = "endside-torch.json"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# Sum of the wheels that torch 2.13.0 with CUDA 13 asks for on x86-64 Linux.
CUDA_DOWNLOAD = "about 2.7 GB to download, and more on disk"


class SetupError(Exception):
    """Installation cannot go on; the message says what to do."""


def say(line: str) -> None:
    """One line of progress, seen at once also through a pipe."""
    print(f"setup: {line}", flush=True)


def torch_build(report: dict, *, linux: bool) -> str:
    """Which build pip's installation report would bring: "cpu" or "cuda".

    The CUDA build is known by the NVIDIA packages it requires (on Linux only: markers say so).
    """
    for item in report["install"]:
        metadata = item["metadata"]
        if metadata["name"].lower() != "torch":
            continue
        required = [r for r in metadata.get("requires_dist", []) if "extra ==" not in r]
        cuda = any(re.match(r"(nvidia|cuda)[-_]", r, re.IGNORECASE) for r in required)
        return "cuda" if cuda and linux else "cpu"
    raise SetupError("pip's report does not mention torch: cannot tell which build it would take")


def decide(report: dict, *, driver: bool, linux: bool) -> tuple[str, str]:
    """The build pip would take, and a remark for the user ("" where it suits the machine)."""
    build = torch_build(report, linux=linux)
    if build == "cuda" and not driver:
        return build, (
            "no NVIDIA driver here, but the configured package indexes offer only torch's CUDA "
            f"build: {CUDA_DOWNLOAD}. For the CPU build (0.2 GB) stop and run "
            f"`make TORCH_INDEX={CPU_INDEX} ...`. Continuing"
        )
    if build == "cpu" and driver and linux:
        return build, (
            "an NVIDIA driver is here, but the configured package indexes offer torch's CPU build; "
            "for the GPU give `make TORCH_INDEX=https://download.pytorch.org/whl/cu130 ...`"
        )
    return build, ""


def has_nvidia_driver() -> bool:
    """Whether CUDA's driver library can be loaded."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Path("/proc/driver/nvidia/version").exists()
    return True


def run(command: list[str | Path], *, doing: str) -> None:
    """A command whose output the user sees; its failure ends the installation."""
    code = subprocess.run([str(part) for part in command], cwd=ROOT).returncode
    if code:
        raise SetupError(f"{doing} failed (exit code {code}); the reason stands above")


def pip_install(*arguments: str | Path, doing: str) -> None:
    """pip in the environment, its progress shown on a terminal only."""
    quiet = [] if sys.stdout.isatty() else ["-qq"]
    common = ["--disable-pip-version-check", *quiet]
    run([PYTHON, "-m", "pip", "install", *common, *arguments], doing=doing)


def check_python() -> None:
    """Refuses a Python that cannot work, before anything is written."""
    if not (3, 11) <= sys.version_info[:2] < (3, 15):
        found = ".".join(map(str, sys.version_info[:3]))
        raise SetupError(
            f"Python {found} is too old or too new: use 3.11 to 3.14 (make PYTHON=...)"
        )


def make_environment() -> None:
    """Creates `.venv`, unless it is there, its Python starts and its torch is of the right origin.

    A torch from another index leaves its NVIDIA packages behind, so that needs a fresh start.
    """
    if PYTHON.exists():
        works = subprocess.run([str(PYTHON), "-c", "import pip"], capture_output=True)
        if works.returncode == 0 and recorded().get("index", "") == torch_index():
            return
    say(f"creating {VENV.name} with Python {sys.version.split()[0]}")
    made = subprocess.run(
        [sys.executable, "-m", "venv", "--clear", str(VENV)], capture_output=True, text=True
    )
    if made.returncode:
        raise SetupError(
            f"this Python cannot make a virtual environment: {made.stdout.strip()} "
            f"{made.stderr.strip()} (Debian and Ubuntu: sudo apt install python3-venv)"
        )
    # Dependency groups need pip 25.1; Debian 12 brings 23.
    pip_install("--upgrade", "pip>=25.1", doing="upgrading pip")


def installed_torch() -> tuple[str, str] | None:
    """(version without the local part, build) of the torch in `.venv`, or None."""
    code = (
        "import importlib.metadata as m, json\n"
        "names = {d.name.lower(): d.version for d in m.distributions() if d.name}\n"
        "print(json.dumps(names))"
    )
    found = subprocess.run([str(PYTHON), "-c", code], capture_output=True, text=True, check=True)
    names = json.loads(found.stdout)
    if "torch" not in names:
        return None
    cuda = any(name.startswith(("nvidia-", "nvidia_")) for name in names)
    return names["torch"].split("+")[0], "cuda" if cuda else "cpu"


def pinned_torch() -> str:
    """The version in constraints.txt."""
    found = re.search(r"^torch==([\w.]+)$", CONSTRAINTS.read_text(encoding="utf-8"), re.MULTILINE)
    if not found:
        raise SetupError(f"{CONSTRAINTS.name} has no line torch==VERSION: restore it")
    return found.group(1)


def ask_pip(pin: str, index: list[str]) -> dict:
    """pip's report on what it would install for torch itself."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        run(
            [PYTHON, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--dry-run",
             "--no-deps", "--ignore-installed", "--report", report, *index, f"torch=={pin}"],
            doing=f"asking pip for torch {pin}",
        )  # fmt: skip
        return json.loads(report.read_text(encoding="utf-8"))


def recorded() -> dict:
    """What was decided about torch when this environment was made; empty when nothing was."""
    record = VENV / DECISION
    return json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}


def torch_index() -> str:
    """The index asked for now, else the one that this environment's torch came from."""
    return os.environ.get("TORCH_INDEX") or recorded().get("index", "")


def install_torch() -> None:
    """torch as pinned, the build this machine wants where the indexes offer it; records which."""
    pin, wanted, driver = pinned_torch(), torch_index(), has_nvidia_driver()
    present = installed_torch()
    if present and present[0] == pin:
        build = present[1]
    else:
        index = ["--index-url", wanted] if wanted else []
        build, remark = decide(ask_pip(pin, index), driver=driver, linux=sys.platform == "linux")
        if remark:
            say(remark)
        say(f"installing torch {pin} ({build} build)")
        pip_install("--no-deps", *index, f"torch=={pin}", doing=f"installing torch {pin}")
    decision = {"torch": pin, "build": build, "driver": driver, "index": wanted}
    (VENV / DECISION).write_text(json.dumps(decision) + "\n", encoding="utf-8")


def compiler() -> str:
    """Path of the C++ compiler CMake would find, or ""."""
    for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        if name and shutil.which(name):
            return str(shutil.which(name))
    return ""


def fingerprint() -> str:
    """Changes when the installed package would: what is declared, what is compiled, with what."""
    # Python 3.11 has it; an older one has been refused by now, with a message.
    import tomllib

    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    kept = {key: declared.get(key) for key in ("build-system", "project", "dependency-groups")}
    kept["scikit-build"] = declared.get("tool", {}).get("scikit-build")
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    for part in (str(ROOT), sys.version, compiler(), torch_index()):
        digest.update(part.encode() + b"\0")
    sources = sorted((ROOT / "endside" / "native" / "src").iterdir())
    for path in (ROOT / "CMakeLists.txt", CONSTRAINTS, *sources):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def is_done(stamp: Path, wanted: str) -> bool:
    """Whether this step was finished, from the same ingredients, in an environment still there."""
    return PYTHON.exists() and stamp.exists() and stamp.read_text(encoding="utf-8") == wanted


def install_package() -> None:
    """The environment, torch, then endside itself, editable: changes to its Python act at once."""
    make_environment()
    install_torch()
    how = "compiling its native core" if compiler() else "no C++ compiler: without its native core"
    say(f"installing endside and what it needs ({how})")
    # With the server and constrained decoding: small packages that most people will want.
    pip_install("-c", CONSTRAINTS, "-e", f"{ROOT}[serve]", doing="installing endside")
    show = "from endside import native; print('setup:', native.status())"
    run([PYTHON, "-c", show], doing="importing endside")


def install_group(group: str) -> None:
    """A dependency group of pyproject.toml, into an environment that holds endside already."""
    say(f"installing what `{group}` needs besides")
    groups = f"{ROOT / 'pyproject.toml'}:{group}"
    pip_install("-c", CONSTRAINTS, "--group", groups, doing=f"installing the {group} group")


def install(group: str) -> None:
    """The package and one dependency group ("": none); what is done already is skipped."""
    started = time.monotonic()
    wanted = fingerprint()
    steps = [("core", install_package)]
    if group:
        steps.append((group, lambda: install_group(group)))
    worked = False
    for name, step in steps:
        stamp = VENV / f"endside-{name}.stamp"
        if is_done(stamp, wanted):
            continue
        stamp.unlink(missing_ok=True)
        step()
        stamp.write_text(wanted, encoding="utf-8")
        worked = True
    if worked:
        say(f"ready in {time.monotonic() - started:.0f} s")


def main() -> int:
    """Installs; returns the exit code."""
    try:
        check_python()
        install(sys.argv[1] if len(sys.argv) > 1 else "")
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
