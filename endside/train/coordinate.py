"""The muP coordinate check: does anything inside the model grow with its width while it learns?

    size(kind, width, t)    root mean square of the activations x_t on one probe batch
    change(kind, width, t)  root mean square of x_t - x_0 on the same batch, after t steps
    slope                   of log2(size or change) over log2(width), least squares

The same model is built at several widths: head width fixed, heads and feed-forward growing, depth
kept. All read the same batches at the same learning rate (no warm-up). With muP every step changes
every kind of activation by an amount that does not depend on the width (arXiv 2203.03466, appendix
D.1), so |slope of change| stays under `LIMIT`: above it, wide models diverge first; below its
negative, wide models stop learning. Sizes must not grow either, but may shrink: the logits of a
tied head start at 1 / sqrt(width) and are learned up. Without muP the changes grow with slope 1/2
to 1. The trends after the last step decide: in the first ones that initial size still shows.

Kinds: embedding, attention out, mlp out (increments before the residual scale), residual (the
stream behind each layer), logits. Layers are averaged as squares.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from endside.data.loader import Loader, LoaderConfig, TokenBatch
from endside.data.source import open_data
from endside.errors import UserError
from endside.model.config import ModelConfig
from endside.model.transformer import Transformer
from endside.train.losses import model_batch, next_token
from endside.train.optim import make_optimizer
from endside.train.pretrain import PretrainConfig, deterministic, make_model

KINDS = ("embedding", "attention out", "mlp out", "residual", "logits")
LIMIT = 0.25  # of a slope that counts as flat; a missing scale makes slopes of 1/2 and more

Quantity = Literal["size", "change"]


@dataclass(frozen=True)
class Coordinate:
    """One kind of activation at one width after one number of steps, mean over seeds."""

    width: int
    step: int
    kind: str
    size: float
    change: float  # since step 0


@dataclass(frozen=True)
class Trend:
    """How a quantity goes with the width."""

    kind: str
    quantity: Quantity
    step: int
    slope: float

    @property
    def verdict(self) -> Literal["flat", "growing", "shrinking"]:
        """Against LIMIT; the size of an activation may shrink (see above)."""
        if self.slope > LIMIT:
            return "growing"
        return "shrinking" if self.slope < -LIMIT else "flat"

    @property
    def sound(self) -> bool:
        """Whether muP allows it."""
        return self.verdict == "flat" or (self.quantity, self.verdict) == ("size", "shrinking")


def at_width(model: ModelConfig, width: int) -> ModelConfig:
    """The same model `width` wide: same heads, more or fewer of them; UserError if it cannot be."""
    scaled = model.num_attention_heads * width / model.hidden_size
    heads = round(scaled)
    groups = max(1, heads // model.group)
    if heads != scaled or heads < 1 or heads % groups:
        raise UserError(
            f"width {width} would need {scaled:g} heads of {model.head_dim} in groups of "
            f"{model.group}: give the model's width ({model.hidden_size}) times a power of two"
        )
    return replace(
        model, hidden_size=width, num_attention_heads=heads, num_key_value_heads=groups,
        intermediate_size=model.intermediate_size * width // model.hidden_size,
    )  # fmt: skip


def default_widths(model: ModelConfig) -> tuple[int, ...]:
    """Four doublings that start at two heads, or at one where the model has an odd number."""
    per_head = model.hidden_size / model.num_attention_heads
    first = next(
        (n for n in (2, 1, 3, 4) if (n * per_head).is_integer() and model.num_attention_heads >= n),
        model.num_attention_heads,
    )
    return tuple(int(first * per_head) * 2**power for power in range(4))


def check(
    cfg: PretrainConfig, widths: Sequence[int], *, steps: int = 8, seeds: int = 2
) -> list[Coordinate]:
    """Train `steps` steps at every width and look inside after each; UserError below 4 widths."""
    if len(set(widths)) < 4:
        raise UserError(f"a slope needs at least 4 different widths, got {sorted(set(widths))}")
    if steps < 1 or seeds < 1:
        raise UserError(f"steps {steps} and seeds {seeds} must be at least 1")
    shapes = [at_width(cfg.model, width) for width in sorted(set(widths))]
    found = []
    for model in shapes:
        runs = [
            _one(replace(cfg, model=model, seed=cfg.seed + seed), steps) for seed in range(seeds)
        ]
        for step in range(steps + 1):
            for kind in KINDS:
                size, change = (
                    math.fsum(run[step][kind][place] for run in runs) / seeds for place in (0, 1)
                )
                found.append(Coordinate(model.hidden_size, step, kind, size, change))
    return found


def _one(cfg: PretrainConfig, steps: int) -> list[dict[str, tuple[float, float]]]:
    """Per step 0 .. steps: kind -> (size, change)."""
    packed = open_data(cfg.data, cfg.model.vocab_size)
    batches = Loader(packed, LoaderConfig(cfg.batch, cfg.seq_len, cfg.seed))
    with deterministic(cfg):
        model = make_model(cfg)
        optimizer, loss_fn = make_optimizer(model, cfg.optim), next_token(cfg.loss)
        probe = next(batches).to(cfg.device)
        start = inside(model, probe)
        records = [compare(start, start)]
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            loss = loss_fn(model, next(batches).to(cfg.device))
            (loss.total / loss.targets.clamp(min=1)).backward()
            if cfg.optim.clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.optim.clip)
            optimizer.step()
            records.append(compare(inside(model, probe), start))
    return records


@torch.no_grad()
def inside(model: Transformer, probe: TokenBatch) -> dict[str, list[torch.Tensor]]:
    """What every kind of activation is on the probe batch, layer by layer."""
    with _watching(model) as seen:
        seen["logits"] = [model.logits(model(model_batch(probe)))]
    seen["embedding"] = [x * model.config.scale_emb for x in seen["embedding"]]
    return {kind: [x.float() for x in seen[kind]] for kind in KINDS}


@contextmanager
def _watching(model: Transformer) -> Iterator[dict[str, list[torch.Tensor]]]:
    seen: dict[str, list[torch.Tensor]] = {kind: [] for kind in KINDS}
    places = [("embedding", model.embed_tokens)]
    for layer in model.layers:
        places += [("attention out", layer.self_attn), ("mlp out", layer.mlp), ("residual", layer)]
    hooks = [
        module.register_forward_hook(lambda _, __, out, kind=kind: seen[kind].append(out.clone()))
        for kind, module in places
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def compare(
    now: dict[str, list[torch.Tensor]], start: dict[str, list[torch.Tensor]]
) -> dict[str, tuple[float, float]]:
    """kind -> (size now, change since the start), root mean squares over all layers."""
    return {
        kind: (
            _rms(now[kind]),
            _rms([x - x0 for x, x0 in zip(now[kind], start[kind], strict=True)]),
        )
        for kind in KINDS
    }


def _rms(layers: list[torch.Tensor]) -> float:
    return math.sqrt(sum(x.square().mean().item() for x in layers) / len(layers))


def slope(widths: Sequence[int], values: Sequence[float]) -> float:
    """Least-squares slope of log2(values) over log2(widths); NaN where a value is not positive."""
    if min(values) <= 0 or not all(map(math.isfinite, values)):
        return math.nan
    xs, ys = [math.log2(w) for w in widths], [math.log2(v) for v in values]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    above = sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True))
    return above / sum((a - x) ** 2 for a in xs)


def trends(found: Sequence[Coordinate]) -> list[Trend]:
    """Size at every step and change at every step but the first, for every kind."""
    result = []
    for step in sorted({one.step for one in found}):
        for kind in KINDS:
            row = sorted(
                (one for one in found if (one.step, one.kind) == (step, kind)),
                key=lambda one: one.width,
            )
            widths = [one.width for one in row]
            result.append(Trend(kind, "size", step, slope(widths, [one.size for one in row])))
            if step:
                changes = [one.change for one in row]
                result.append(Trend(kind, "change", step, slope(widths, changes)))
    return result


def last(found: Sequence[Trend]) -> list[Trend]:
    """The trends after the last step: those the verdict is about."""
    final = max(trend.step for trend in found)
    return [trend for trend in found if trend.step == final]


def sound(found: Sequence[Trend]) -> bool:
    """Whether muP holds: every trend after the last step is allowed (NaN is not)."""
    return all(trend.sound and math.isfinite(trend.slope) for trend in last(found))


def table(found: Sequence[Coordinate]) -> str:
    """Sizes and changes by kind and step, a column per width, the slope and what it means."""
    widths = sorted({one.width for one in found})
    lines = [f"{'kind':<14} {'':<7} step" + "".join(f"{w:>9}" for w in widths) + "   slope"]
    values = {(one.kind, one.step, one.width): one for one in found}
    for trend in sorted(trends(found), key=lambda t: (KINDS.index(t.kind), t.quantity, t.step)):
        row = [getattr(values[trend.kind, trend.step, w], trend.quantity) for w in widths]
        lines.append(
            f"{trend.kind:<14} {trend.quantity:<7}{trend.step:>5}"
            + "".join(f"{value:>9.4f}" for value in row)
            + f"{trend.slope:>+8.2f} {trend.verdict}"
        )
    return "\n".join(lines)


def plot(found: Sequence[Coordinate], out: Path) -> None:
    """Change over width, one panel per kind, one line per step; the size dashed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(KINDS), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, kind in zip(figure.subplots(1, len(KINDS)), KINDS, strict=True):
        axes.set(xlabel="width", title=kind, xscale="log", yscale="log")
        axes.grid(alpha=0.3)
        for step in sorted({one.step for one in found}):
            row = [one for one in found if (one.kind, one.step) == (kind, step)]
            widths, color = [one.width for one in row], f"C{step}"
            axes.plot(widths, [one.size for one in row], "--", color=color, alpha=0.4)
            if step:
                changes = [one.change for one in row]
                axes.plot(widths, changes, "o-", color=color, label=f"change, step {step}")
        axes.set_xticks(widths, [str(w) for w in widths])
        axes.minorticks_off()
    axes.legend(fontsize=7)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110, metadata={"Software": None})
