"""What does each container cost? The same model in every format that is written, read back.

    python reproduce/containers.py                  train, convert, measure: results/containers.*
    python reproduce/containers.py --steps 100      a less trained model

A small model of bytes is trained and stored in float16, its widths multiples of 256 so that every
block type fits. From it each container is written by `convert`; what is read back is compared:

    error    rms(weights read - weights) / rms(weights), linears and embedding apart
    KL       mean over held-out bytes of the divergence between the two models' next-byte
             distributions, nats; both models run in float32, so nothing but the weights differs

int4 and int8 are rounded to the nearest code, without calibration: this compares containers, not
ways to round (`pgptq.py` does that). Then come containers that must cost nothing: codes moved from
one low-bit container to another, and a model whose linears are ternary already (every row of them
rounded to -s, 0, s: a model that is good for nothing but this question). Refusals are part of the
answer and are listed with their reason.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from endside.data.loader import Windows
from endside.data.source import DataConfig, open_data
from endside.errors import UserError
from endside.formats import hf
from endside.formats.convert import Layout, convert
from endside.formats.source import open_source, state_dict
from endside.log import Progress
from endside.model.batch import Batch
from endside.model.presets import preset
from endside.model.transformer import Transformer
from endside.train import pretrain
from endside.train.pretrain import PretrainConfig
from endside.train.run_folder import RunFolder
from endside.train.schedule import ScheduleConfig

RESULTS = Path(__file__).resolve().parent / "results"
LENGTH = 256  # bytes of a row
SHAPE = replace(
    preset("demo"), vocab_size=257, num_hidden_layers=2, intermediate_size=768,
    tie_word_embeddings=False, max_position_embeddings=LENGTH,
)  # fmt: skip


@dataclass(frozen=True)
class Form:
    """One way to write a model, made from the original called `source` or from an earlier form."""

    name: str
    source: str
    to: Layout
    type: str = "auto"
    group: int | None = None


PLAIN, TERNARY = "trained, float16", "ternary, float16"
FORMS = (
    Form("hf", PLAIN, "hf"),
    Form("GGUF F16", PLAIN, "gguf", "f16"),
    Form("GGUF BF16", PLAIN, "gguf", "bf16"),
    Form("GGUF Q8_0", PLAIN, "gguf", "q8_0"),
    Form("GPTQ int8, 128", PLAIN, "gptq", "int8", 128),
    Form("endside int8, 128", PLAIN, "endside", "int8", 128),
    Form("endside int8, 32", PLAIN, "endside", "int8", 32),
    Form("GGUF Q4_0", PLAIN, "gguf", "q4_0"),
    Form("GPTQ int4, 128", PLAIN, "gptq", "int4", 128),
    Form("GPTQ int4, 32", PLAIN, "gptq", "int4", 32),
    Form("endside int4, 128", PLAIN, "endside", "int4", 128),
    Form("endside int4, 32", PLAIN, "endside", "int4", 32),
    Form("GGUF TQ2_0", PLAIN, "gguf", "tq2_0"),
    Form("GPTQ int4, 128", "endside int4, 128", "gptq"),
    Form("endside int4, 128", "GPTQ int4, 128", "endside"),
    Form("GGUF Q4_0", "endside int4, 32", "gguf"),
    Form("GGUF Q8_0", "endside int8, 32", "gguf"),
    Form("endside int4, 32", "GGUF Q4_0", "endside"),
    Form("endside int8, 32", "GGUF Q8_0", "endside"),
    Form("GGUF", "endside int4, 128", "gguf"),
    Form("ternary endside", TERNARY, "endside", "ternary"),
    Form("ternary GGUF TQ1_0", TERNARY, "gguf", "tq1_0"),
    Form("ternary GGUF TQ2_0", TERNARY, "gguf", "tq2_0"),
    Form("ternary GGUF Q2_0", TERNARY, "gguf", "q2_0"),
    Form("ternary GPTQ", "ternary endside", "gptq"),
    Form("ternary GGUF", "ternary GPTQ", "gguf"),
    Form("ternary hf", "ternary endside", "hf"),
)


@dataclass(frozen=True)
class Row:
    """One container. `refused`: why it was not written."""

    name: str
    source: str  # what it was made from and is compared with
    bits: float = 0.0  # of the whole container, for each weight of the model
    linears: float = 0.0  # relative rms errors
    embedding: float = 0.0
    apart: float = 0.0
    refused: str = ""


def trained(work: Path, steps: int, progress: Progress) -> tuple[Path, torch.Tensor]:
    """A folder of the trained model in float16, and held-out rows (32, LENGTH)."""
    cfg = PretrainConfig(
        model=SHAPE, data=DataConfig(shards=str(work / "bytes"), corpus="python"), steps=steps,
        batch=8, seq_len=LENGTH, checkpoint_seconds=30.0,
        schedule=ScheduleConfig(warmup=max(1, steps // 20), decay=steps // 4, floor=0.05),
    )  # fmt: skip
    packed = open_data(cfg.data, SHAPE.vocab_size, progress)
    with RunFolder(work / f"train-{steps}", progress=progress) as run:
        model = pretrain.main(cfg, run)
    windows = Windows(packed, "heldout", LENGTH - 1)
    rows = windows.stack([number * len(windows) // 32 for number in range(32)]).tokens
    return hf.save(model, work / "plain", dtype="float16", overwrite=True), rows


@torch.no_grad()
def ternary(plain: Path, folder: Path) -> Path:
    """The model with every row of its linears rounded to -s, 0 and s, s in float16."""
    model = hf.load(plain, dtype="float32")
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.weight"):
            scale = parameter.abs().mean(-1, keepdim=True).half().float()
            parameter.copy_((parameter / scale).round().clamp(-1, 1) * scale)
    return hf.save(model, folder, dtype="float16", overwrite=True)


@torch.no_grad()
def log_probabilities(path: Path, rows: torch.Tensor) -> torch.Tensor:
    """Of every next byte (B, T, V), by the weights that a reader gives, in float32."""
    source = open_source(path)
    model = Transformer(source.config)
    model.load_state_dict(state_dict(source, torch.float32, "cpu"))
    return model.logits(model(Batch(rows))).log_softmax(-1)


def measure(
    places: dict[str, Path], forms: tuple[Form, ...], rows: torch.Tensor, work: Path
) -> Iterator[Row]:
    """Write, read back and compare each form. places: the originals by name; forms are added."""
    known = {name: log_probabilities(path, rows) for name, path in places.items()}
    weights = sum(parameter.numel() for parameter in hf.load(places[PLAIN]).parameters())
    for number, form in enumerate(forms):
        path = work / (f"{number}.gguf" if form.to == "gguf" else str(number))
        options = {"to": form.to, "type": form.type, "group": form.group}
        try:
            report = convert(places[form.source], path, **options)
        except UserError as error:
            yield Row(form.name, form.source, refused=str(error).replace(f"{work}/", ""))
            continue
        before, after = known[form.source], log_probabilities(path, rows)
        # a later form may be made from this one; the first of a name is meant
        places.setdefault(form.name, path)
        known.setdefault(form.name, after)
        classes = report.loss.classes
        yield Row(
            form.name,
            form.source,
            bits=8 * report.bytes / weights,
            linears=max(classes["attention"], classes["feed-forward"]),
            embedding=classes["embedding"],
            apart=(before.exp() * (before - after)).sum(-1).mean().item(),
        )


def table(rows: list[Row]) -> str:
    """The rows as text; refusals stand below."""
    lines = [f"{'container':<20} {'made from':<20} {'bits':>5} {'linears':>9} {'embedding':>9} "
             f"{'KL, nats':>9}"]  # fmt: skip
    for row in rows:
        if row.refused:
            lines.append(f"{row.name:<20} {row.source:<20} refused")
            continue
        errors = (f"{error:.2e}" if error else "0" for error in (row.linears, row.embedding))
        lines.append(
            f"{row.name:<20} {row.source:<20} {row.bits:>5.1f} {next(errors):>9} "
            f"{next(errors):>9} {row.apart:>9.1e}"
        )
    notes = [f"{row.name} from {row.source}: {row.refused}" for row in rows if row.refused]
    return "\n".join(lines + notes)


def verdict(rows: list[Row]) -> str:
    """Whether the moves that must cost nothing did."""
    moved = [row for row in rows if row.source != PLAIN and not row.refused]
    lossy = [f"{row.name} from {row.source}" for row in moved if row.linears or row.apart]
    if lossy:
        return f"not lossless, though it should be: {'; '.join(lossy)}"
    return (
        f"all {len(moved)} moves of codes and of ternary weights keep every linear's weights; "
        f"lossy ways refused: {sum(bool(row.refused) for row in rows)}"
    )


def plot(rows: list[Row], path: Path) -> None:
    """KL of each container of the trained model, with its bits a weight."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    own = sorted((one for one in rows if one.source == PLAIN and one.apart > 0),
                 key=lambda one: -one.apart)  # fmt: skip
    figure = Figure(figsize=(7.5, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="KL to the float16 model, nats a byte", xscale="log")
    names = [f"{one.name} ({one.bits:.1f} bits a weight)" for one in own]
    axes.barh(names, [one.apart for one in own], color="C0")
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(alpha=0.3, axis="x")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def main() -> None:
    """Train, convert, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400, help="of training")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/containers"), help="bytes, training"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "containers.json")
    flags = parser.parse_args()
    begun, progress = time.monotonic(), Progress()
    plain, texts = trained(flags.work, flags.steps, progress)
    places = {PLAIN: plain, TERNARY: ternary(plain, flags.work / "ternary")}
    rows = []
    with tempfile.TemporaryDirectory() as work:
        for row in measure(places, FORMS, texts, Path(work)):
            progress.update(f"{row.name} from {row.source}")
            rows.append(row)
    print(table(rows), verdict(rows), sep="\n")
    result = {
        "steps": flags.steps, "bytes_measured": texts.numel(), "rows": [asdict(r) for r in rows],
        "verdict": verdict(rows), "machine": platform.machine(),
    }  # fmt: skip
    plot(rows, flags.out.with_suffix(".png"))
    flags.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    progress.note(f"{flags.out} and .png written after {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
