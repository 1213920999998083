"""The loss curves of runs as one picture: training, held out, over steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from endside.errors import UserError
from endside.log import read_metrics

SMOOTHING = 0.95  # weight of the past in the heavy line; the thin one is every step


def loss_curves(runs: Sequence[Path], out: Path) -> None:
    """Draw the metrics of run folders to the picture `out` (its suffix says the format)."""
    if not runs:
        raise UserError("no run to plot: give one or more run folders")
    curves = [(Path(run), read_metrics(Path(run) / "metrics.jsonl")) for run in runs]
    # The object interface, with its own canvas: no global backend is touched.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)")
    for number, (run, records) in enumerate(curves):
        color, name = f"C{number}", run.resolve().name
        steps, losses = series(records, "loss")
        axes.plot(steps, losses, color=color, alpha=0.25, linewidth=0.8)
        axes.plot(steps, smooth(losses), color=color, label=f"{name} training")
        held = series(records, "heldout_loss")
        if held[0]:
            axes.plot(
                *held, "o--", color=color, markersize=4, linewidth=1, label=f"{name} held out"
            )
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot write the plot {out}: {error}; give a writable .png path"
        ) from error


def series(records: Sequence[dict[str, float]], key: str) -> tuple[list[int], list[float]]:
    """The steps at which `key` was recorded, and its values."""
    found = [(int(record["step"]), record[key]) for record in records if key in record]
    return [step for step, _ in found], [value for _, value in found]


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential mean of the past, started without bias."""
    mean, weight, result = 0.0, 0.0, []
    for value in values:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        result.append(mean / weight)
    return result
