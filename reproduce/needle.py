"""Needle retrieval with InfLLM v2: does a model that became sparse still find one fact far back?

    python reproduce/needle.py                 on a CPU: table on stdout, JSON and PNG in results/
    python reproduce/needle.py --scale gpu     a wider model, longer texts
    python reproduce/needle.py --steps 600     train longer (steps of the long stage)

The recipe of the reports (MiniCPM4, arXiv 2506.07900; InfLLM-V2, arXiv 2509.24663): a model is
trained dense on short texts; from those weights, without a new parameter, one copy goes on with
full attention on longer texts and one with sparse attention, both on the same batches. Measured are

    full            the copy that stayed dense
    sparse, coarse  the sparse copy, scores normalised over coarse summaries, as it was trained
    sparse, exact   the same weights, scores normalised over the fine summaries
    same, dense     the same weights with full attention
    sparse, topk 8  the same weights with 8 instead of 4 blocks beside the window
    full as sparse  the weights of `full` with sparse attention
    start, sparse   the weights before the long stage with sparse attention

The task: noise, eight needles in it, and in the end eight questions in random order. A needle is a
fact token said `repeat` times; fact tokens are pairs (key, value), a question is a key token and
its answer a value token. Key and value share a token because a needle of two tokens needs an
induction head, which takes more text to grow than a CPU reads in minutes. So this measures finding,
not composing; the seven other facts are the only distraction.

The sparse setting is that of the preset tiny-sparse. A needle that lies in the initial or the local
blocks is seen without being chosen, so `chosen` averages only needles that a query had to choose
(4 - 1 - 1 = 2 free blocks per key head). `recall` is how often some key head of the layer that is
best at it had the needle's block among the chosen ones; `by chance` is what blind choice would
reach. A row counts only where sparsity acts: mean visible / available tokens below 0.5.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from endside.log import Progress
from endside.model.batch import Batch
from endside.model.config import ModelConfig
from endside.model.presets import preset
from endside.model.transformer import Transformer
from endside.ops.cross_entropy.reference import IGNORE, cross_entropy
from endside.ops.infllm import attend_stats, geometry
from endside.ops.infllm.config import SparseConfig
from endside.ops.infllm.reference import chosen_blocks
from endside.ops.rope.frequencies import RopeConfig
from endside.ops.rope.reference import rotate
from endside.train.loop import loop
from endside.train.losses import Loss
from endside.train.optim import OptimConfig
from endside.train.run_folder import RunFolder
from endside.train.schedule import ScheduleConfig
from endside.train.spikes import SpikeConfig

RESULTS = Path(__file__).resolve().parent / "results"
NEEDLES = 8  # asked in a test row, one per depth
SEED = 1
ACTS = 0.5  # sparsity acts where visible / available is below this
DENSE = ("full", "same, dense")  # of the attentions measured


@dataclass(frozen=True)
class Task:
    """Sizes of the vocabulary and of a needle. Token ids: noise, keys, values, facts."""

    noise: int = 32
    keys: int = 32
    values: int = 8
    repeat: int = 4  # tokens of a needle

    @property
    def vocab(self) -> int:
        """V."""
        return self.noise + self.keys + self.values + self.keys * self.values

    def key(self, key: torch.Tensor) -> torch.Tensor:
        """Token that asks for `key`."""
        return self.noise + key

    def value(self, value: torch.Tensor) -> torch.Tensor:
        """Token that answers `value`."""
        return self.noise + self.keys + value

    def fact(self, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Token that says that `key` has `value`."""
        return self.noise + self.keys + self.values + key * self.values + value


@dataclass(frozen=True)
class Haystack:
    """tokens, targets (B, T) int64; starts (B, n): first token of the needle of question j.

    Question j is token T - 2 n + 2 j; its answer is the target there and the next token. Elsewhere
    the target is IGNORE.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    starts: torch.Tensor

    def to(self, device: torch.device | str) -> Haystack:
        """The rows on another device."""
        return Haystack(self.tokens.to(device), self.targets.to(device), self.starts.to(device))


def haystack(task: Task, starts: torch.Tensor, length: int, rng: torch.Generator) -> Haystack:
    """Noise with needles at starts (B, n), asked in that order at the end of `length` tokens."""
    rows, count = starts.shape
    body = length - 2 * count
    tokens = torch.randint(task.noise, (rows, length), generator=rng)
    keys = torch.rand(rows, task.keys, generator=rng).argsort(1)[:, :count]
    values = torch.randint(task.values, (rows, count), generator=rng)
    for said in range(task.repeat):
        tokens.scatter_(1, starts + said, task.fact(keys, values))
    tokens[:, body::2], tokens[:, body + 1 :: 2] = task.key(keys), task.value(values)
    targets = torch.full_like(tokens, IGNORE)
    targets[:, body::2] = task.value(values)
    return Haystack(tokens, targets, starts)


def anywhere(task: Task, shape: tuple[int, int], body: int, rng: torch.Generator) -> torch.Tensor:
    """Starts (B, n) of needles that do not overlap in `body` tokens, in random order."""
    count = shape[1]
    room = body - count * task.repeat
    gaps = torch.randint(room + 1, shape, generator=rng).sort(1).values
    starts = gaps + torch.arange(count) * task.repeat
    return starts.gather(1, _shuffled(shape, rng))


def at_depths(
    task: Task, rows: int, length: int, rng: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Starts (B, n) with one needle near each depth 0, 1/7 .. 1, shuffled, and the depths' numbers.

    Needles move by up to half a block, so that every place relative to block borders occurs.
    """
    last = length - 2 * NEEDLES - task.repeat
    spread = min(32, (last // (NEEDLES - 1) - task.repeat) // 2)
    centre = torch.arange(NEEDLES) * last // (NEEDLES - 1)
    shift = torch.randint(-spread, spread + 1, (rows, NEEDLES), generator=rng)
    starts = (centre + shift).clamp(0, last)
    order = _shuffled((rows, NEEDLES), rng)
    return starts.gather(1, order), order


def _shuffled(shape: tuple[int, int], rng: torch.Generator) -> torch.Tensor:
    return torch.rand(shape, generator=rng).argsort(1)


@dataclass(frozen=True)
class Scale:
    """How much of everything."""

    layers: int = 2
    width: int = 128  # C; heads are 4, key heads 2
    short: tuple[int, ...] = (128, 256)  # row lengths of the dense stage, in turn
    long: tuple[int, ...] = (512, 1280, 2560)  # row lengths of the long stage, in turn
    tested: tuple[int, ...] = (256, 1024, 1536, 2048, 2560)
    tokens: int = 5120  # of a training step
    dense_steps: int = 280
    long_steps: int = 180
    rows: int = 64  # tested per length: as many samples per cell


SCALES = {
    "cpu": Scale(),
    "gpu": Scale(
        layers=4, width=256, long=(512, 2048, 16384),
        tested=(256, 1024, 2048, 4096, 8192, 16384), tokens=65536,
        dense_steps=1000, long_steps=1000,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """What the training loop reads: one stage, in memory, nothing resumed."""

    steps: int
    optim: OptimConfig
    schedule: ScheduleConfig
    accumulate: int = 1
    eval_every: int = 0
    checkpoint_every: int = 0
    checkpoint_seconds: float = 0.0
    precision: Literal["float32", "bfloat16"] = "float32"
    ema: float = 0.0
    spikes: SpikeConfig = field(default_factory=SpikeConfig)
    tensorboard: bool = False


class Haystacks:
    """Training batches; batch number i depends on seed and i only. Lengths take turns."""

    def __init__(self, task: Task, lengths: tuple[int, ...], tokens: int, seed: int) -> None:
        self.task, self.lengths, self.tokens = task, lengths, tokens
        self.seed, self.number = seed, 0

    def __next__(self) -> Haystack:
        rng = torch.Generator().manual_seed(self.seed * 1_000_003 + self.number)
        length = self.lengths[self.number % len(self.lengths)]
        self.number += 1
        count = min(self.task.keys, length // 16)
        shape = (max(1, self.tokens // length), count)
        starts = anywhere(self.task, shape, length - 2 * count, rng)
        return haystack(self.task, starts, length, rng)

    def state(self) -> dict[str, Any]:
        """Where the next batch comes from."""
        return {"number": self.number, "seed": self.seed}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.number = state["number"]

    def fits(self, state: dict[str, Any]) -> bool:
        """Whether `state` counts these batches."""
        return state["seed"] == self.seed


def answers(model: nn.Module, batch: Haystack) -> Loss:
    """Cross entropy of the answers only: noise cannot be predicted."""
    asked = batch.targets != IGNORE
    logits = model.logits(model(Batch(batch.tokens))[asked])
    mean = cross_entropy(logits, batch.targets[asked])
    return Loss(mean * asked.sum(), mean.detach(), asked.sum())


def shape(scale: Scale, task: Task) -> ModelConfig:
    """tiny-sparse with this scale's sizes, dense; theta is that of minicpm5-1b.

    Channel pairs that turn by less than one radian over 2,560 tokens are those that can compare
    content at any distance: 7 of 16 at head width 32, against 2 with theta 1e4.
    """
    tiny = preset("tiny-sparse")
    return replace(
        tiny, vocab_size=task.vocab, hidden_size=scale.width, num_hidden_layers=scale.layers,
        head_dim=scale.width // tiny.num_attention_heads, intermediate_size=2 * scale.width,
        max_position_embeddings=max(scale.long), rope=RopeConfig(theta=5e6), sparse=None,
        scale_emb=12.0, dim_model_base=64, bos_token_id=None, eos_token_ids=(), pad_token_id=None,
    )  # fmt: skip


def with_attention(model: Transformer, sparse: SparseConfig | None) -> Transformer:
    """A copy of `model`, same weights, that attends as `sparse` says; None: dense."""
    copy = Transformer(replace(model.config, sparse=sparse)).to(model.norm.weight.device)
    copy.load_state_dict(model.state_dict())
    return copy


def train(model: Transformer, batches: Haystacks, stage: Stage, name: str) -> None:
    """Run one stage; the folder that the loop wants is thrown away."""
    Progress().note(f"{name}: {stage.steps} steps")
    with tempfile.TemporaryDirectory() as scratch, RunFolder(Path(scratch) / "run") as run:
        loop(model, batches, answers, stage, run)


def train_all(scale: Scale, task: Task, device: str) -> list[Transformer]:
    """Dense on short texts, from there on long ones: [start, full attention, sparse attention]."""
    model = Transformer(shape(scale, task))
    model.init_weights(torch.Generator().manual_seed(SEED))
    model.to(device)
    steps = scale.dense_steps
    short = Stage(steps, OptimConfig(learning_rate=0.01), ScheduleConfig(warmup=steps // 10))
    train(model, Haystacks(task, scale.short, scale.tokens, SEED), short, "dense, short")
    steps = scale.long_steps
    schedule = ScheduleConfig(warmup=steps // 10, decay=steps // 3)
    long = Stage(steps, OptimConfig(learning_rate=0.006), schedule)
    full, sparse = with_attention(model, None), with_attention(model, preset("tiny-sparse").sparse)
    for each, name in ((full, "full, long"), (sparse, "sparse, long")):
        train(each, Haystacks(task, scale.long, scale.tokens, SEED + 1), long, name)
    return [model, full, sparse]


@dataclass(frozen=True)
class Row:
    """One attention at one length."""

    attention: str
    length: int
    ratio: float  # mean visible / available tokens over all positions
    counts: bool  # sparsity acts
    accuracy: list[float]  # per depth 0, 1/7 .. 1
    chosen: float | None  # accuracy over needles that had to be chosen; None: there are none
    recall: float | None = None  # share of those whose block some key head of the best layer chose
    by_chance: float | None = None  # recall of blind choice
    per_head: list[list[float]] | None = None  # recall of every layer and key head alone


def variants(models: list[Transformer]) -> dict[str, Transformer]:
    """What is measured, by the name it has in table and picture; models as train_all gives them."""
    start, full, sparse = models
    setting = sparse.config.sparse
    return {
        "full": full,
        "sparse, coarse": sparse,
        "sparse, exact": with_attention(sparse, replace(setting, lse="exact")),
        "same, dense": with_attention(sparse, None),
        "sparse, topk 8": with_attention(sparse, replace(setting, topk=2 * setting.topk)),
        "full as sparse": with_attention(full, setting),
        "start, sparse": with_attention(start, setting),
    }


@torch.no_grad()
def measure(model: Transformer, name: str, task: Task, length: int, rows: int) -> Row:
    """Ask `rows` texts of `length` tokens, eight needles each, the same texts for every model."""
    rng = torch.Generator().manual_seed(SEED + 7 * length)
    device, sparse = model.norm.weight.device, model.config.sparse
    hits, depths, free, found = [], [], [], []
    for start in range(0, rows, 8):
        starts, order = at_depths(task, min(8, rows - start), length, rng)
        batch = haystack(task, starts, length, rng)
        with watching(model) as seen:
            hidden = model(Batch(batch.tokens.to(device)))[:, -2 * NEEDLES :: 2]
        hits.append(model.logits(hidden).argmax(-1).cpu() == batch.targets[:, -2 * NEEDLES :: 2])
        depths.append(order)
        # dense attention is compared on the needles that sparse attention would have to choose
        free.append(must_choose(starts, task, length, sparse or preset("tiny-sparse").sparse))
        if seen:
            found.append(torch.stack([holds(blocks.cpu(), starts, task) for blocks in seen]))
    hit, where, choosing = torch.cat(hits), torch.cat(depths), torch.cat(free)
    accuracy = [hit[where == depth].float().mean().item() for depth in range(NEEDLES)]
    chosen = hit[choosing].float().mean().item() if choosing.any() else None
    ratio = attend_stats(length, length, sparse).ratio if sparse else 1.0
    row = Row(name, length, ratio, ratio < ACTS, accuracy, chosen)
    if not row.counts:
        return row
    caught = torch.cat(found, dim=1)[:, choosing]  # (L, needles, G)
    return replace(
        row,
        recall=caught.any(2).float().mean(1).max().item(),
        by_chance=1 - (1 - blind(length, sparse)) ** caught.shape[2],
        per_head=caught.float().mean(1).tolist(),
    )


@contextmanager
def watching(model: Transformer) -> Iterator[list[torch.Tensor]]:
    """While open, a sparse forward appends, per layer, the blocks questions chose: (B, G, n, K)."""
    seen: list[torch.Tensor] = []

    def look(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        x, (cos, sin) = inputs[0], inputs[1]
        heads = (-1, layer.config.head_dim)
        q = rotate(layer.q_proj(x).unflatten(-1, heads), cos, sin)[:, -2 * NEEDLES :]
        k = rotate(layer.k_proj(x).unflatten(-1, heads), cos, sin)
        seen.append(chosen_blocks(q, k, sparse=layer.config.sparse)[:, :, ::2])

    layers = model.layers if model.config.sparse else ()
    hooks = [layer.self_attn.register_forward_pre_hook(look) for layer in layers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _edges(starts: torch.Tensor, task: Task, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """First and last block of the needles at starts (B, n)."""
    return starts // size, (starts + task.repeat - 1) // size


def holds(blocks: torch.Tensor, starts: torch.Tensor, task: Task, size: int = 64) -> torch.Tensor:
    """Whether blocks (B, G, n, K) hold a token of the needle at starts (B, n): (B, n, G) bool."""
    first, last = (edge[:, None, :, None] for edge in _edges(starts, task, size))
    return ((blocks == first) | (blocks == last)).any(-1).transpose(1, 2)


def must_choose(
    starts: torch.Tensor, task: Task, length: int, sparse: SparseConfig
) -> torch.Tensor:
    """Which needles (B, n) lie wholly outside the initial and local blocks of their question."""
    first, last = _edges(starts, task, sparse.block_size)
    question = length - 2 * NEEDLES + 2 * torch.arange(NEEDLES)
    local = geometry.first_local(question // sparse.block_size, sparse)
    return (first >= sparse.init_blocks) & (last < local)


def blind(length: int, sparse: SparseConfig) -> float:
    """Recall of one key head that takes free blocks at random, for a needle inside one block."""
    local = geometry.first_local((length - 1) // sparse.block_size, sparse)
    return min(1.0, geometry.free_blocks(sparse) / (local - sparse.init_blocks))


def check(rows: list[Row]) -> None:
    """Sparsity must act in what is shown, and must change nothing where it cannot act."""
    acting = {row.attention for row in rows if row.counts}
    for row in rows:
        assert not row.counts or row.ratio < ACTS, f"{row.attention} at {row.length} does not count"
    for name in {row.attention for row in rows} - set(DENSE):
        assert name in acting, f"sparsity never acts in {name}: test longer texts"
    dense = {row.length: row.accuracy for row in rows if row.attention == "same, dense"}
    for row in rows:
        if row.attention.startswith("sparse") and row.ratio == 1:
            same = row.accuracy == dense[row.length]
            assert same, f"{row.attention} differs from dense at {row.length}"


def table(rows: list[Row], task: Task) -> str:
    """One line per attention and length; accuracy in percent."""
    lines = [
        f"needle retrieval, exact answers in %; guessing: {100 / task.values:.0f}, "
        f"guessing among the values present: {100 / NEEDLES:.0f}",
        f"{'':15}{'length':>7}{'visible':>9}  counts  "
        + " ".join(f"{depth / (NEEDLES - 1):4.2f}" for depth in range(NEEDLES))
        + "  chosen  recall (by chance)",
    ]
    for row in rows:
        acts = "yes" if row.counts else "dense" if row.ratio == 1 else "no"
        recall = f"{100 * row.recall:6.0f} ({100 * row.by_chance:.0f})" if row.counts else ""
        chosen = "" if row.chosen is None else f"{100 * row.chosen:.1f}"
        lines.append(
            f"{row.attention:15}{row.length:7d}{row.ratio:9.3f}  {acts:>6}  "
            + " ".join(f"{100 * part:4.0f}" for part in row.accuracy)
            + f"  {chosen:>6}  {recall}".rstrip()
        )
    return "\n".join(lines)


def plot(rows: list[Row], path: Path) -> None:
    """A panel of length by depth per attention; columns where sparsity does not act are hatched."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row.attention for row in rows))
    lines = -(-len(names) // 4)
    figure = Figure(figsize=(11, 3.2 * lines), layout="constrained")
    panels = figure.subplots(lines, 4, sharey=True, squeeze=False).flatten()
    for panel in panels[len(names) :]:
        panel.set_axis_off()
    for panel, name in zip(panels, names, strict=False):
        own = [row for row in rows if row.attention == name]
        cells = torch.tensor([row.accuracy for row in own]).T
        image = panel.imshow(cells.numpy(), vmin=0, vmax=1, aspect="auto", cmap="viridis")
        for column, row in enumerate(own):
            for depth, part in enumerate(row.accuracy):
                ink = "black" if part > 0.6 else "white"
                text = f"{100 * part:.0f}"
                panel.text(column, depth, text, ha="center", va="center", color=ink, fontsize=7)
            if name not in DENSE and not row.counts:
                panel.axvspan(column - 0.5, column + 0.5, fill=False, hatch="//", linewidth=0)
        panel.set_title(name, fontsize=10)
        panel.set_xticks(range(len(own)), [str(row.length) for row in own])
        panel.set_yticks(range(NEEDLES), [f"{i / (NEEDLES - 1):.2f}" for i in range(NEEDLES)])
    figure.supxlabel("tokens")
    figure.supylabel("depth of the needle")
    figure.colorbar(image, ax=list(panels), label="exact answers")
    figure.suptitle("Needle retrieval; hatched: sparsity does not act", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def main() -> None:
    """Train, measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", choices=sorted(SCALES), default="cpu")
    parser.add_argument("--steps", type=int, help="steps of the long stage")
    parser.add_argument("--out", type=Path, default=RESULTS / "needle.json", help="PNG beside it")
    flags = parser.parse_args()
    scale, task = SCALES[flags.scale], Task()
    if flags.steps is not None:
        if flags.steps < 10:
            raise SystemExit(f"--steps {flags.steps} leaves no warm-up: use 10 or more")
        scale = replace(scale, long_steps=flags.steps)
    if flags.scale == "gpu" and not torch.cuda.is_available():
        raise SystemExit("--scale gpu needs a CUDA device: leave the flag out on a CPU")
    begun = time.monotonic()
    models = train_all(scale, task, "cuda" if flags.scale == "gpu" else "cpu")
    trained = time.monotonic() - begun
    rows, progress = [], Progress()
    for name, model in variants(models).items():
        for length in scale.tested:
            progress.update(f"measuring {name}, {length} tokens")
            rows.append(measure(model, name, task, length, scale.rows))
    print(table(rows, task))
    check(rows)
    report = {
        "parameters": sum(p.numel() for p in models[0].parameters()),
        "scale": asdict(scale), "task": asdict(task), "seed": SEED,
        "sparse": asdict(models[-1].config.sparse),
        "seconds": {"training": round(trained), "all": round(time.monotonic() - begun)},
        "machine": platform.machine(), "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rows": [asdict(row) for row in rows],
    }  # fmt: skip
    plot(rows, flags.out.with_suffix(".png"))
    flags.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    progress.note(f"{flags.out} and .png written after {report['seconds']['all']} s")


if __name__ == "__main__":
    main()
