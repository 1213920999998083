"""P-GPTQ: do massive activations on the first tokens spoil GPTQ, and does leaving them out help?

    python reproduce/pgptq.py                   train, then quantize 20 times; results/pgptq.*
    python reproduce/pgptq.py --minutes 10      less training; the run folder resumes

The claim (MiniCPM4, arXiv 2506.07900, section 5): the first positions of a text carry activations
tens of times larger than all others, worst in the inputs of down projections; the Hessian of GPTQ
is a sum of squares and so belongs to them. Leaving the first positions out (P-GPTQ) gives better
4-bit models, smoothed or not.

A model of the demo's shape is trained on the Python library's text, every row starting with the
beginning-of-text token, as published models are used. Massive activations grow in models a hundred
times larger and longer trained; whether they did here is measured first. Then the same question is
asked of two sets of weights:

    as trained   the model itself
    planted      in every layer one channel of the feed-forward, the one that mattered least, is
                 made a detector of the first position: its gate and up rows lie along the direction
                 that tells that position's input, which is always the same, from all others. It
                 fires there alone, tens of thousands high, and writes into the channel of the
                 residual stream that carried least, `TIMES` the size of the stream. That is the
                 shape massive activations have in published models. Planting changes the function,
                 but little: the perplexity of both is printed

Perplexity and KL come from held-out text. `apart` is the mean KL divergence between the model's and
the rounded model's next-token distributions: far less noisy than perplexity, whose changes at this
size lie within what rounding happens to do to a loss; `later` leaves out the first 4 positions of
each row, where P-GPTQ does not even try. Each cell is the mean over `DRAWS` sets of
calibration text, with the smallest and largest beside it.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import torch

from endside.data import corpus
from endside.data.loader import Loader, LoaderConfig, TokenBatch, Windows
from endside.data.pack import Encoder, Packed, open_packed, pack
from endside.formats import hf
from endside.formats.hf_config import config_to_hf
from endside.log import Progress
from endside.model.batch import Batch
from endside.model.presets import preset
from endside.model.transformer import Transformer
from endside.quant.pack import Scheme
from endside.quant.quantize import Recipe, Target, Texts, quantize
from endside.quant.report import Heldout
from endside.tokenizer import train_bpe
from endside.train.loop import loop
from endside.train.losses import LossConfig, next_token
from endside.train.optim import OptimConfig
from endside.train.run_folder import RunFolder
from endside.train.schedule import ScheduleConfig
from endside.train.spikes import SpikeConfig

RESULTS = Path(__file__).resolve().parent / "results"
BOS, EOS = 0, 1
TOKENIZER_TEXT = 3_000_000  # characters
TIMES = 30.0  # what a planted channel adds to the stream, in root mean squares of the stream
GATE = 20.0  # what its gate sees at the first position: silu is the identity there, small elsewhere
SHOWN = 32  # rows from which channels are chosen
DRAWS = 2
METHODS: dict[str, dict[str, Any]] = {
    "round-to-nearest": {"method": "rtn"},
    "GPTQ": {"method": "gptq"},
    "P-GPTQ": {"method": "pgptq"},
    "smoothed GPTQ": {"method": "gptq", "smooth": True},
    "smoothed P-GPTQ": {"method": "pgptq", "smooth": True},
}


@dataclass(frozen=True)
class Training:
    """The run, and the sizes of the texts."""

    steps: int = 1500
    batch: int = 8
    seq_len: int = 256
    seed: int = 0
    samples: int = 64  # rows of calibration text per draw
    heldout: int = 64  # rows that are measured on
    group: int = 128
    accumulate: int = 1
    eval_every: int = 0
    checkpoint_every: int = 0
    checkpoint_seconds: float = 30.0
    precision: Literal["float32"] = "float32"
    ema: float = 0.0
    tensorboard: bool = False
    spikes: SpikeConfig = field(default_factory=SpikeConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)


class FirstToken:
    """Batches whose every row starts with the beginning-of-text token, as one document."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self.state, self.restore, self.fits = loader.state, loader.restore, loader.fits

    def __next__(self) -> TokenBatch:
        return started(next(self._loader))


def started(batch: TokenBatch) -> TokenBatch:
    """The batch with the first token of each row replaced."""
    tokens = batch.tokens.clone()
    tokens[:, 0] = BOS
    return TokenBatch(tokens, torch.zeros_like(batch.documents))


def packed_text(folder: Path) -> Packed:
    """The library's text as token shards, with the tokenizer beside them."""
    tokens = folder / "tokens"
    if not tokens.exists():
        tokenizer = train_bpe(_up_to(TOKENIZER_TEXT), preset("demo").vocab_size)
        encoder = Encoder(
            lambda text: tokenizer.encode(text, bos=False),
            vocab_size=tokenizer.vocab_size, eos=EOS, fingerprint=tokenizer.fingerprint,
        )  # fmt: skip
        pack(corpus.standard_library(), tokens, encoder)
    return open_packed(tokens)


def _up_to(characters: int) -> Iterator[str]:
    taken = 0
    for document in corpus.standard_library():
        if taken >= characters:
            return
        taken += len(document.text)
        yield document.text


def trained(cfg: Training, packed: Packed, folder: Path) -> Transformer:
    """The demo's shape, trained; a run that is there already is resumed."""
    model = Transformer(replace(preset("demo"), bos_token_id=BOS, eos_token_ids=(EOS,)))
    model.init_weights(torch.Generator().manual_seed(cfg.seed))
    loader = Loader(packed, LoaderConfig(cfg.batch, cfg.seq_len, cfg.seed))
    with RunFolder(folder / f"train-{cfg.steps}") as run:
        loop(model, FirstToken(loader), next_token(LossConfig()), cfg, run)
    return model.eval()


def steps_that_fit(cfg: Training, packed: Packed, work: Path, minutes: float) -> Training:
    """The training with as many steps as take `minutes` here, or that was begun in `work`."""
    for before in work.glob("train-*"):
        return with_steps(cfg, int(before.name.removeprefix("train-")))
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        probe = replace(cfg, steps=5, schedule=ScheduleConfig(warmup=1))
        trained(probe, packed, Path(folder))
    steps = max(40, int(minutes * 60 / ((time.monotonic() - begun) / 5)))
    return with_steps(cfg, steps)


def with_steps(cfg: Training, steps: int) -> Training:
    """WSD over `steps`."""
    schedule = ScheduleConfig(warmup=max(1, steps // 20), decay=steps // 4, floor=0.05)
    return replace(cfg, steps=steps, schedule=schedule)


def rows(packed: Packed, split: Literal["train", "heldout"], count: int, length: int, draw: int):
    """Rows (count, length) spread over a split; other draws read other places."""
    windows = Windows(packed, split, length - 1)
    places = [(i * len(windows) // count + draw) % len(windows) for i in range(count)]
    return started(windows.stack(places)).tokens


@contextmanager
def seen(model: Transformer, names: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
    """While open, the last input of each named submodule is kept under its name."""
    kept: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable:
        return lambda _, given: kept.__setitem__(name, given[0])

    hooks = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def peaks(model: Transformer, tokens: torch.Tensor) -> list[dict[str, float]]:
    """Per layer what enters down: largest |x| at position 0, from position 4 on, median of all."""
    names = [f"layers.{layer}.mlp.down_proj" for layer in range(len(model.layers))]
    with seen(model, names) as kept:
        model(Batch(tokens))
    sizes = [kept[name].abs() for name in names]
    return [
        {
            "first": size[:, 0].max().item(),
            "elsewhere": size[:, 4:].max().item(),
            "median": size.median().item(),
        }
        for size in sizes
    ]


def plant(model: Transformer, tokens: torch.Tensor) -> None:
    """Make one channel of every layer massive at the first position of every row, in place."""
    for layer in range(len(model.layers)):
        _plant(model, layer, tokens)


@torch.no_grad()
def _plant(model: Transformer, number: int, tokens: torch.Tensor) -> None:
    last = number + 1 == len(model.layers)
    into, down, after = (
        f"layers.{number}.mlp.gate_proj", f"layers.{number}.mlp.down_proj",
        "norm" if last else f"layers.{number + 1}",
    )  # fmt: skip
    with seen(model, [into, down, after]) as kept:
        model(Batch(tokens))
    inputs, stream = kept[into].double(), kept[after]
    direction = detector(inputs[0, 0], inputs[:, 1:].flatten(0, 1))
    mlp, scale = model.layers[number].mlp, model.layers[number].scale
    read = mlp.down_proj.weight
    use = kept[down].square().mean((0, 1)).sqrt() * read.norm(dim=0)
    channel, row = int(use.argmin()), int(stream.square().mean((0, 1)).argmin())
    weight = read.abs().max().item() / 4  # of an ordinary size, so that the row's grid stays
    height = TIMES * stream[:, 1:].square().mean().sqrt().item() / (weight * scale)
    mlp.gate_proj.weight[channel] = GATE * direction
    mlp.up_proj.weight[channel] = height / GATE * direction
    read[:, channel] = 0
    read[row, channel] = weight


def detector(first: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """d (C,): d x = 1 for the first position's input (C,), least squares over others (P, C)."""
    moments = others.T @ others / len(others)
    moments += 0.01 * moments.diagonal().mean() * torch.eye(len(moments))
    direction = torch.linalg.solve(moments, first)
    return (direction / (direction @ first)).float()


@dataclass(frozen=True)
class Cell:
    """One method on one set of weights, over the draws."""

    weights: str
    method: str
    heldout: list[Heldout]
    down_error: float  # mean relative error of the down projections, first draw

    @property
    def apart(self) -> list[float]:
        """KL of each draw."""
        return [one.apart for one in self.heldout]

    @property
    def later(self) -> list[float]:
        """KL of each draw, first positions not counted."""
        return [one.apart_later for one in self.heldout]

    @property
    def increase(self) -> list[float]:
        """Increase of perplexity of each draw."""
        return [one.increase for one in self.heldout]


def measure(folder: Path, weights: str, name: str, cfg: Training, packed: Packed) -> Cell:
    """Quantize the model in `folder` with one method, once per draw."""
    heldout, made = rows(packed, "heldout", cfg.heldout, cfg.seq_len + 1, 0), []
    recipe = Recipe(Scheme("int4", cfg.group), **METHODS[name])
    for draw in range(DRAWS):
        texts = Texts(rows(packed, "train", cfg.samples, cfg.seq_len, draw), heldout)
        with tempfile.TemporaryDirectory() as where:
            target = Target(Path(where) / "out", config_to_hf, {}, name)
            made.append(quantize(hf.load(folder), recipe, texts, target, Progress(io.StringIO())))
    down = [row["error"] for row in made[0].rows if row["name"] == "mlp.down_proj"]
    return Cell(weights, name, [one.heldout for one in made], mean(down))


def table(cells: list[Cell]) -> str:
    """The cells as text."""
    head = ("weights", "method", "perplexity", "increase", "KL, 1e-3 nats", "later")
    lines = ["{:<11} {:<17} {:>10} {:>24} {:>20} {:>7}".format(*head)]
    for cell in cells:
        ups, gaps = cell.increase, [1e3 * gap for gap in cell.apart]
        after = mean(one.perplexity_after for one in cell.heldout)
        lines.append(
            f"{cell.weights:<11} {cell.method:<17} {after:>10.3f} "
            f"{mean(ups):>+8.2%} {min(ups):+.2%}..{max(ups):+.2%} "
            f"{mean(gaps):>8.3f} {min(gaps):.3f}..{max(gaps):.3f} {1e3 * mean(cell.later):>7.3f}"
        )
    return "\n".join(lines)


def verdict(cells: list[Cell]) -> list[str]:
    """What came out, in sentences that the numbers make."""
    by = {(cell.weights, cell.method): cell for cell in cells}
    found = []
    for weights in dict.fromkeys(cell.weights for cell in cells):
        for smoothed in ("", "smoothed "):
            plain, ours = (by[weights, f"{smoothed}{name}"] for name in ("GPTQ", "P-GPTQ"))
            ups = mean(plain.increase), mean(ours.increase)
            word = "no worse" if ups[1] <= ups[0] else "worse"
            gaps = [mean(ours.apart) / mean(plain.apart), mean(ours.later) / mean(plain.later)]
            found.append(
                f"{weights}: {smoothed}P-GPTQ is {word} than {smoothed}GPTQ in perplexity "
                f"({ups[1]:+.2%} against {ups[0]:+.2%}); its KL differs by {gaps[0] - 1:+.0%}, "
                f"{gaps[1] - 1:+.0%} without the first positions"
            )
    worst = max(max(cell.increase) for cell in cells if cell.method != "round-to-nearest")
    found.append(
        f"largest perplexity increase of any int4 model but round-to-nearest: {worst:+.2%}"
    )
    return found


def plot(cells: list[Cell], path: Path) -> None:
    """KL per method, one panel per set of weights."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(cell.weights for cell in cells))
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        own = [cell for cell in cells if cell.weights == name]
        middle = [1e3 * mean(cell.apart) for cell in own]
        spread = [[1e3 * (mean(c.apart) - min(c.apart)) for c in own],
                  [1e3 * (max(c.apart) - mean(c.apart)) for c in own]]  # fmt: skip
        panel.bar(range(len(own)), middle, yerr=spread, capsize=4, color="C0")
        panel.set_xticks(range(len(own)), [cell.method for cell in own], rotation=20, fontsize=8)
        panel.set_title(f"weights {name}", fontsize=10)
        panel.set_ylabel("KL to the unrounded model, 1e-3 nats a token")
        panel.grid(alpha=0.3, axis="y")
    figure.suptitle("int4: first positions kept in (GPTQ) or left out (P-GPTQ)", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def main() -> None:
    """Train, measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=12.0, help="of training")
    parser.add_argument("--steps", type=int, help="of training, instead of minutes")
    parser.add_argument("--work", type=Path, default=Path("runs/pgptq"), help="tokens, training")
    parser.add_argument("--out", type=Path, default=RESULTS / "pgptq.json", help="PNG beside it")
    flags = parser.parse_args()
    begun, progress = time.monotonic(), Progress()
    packed = packed_text(flags.work)
    cfg = Training()
    cfg = (
        with_steps(cfg, flags.steps)
        if flags.steps
        else steps_that_fit(cfg, packed, flags.work, flags.minutes)
    )
    model = trained(cfg, packed, flags.work)
    spent = time.monotonic() - begun
    cells, states = [], {}
    for weights in ("as trained", "planted"):
        shown = rows(packed, "train", SHOWN, cfg.seq_len, 0)
        if weights == "planted":
            plant(model, shown)
        folder = hf.save(model, flags.work / weights.replace(" ", "-"), overwrite=True)
        states[weights] = peaks(model, shown)
        for name in METHODS:
            progress.update(f"{weights}, {name}")
            cells.append(measure(folder, weights, name, cfg, packed))
    print("inputs of down at position 0, by layer: peak over the median of all (over the peak")
    print("from position 4 on)")
    for weights, state in states.items():
        ratios = [
            f"{p['first'] / p['median']:,.0f} ({p['first'] / p['elsewhere']:.1f})" for p in state
        ]
        before = (
            next(cell for cell in cells if cell.weights == weights).heldout[0].perplexity_before
        )
        print(f"    {weights}: {', '.join(ratios)}; perplexity unrounded {before:.3f}")
    print(table(cells), *verdict(cells), sep="\n")
    result = {
        "parameters": sum(p.numel() for p in model.parameters()), "training": asdict(cfg),
        "times": TIMES, "draws": DRAWS, "inputs_of_down": states,
        "cells": [{**asdict(cell), "increase": cell.increase} for cell in cells],
        "verdict": verdict(cells),
        "seconds": {"training": round(spent), "all": round(time.monotonic() - begun)},
        "machine": platform.machine(), "threads": torch.get_num_threads(),
    }  # fmt: skip
    plot(cells, flags.out.with_suffix(".png"))
    flags.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    progress.note(f"{flags.out} and .png written after {result['seconds']['all']} s")


if __name__ == "__main__":
    main()
