"""The most operations a device does in a second: what MFU divides by.

A GPU is looked up: the dense matrix peak its maker states for 16-bit inputs (float32 training runs
in TF32 or slower, and is divided by the same number, so its MFU is a lower bound). A CPU is asked:
the fastest of several square products, once per processor, thread count and type, then kept in the
user's cache. The products are timed by the processor time they took, so that other programs do not
make the machine look slower than it is; a day later it is asked again and the faster answer stays.
"""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path

import torch

from endside.atomic import write_atomic
from endside.checkpoint import cache_root
from endside.ops.linear import tiles
from endside.ops.passes import has_tiles

# Tera-operations per second, dense, 16-bit inputs with float32 sums: the makers' data sheets.
GPUS = {
    "B200": 2250.0, "H200": 989.0, "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0,
    "A100": 312.0, "A800": 312.0, "A10G": 70.0, "A10": 125.0, "A40": 149.7, "A30": 165.0,
    "L40S": 362.0, "L40": 181.0, "L4": 121.0, "T4": 65.0, "V100": 125.0,
    "RTX 6000 Ada": 364.2, "RTX A6000": 154.8, "RTX 5090": 209.5, "RTX 4090": 165.2,
    "RTX 4080": 97.5, "RTX 3090": 71.0, "RTX 3080": 59.5, "Orin": 42.5,
}  # fmt: skip
SIZE, REPEATS = 1024, 8  # rows and columns of a product; products
DAY = 86400.0  # seconds


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Operations per second; None for a device nobody has looked up."""
    if device.type == "cpu":
        return _cpu(precision)
    return gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def gpu(name: str) -> float | None:
    """The table's entry for a device name; the first that occurs in it."""
    return next((peak * 1e12 for known, peak in GPUS.items() if known in name), None)


def _cpu(precision: str) -> float:
    """Measured, or what was measured here within a day. fp8 is emulated there in float32."""
    precision = "float32" if precision == "fp8" else precision
    place = cache_root() / "peaks.json"
    in_tiles = precision == "float32" and has_tiles()
    how = "float32 in tiles" if in_tiles else precision
    key = f"{_processor()}, {torch.get_num_threads()} threads, {how}"
    known = _read(place)
    peak, when = known.get(key, (0.0, 0.0))
    if time.time() - when > DAY:
        peak = max(peak, measure(getattr(torch, precision)))
        known[key] = (peak, time.time())
        _keep(place, known)
    return peak


def measure(dtype: torch.dtype, size: int = SIZE) -> float:
    """Operations per second of the fastest of several square products, as training makes them."""
    multiply = tiles.multiply if dtype == torch.float32 and has_tiles() else torch.mm
    left = torch.full((size, size), 0.5, dtype=dtype)
    right = torch.full((size, size), 0.25, dtype=dtype)
    best, threads = float("inf"), torch.get_num_threads()
    for _ in range(REPEATS):
        begun = time.process_time()
        multiply(left, right)
        best = min(best, (time.process_time() - begun) / threads)
    return 2 * size**3 / best


def _processor() -> str:
    """The processor's name, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _read(place: Path) -> dict[str, tuple[float, float]]:
    """What was measured before; nothing where the file is missing or no longer whole."""
    try:
        found = json.loads(place.read_text())
        return {str(key): (float(peak), float(when)) for key, (peak, when) in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _keep(place: Path, known: dict[str, tuple[float, float]]) -> None:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(place, json.dumps(known, indent=1) + "\n")
    except OSError:
        return  # a machine whose cache cannot be written measures at every start
