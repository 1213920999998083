"""Does an 8B model quantize within 16 GB? Two full-width layers are measured, the rest is derived.

    python bench/quantize_8b.py                            two layers, P-GPTQ, short text
    python bench/quantize_8b.py --samples 128 --length 512

A folder of MiniCPM4-8B's shape with random bfloat16 weights and `--layers` of its 32 layers is
written, then `endside quantize` runs on it in a process of its own, whose peak of resident memory
the kernel reports (it counts mapped files that were touched, too). Time per layer is the time from
one finished layer to the next; processor time is given beside it, which neighbours on the machine
do not change much. What is derived: the other layers take as long as the last one that was
measured; the peak does not depend on the depth, because a layer is released before the next one is
read.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from endside.formats import hf
from endside.model.presets import preset
from endside.model.transformer import Transformer

RESULTS = Path(__file__).resolve().parent / "results"
LIMIT = 16e9  # bytes
CHILD = """
import json, sys, torch
from pathlib import Path
from endside.formats import hf
from endside.formats.hf_config import config_to_hf
from endside.log import Progress
from endside.quant.pack import Scheme
from endside.quant.quantize import Recipe, Target, Texts, quantize
source, out, method, smooth, samples, length = json.loads(sys.argv[1])
model = hf.load(source)
draw = torch.Generator().manual_seed(0)
tokens = torch.randint(model.config.vocab_size, (samples, length), generator=draw)
recipe = Recipe(Scheme("int4", 128), method, smooth=smooth)
target = Target(Path(out), config_to_hf, {}, "random")
print(quantize(model, recipe, Texts(tokens), target, Progress()))
"""


def write_model(folder: Path, layers: int) -> int:
    """A folder of the 8B shape with random weights; its bytes."""
    config = replace(preset("minicpm4-8b"), num_hidden_layers=layers)
    with torch.device("meta"):
        shape = Transformer(config)
    draw = torch.Generator().manual_seed(0)
    state = {
        name: torch.ones(p.shape, dtype=torch.bfloat16)
        if p.dim() == 1
        else (torch.randn(p.shape, generator=draw) * 0.025).bfloat16()
        for name, p in shape.named_parameters()
    }
    shape.load_state_dict(state, assign=True)
    hf.save(shape, folder)
    return sum(file.stat().st_size for file in folder.iterdir())


def main() -> None:
    """Write, quantize, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--method", choices=("rtn", "gptq", "pgptq"), default="pgptq")
    parser.add_argument("--smooth", action="store_true")
    parser.add_argument("--samples", type=int, default=16, help="rows of text")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--work", type=Path, help="where 6 GB find room; default: temporary")
    parser.add_argument("--out", type=Path, default=RESULTS / "quantize_8b.json")
    flags = parser.parse_args()
    if flags.work is not None:
        flags.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=flags.work) as work:
        source, out = Path(work) / "source", Path(work) / "out"
        size = write_model(source, flags.layers)
        given = [str(source), str(out), flags.method, flags.smooth, flags.samples, flags.length]
        begun = time.monotonic()
        child = subprocess.Popen([sys.executable, "-c", CHILD, json.dumps(given)])
        moments = watch(child, out.with_name(".out.quantizing"), flags.layers)
        if child.returncode:
            raise SystemExit(f"the child ended with {child.returncode}")
        seconds = time.monotonic() - begun
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak, busy = usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime
    each = moments[-1] - moments[-2] if len(moments) > 1 else moments[-1]
    total = preset("minicpm4-8b").num_hidden_layers
    result = {
        "measured": {
            "layers": flags.layers, "source_bytes": size, "peak_rss_bytes": peak,
            "seconds": round(seconds, 1), "seconds_of_last_layer": round(each, 1),
            "processor_seconds": round(busy, 1),
        },
        "derived": {
            "layers": total, "fits_16_gb": peak < LIMIT,
            "hours": round((seconds + each * (total - flags.layers)) / 3600, 2),
            "processor_hours": round(busy / flags.layers * total / 3600, 2),
        },
        "method": flags.method, "smooth": flags.smooth, "tokens": [flags.samples, flags.length],
        "threads": torch.get_num_threads(), "processors": os.cpu_count(),
        "machine": platform.machine(),
    }  # fmt: skip
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    flags.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


def watch(child: subprocess.Popen, place: Path, layers: int) -> list[float]:
    """Seconds from the start at which each layer was finished."""
    begun, moments = time.monotonic(), []
    while child.poll() is None:
        if len(moments) < layers and (place / f"layer_{len(moments):05d}.json").exists():
            moments.append(time.monotonic() - begun)
        time.sleep(0.05)
    return moments


if __name__ == "__main__":
    main()
