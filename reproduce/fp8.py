"""FP8 training, emulated bit for bit on the CPU, against BF16 and FP32: loss curves of one seed.

    python reproduce/fp8.py                  about 5 minutes on one core
    python reproduce/fp8.py --steps 600      longer runs

The claim (MiniCPM4, arXiv 2506.07900; recipe of training spec, "FP8"): with block-wise scales the
linear products of the forward pass and of the input gradient can be in E4M3 without a visible price
in loss. Same seed, start and data three times: FP32, BF16 and FP8. The yardstick is what the start
alone changes: the spread of FP32 over seeds. A gap inside it cannot be told from luck.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from endside.log import Progress
from reproduce import small
from reproduce.small import Records

WIDTH = 128  # every projection has at least one whole 128 x 128 block
RATE = 2.0**-7  # the best of mup.py
PRECISIONS = ("float32", "bfloat16", "fp8")
VISIBLE = 0.005  # of the BF16 loss


@dataclass(frozen=True)
class Run:
    """One training."""

    precision: str
    seed: int
    loss: float  # held out, at the end, nats a byte


def run(work: Path, steps: int, seeds: int) -> tuple[list[Run], dict[tuple[str, int], Records]]:
    """Every precision with seed 0, FP32 with the others too; and the metrics."""
    runs, curves, progress = [], {}, Progress()
    for precision in PRECISIONS:
        for seed in range(seeds if precision == "float32" else 1):
            model = small.shape(WIDTH)
            base = small.config(work, model, steps, RATE, decay=steps // 5, seed=seed)
            cfg, folder = replace(base, precision=precision), work / f"steps-{steps}"
            name = f"{precision}-{seed}"
            curves[precision, seed], loss = small.run(cfg, folder / name, name, progress)
            runs.append(Run(precision, seed, loss))
    return runs, curves


def spread(runs: list[Run]) -> float:
    """Highest less lowest FP32 loss over seeds."""
    losses = [one.loss for one in runs if one.precision == "float32"]
    return max(losses) - min(losses)


def verdict(runs: list[Run]) -> str:
    """Whether the claim held, beside what the seed alone does."""
    loss = {one.precision: one.loss for one in runs if one.seed == 0}
    gap = loss["fp8"] / loss["bfloat16"] - 1
    held = "held" if gap <= VISIBLE else "did not hold"
    return (
        f"FP8 ends {gap:+.2%} from BF16 and {loss['fp8'] / loss['float32'] - 1:+.2%} from FP32; "
        f"FP32 seeds differ by {spread(runs) / loss['float32']:.2%}: the claim (at most "
        f"{VISIBLE:.1%} above BF16) {held}"
    )


def table(runs: list[Run]) -> str:
    """One line per run."""
    plain = next(one.loss for one in runs if one.precision == "float32" and one.seed == 0)
    lines = [f"{'precision':<10} {'seed':>4} {'loss':>8} {'against FP32':>13}"]
    for one in runs:
        gap = one.loss / plain - 1
        lines.append(f"{one.precision:<10} {one.seed:>4} {one.loss:>8.4f} {gap:>+13.2%}")
    return "\n".join(lines)


def plot(curves: dict[tuple[str, int], Records], note: str) -> Any:
    """The three curves, and their distance from FP32, smoothed."""
    from endside.train.plot import series, smooth

    figure, (left, right) = small.picture(2, xlabel="step", ylabel="training loss, nats a byte")
    plain = smooth(series(curves["float32", 0], "loss")[1])
    for number, precision in enumerate(PRECISIONS):
        steps, losses = series(curves[precision, 0], "loss")
        smoothed = smooth(losses)
        left.plot(steps, smoothed, color=f"C{number}", linewidth=1, label=precision)
        if precision != "float32":
            away = [one - other for one, other in zip(smoothed, plain, strict=True)]
            right.plot(steps, away, color=f"C{number}", linewidth=1, label=f"{precision} - float32")
    for (_, seed), records in curves.items():
        if seed:
            away = [a - b for a, b in zip(smooth(series(records, "loss")[1]), plain, strict=True)]
            label = "other seeds, float32" if seed == 1 else None
            right.plot(steps, away, color="gray", linewidth=0.8, alpha=0.6, label=label)
    for axes in (left, right):
        axes.legend()
    figure.suptitle(note, fontsize=9)
    return figure


def main() -> None:
    """Train, print, draw."""
    parser = small.arguments(__doc__, "fp8")
    parser.add_argument("--steps", type=int, default=300, help="of every run")
    parser.add_argument("--seeds", type=int, default=3, help="of FP32")
    given = parser.parse_args()
    runs, curves = run(given.work, given.steps, given.seeds)
    said = table(runs), verdict(runs)
    small.report(given, small.shape(WIDTH), runs, said, lambda note: plot(curves, note))


if __name__ == "__main__":
    main()
