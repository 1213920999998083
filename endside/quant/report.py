"""What a quantization cost, as JSON and as a picture: error per projection, perplexity, the worst.

The error of a projection is tr(dW H dW^T) / tr(W H W^T), the share of its output energy on the
calibration text that rounding costs, in the coordinates in which it was rounded (after rotation and
smoothing). Beside it stands that of round-to-nearest on the same inputs. Without calibration text
H is the identity.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

WORST = 5  # projections a summary names


@dataclass(frozen=True)
class Heldout:
    """What held-out text says. apart: mean KL of the rounded model's distribution, nats a token.

    apart_later: the same without the first 4 positions of each row, which P-GPTQ gives up.
    """

    perplexity_before: float
    perplexity_after: float
    apart: float
    apart_later: float
    tokens: int

    @property
    def increase(self) -> float:
        """How much perplexity grew, as a share."""
        return self.perplexity_after / self.perplexity_before - 1

    def __str__(self) -> str:
        return (
            f"perplexity {self.perplexity_before:.3f} -> {self.perplexity_after:.3f} "
            f"({self.increase:+.2%}), KL {self.apart:.2e} nats"
        )


@dataclass(frozen=True)
class Report:
    """rows: layer, name, shape, error, rtn_error, peaks of the inputs, alpha of smoothing."""

    recipe: dict[str, Any]
    rows: list[dict[str, Any]]
    heldout: Heldout | None = None

    @property
    def worst(self) -> list[dict[str, Any]]:
        """The rows with the largest errors, largest first."""
        return sorted(self.rows, key=lambda row: -row["error"])[:WORST]

    def json(self) -> bytes:
        """The file; the same pass gives the same bytes."""
        whole = {**asdict(self), "worst": self.worst}
        if self.heldout is not None:
            whole["heldout"] |= {"increase": self.heldout.increase}
        return json_bytes(whole)

    def __str__(self) -> str:
        mean = sum(row["error"] for row in self.rows) / len(self.rows)
        nearest = sum(row["rtn_error"] for row in self.rows) / len(self.rows)
        lines = [f"relative error {mean:.3%} on average, round-to-nearest {nearest:.3%}; worst:"]
        lines += [
            f"  layer {row['layer']} {row['name']}: {row['error']:.3%}{_peaks(row)}"
            for row in self.worst
        ]
        lines += [str(self.heldout)] if self.heldout else []
        return "\n".join(lines)


def _peaks(row: dict[str, Any]) -> str:
    if not row.get("peak_rest"):
        return ""
    times = row["peak_first"] / row["peak_rest"]
    return f" (largest input of the first 4 positions: {times:.1f} x that of the others)"


def json_bytes(value: dict[str, Any]) -> bytes:
    """The text of a JSON file."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def plot(report: Report, path: Path) -> Path:
    """Draw the error of every projection over the layers to `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="layer", ylabel="relative error", yscale="log")
    names = list(dict.fromkeys(row["name"] for row in report.rows))
    for number, name in enumerate(names):
        own = [row for row in report.rows if row["name"] == name]
        layers, color = [row["layer"] for row in own], f"C{number}"
        axes.plot(layers, [row["error"] for row in own], "o-", color=color, label=name)
        axes.plot(layers, [row["rtn_error"] for row in own], ":", color=color, linewidth=1)
    axes.plot([], [], ":", color="gray", label="round-to-nearest")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    if report.heldout is not None:
        axes.set_title(f"{report.recipe['method']}: {report.heldout}", fontsize=10)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    return path
