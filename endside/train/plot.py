"""The curves of runs as one picture: loss, held-out loss, learning rate and gradient norm.

All over tokens trained on, so that runs with other batches can be compared. Loss and norm are drawn
twice: every step thin, and heavy the running mean. What the first steps of a run lose is cut off at
the top, because it would flatten everything that is of interest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from endside.errors import UserError
from endside.log import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMOOTHING = 0.95  # weight of the past in the heavy line; the thin one is every step
BEGINNING = 0.02  # share of a run whose loss may lie above the picture
Records = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Panel:
    """One of the picture's parts."""

    key: str
    title: str
    smoothed: bool = False
    scale: str = "linear"


PANELS = (
    Panel("loss", "training loss (nats per token)", smoothed=True),
    Panel("heldout_loss", "held-out loss (nats per token)"),
    Panel("learning_rate", "learning rate"),
    Panel("gradient_norm", "gradient norm", smoothed=True, scale="log"),
)


def loss_curves(runs: Sequence[Path], out: Path) -> None:
    """Draw the metrics of run folders to the picture `out` (its suffix says the format)."""
    if not runs:
        raise UserError("no run to plot: give one or more run folders")
    curves = [read_metrics(Path(run) / "metrics.jsonl") for run in runs]
    # The object interface, with its own canvas: no global backend is touched.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    for place, panel in enumerate(PANELS):
        axes = figure.add_subplot(2, 2, place + 1, sharex=figure.axes[0] if place else None)
        drawn = [_draw(axes, panel, records, f"C{n}") for n, records in enumerate(curves)]
        _finish(axes, panel, [top for top in drawn if top is not None])
    handles = [figure.axes[0].plot([], [], color=f"C{n}", linewidth=3)[0] for n in range(len(runs))]
    figure.legend(handles, names(runs), loc="outside upper center", ncols=min(4, len(runs)))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot write the plot {out}: {error}; give a writable .png path"
        ) from error


def _draw(axes: Axes, panel: Panel, records: Records, color: str) -> float | None:
    """Draw one run into one panel; the highest value worth seeing, None where there is none."""
    steps, values = series(records, panel.key)
    if not steps:
        return None
    tokens = tokens_at(records, steps)
    if panel.key == "heldout_loss":
        axes.plot(tokens, values, "o-", color=color, markersize=4)
        return max(values)
    if not panel.smoothed:
        axes.plot(tokens, values, color=color)
        return max(values)
    heavy = smooth(values)
    axes.plot(tokens, values, color=color, alpha=0.25, linewidth=0.8)
    axes.plot(tokens, heavy, color=color)
    return max(heavy[int(BEGINNING * len(heavy)) :])


def _finish(axes: Axes, panel: Panel, tops: list[float]) -> None:
    from matplotlib.ticker import EngFormatter

    axes.set_title(panel.title, fontsize=11)
    axes.set_xlabel("tokens")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.3)
    if not tops:
        axes.text(0.5, 0.5, "not recorded", ha="center", transform=axes.transAxes, color="gray")
        return
    axes.set_yscale(panel.scale)
    if panel.scale == "log":
        axes.yaxis.set_major_formatter("{x:g}")
        # between powers of ten only twos and fives, or labels run into each other
        axes.yaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:.0e}"[0] in "25" else "")
    if panel.key == "loss":
        low, _ = axes.get_ylim()
        axes.set_ylim(low, max(tops) + 0.05 * (max(tops) - low))


def names(runs: Sequence[Path]) -> list[str]:
    """What to call each run: its path, without what all begin with."""
    paths = [Path(run).resolve().parts for run in runs]
    if len(set(paths)) == 1:
        return [paths[0][-1]] * len(runs)
    shared = 0
    while all(len(path) > shared + 1 for path in paths) and len({p[shared] for p in paths}) == 1:
        shared += 1
    return ["/".join(path[shared:]) for path in paths]


def series(records: Records, key: str) -> tuple[list[int], list[float]]:
    """The steps at which `key` was recorded, and its values."""
    found = [(int(record["step"]), record[key]) for record in records if key in record]
    return [step for step, _ in found], [value for _, value in found]


def tokens_at(records: Records, steps: Sequence[int]) -> list[float]:
    """Tokens trained on by the end of each step; records of evaluations do not say it."""
    known = dict(zip(*series(records, "tokens"), strict=True))
    return [known.get(step, float("nan")) for step in steps]


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential mean of the past, started without bias."""
    mean, weight, result = 0.0, 0.0, []
    for value in values:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        result.append(mean / weight)
    return result
