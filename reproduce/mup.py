"""Does the best learning rate stay where it is when the model grows? muP against nothing scaled.

    python reproduce/mup.py                    about 8 minutes on one core
    python reproduce/mup.py --steps 320        twice the tokens
    python reproduce/mup.py --widths 64,128    fewer widths

The claim (MiniCPM, arXiv 2404.06395, after arXiv 2203.03466): with muP a learning rate found on a
narrow model is the best of a wide one. Models of width 64 to 512 (heads of 32 channels, more of
them; muP base 64; two layers) read the same tokens of real text at every rate of a grid of factor
2. The best rate of each width is the one with the lowest held-out loss, mean over seeds; a
parabola through it and its neighbours says where between the grid's points it lies. A best rate on
the grid's edge counts as not found: the grid is then extended there.

The control has the same shapes with nothing scaled by the width: initial weights, rates and logits
as at width 64. If its best rate did not move, the test could not tell.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from endside.log import Progress
from reproduce import small

GRID = (-9, -8, -7, -6, -5)  # powers of two
REACH = (-13, -3)  # how far the grid may be extended
NAMES = {"muP": small.BASE, "control": None}


@dataclass(frozen=True)
class Cell:
    """One width at one rate."""

    name: str  # muP or control
    width: int
    power: int  # learning rate 2 ** power
    losses: tuple[float, ...]  # held out, nats a byte; one per seed

    @property
    def loss(self) -> float:
        """Mean over seeds."""
        return sum(self.losses) / len(self.losses)


@dataclass(frozen=True)
class Best:
    """Where the lowest loss of a width lies."""

    name: str
    width: int
    power: int
    between: float  # power of two at the bottom of the parabola
    loss: float
    inside: bool  # the grid goes on at both sides


def best(cells: list[Cell]) -> Best:
    """Of the cells of one width."""
    cells = sorted(cells, key=lambda cell: cell.power)
    at = min(range(len(cells)), key=lambda place: cells[place].loss)
    cell, inside = cells[at], 0 < at < len(cells) - 1
    between = float(cell.power)
    if inside:
        left, middle, right = (one.loss for one in cells[at - 1 : at + 2])
        between += (left - right) / (2 * (left - 2 * middle + right))
    return Best(cell.name, cell.width, cell.power, between, cell.loss, inside)


def seeds_of(width: int, widest: int, seeds: int) -> range:
    """The widest model, which costs more than all others together, is trained once."""
    return range(1 if width == widest else seeds)


def measure(name: str, width: int, power: int, flags: Flags) -> Cell:
    """Train one cell, all its seeds."""
    losses = []
    for seed in seeds_of(width, max(flags.widths), flags.seeds if name == "muP" else 1):
        model = small.shape(width, base=NAMES[name])
        cfg = small.config(
            flags.work, model, flags.steps, 2.0**power, decay=flags.steps // 5, seed=seed
        )
        folder = flags.work / f"steps-{flags.steps}" / f"{name}-{width}-{-power}-{seed}"
        losses.append(small.heldout(small.train(cfg, folder)))
    return Cell(name, width, power, tuple(losses))


@dataclass(frozen=True)
class Flags:
    """What is compared."""

    work: Path
    widths: tuple[int, ...] = (64, 128, 256, 512)
    control: tuple[int, ...] = (64, 128, 256)  # widths of the control
    steps: int = 160
    seeds: int = 2


def sweep(name: str, width: int, flags: Flags) -> Iterator[Cell]:
    """The grid, extended where the best lies on its edge."""
    cells = [measure(name, width, power, flags) for power in GRID]
    while not (found := best(cells)).inside:
        low = found.power == min(cell.power for cell in cells)
        power = found.power + (-1 if low else 1)
        if not REACH[0] <= power <= REACH[1]:
            break
        cells.append(measure(name, width, power, flags))
    return iter(sorted(cells, key=lambda cell: cell.power))


def moved(found: list[Best]) -> int:
    """Grid steps between the lowest and the highest best rate."""
    powers = [one.power for one in found]
    return max(powers) - min(powers)


def verdict(found: list[Best]) -> str:
    """Whether the claim held, and whether it could have failed."""
    mup, control = ([one for one in found if one.name == name] for name in NAMES)
    steps, widths = moved(mup), f"{mup[0].width} to {mup[-1].width}"
    open_ended = [one.width for one in mup if not one.inside]
    held = "held" if steps <= 1 and not open_ended else "did not hold"
    said = f"muP: the best rate of widths {widths} moves by {steps} grid steps: the claim {held}"
    if open_ended:
        said += f" (best on the edge of the grid at {open_ended})"
    if not control:
        return said
    other = moved(control)
    tells = "moves further" if other > steps else "does not move further: a weak test"
    return f"{said}; nothing scaled, {control[0].width} to {control[-1].width}: {other}, it {tells}"


def table(cells: list[Cell]) -> str:
    """Loss of every rate, width by width; the best marked."""
    powers = sorted({cell.power for cell in cells})
    lines = ["          width  " + "".join(f"{f'2^{power}':>9}" for power in powers) + "   best"]
    for name in NAMES:
        for width in sorted({cell.width for cell in cells if cell.name == name}):
            row = {c.power: c for c in cells if (c.name, c.width) == (name, width)}
            found = best(list(row.values()))
            marks = [
                f"{row[p].loss:.4f}{'*' if p == found.power else ' '}" if p in row else "- "
                for p in powers
            ]
            lines.append(
                f"{name:<10} {width:>5} " + "".join(f"{m:>9}" for m in marks)
                + f"   2^{found.between:.2f}"
            )  # fmt: skip
    spreads = [max(cell.losses) - min(cell.losses) for cell in cells if len(cell.losses) > 1]
    if spreads:
        lines.append(f"seeds differ by at most {max(spreads):.4f} in one cell")
    return "\n".join(lines)


def plot(cells: list[Cell], note: str):
    """Loss over the rate, one line per width, muP and control beside each other."""
    names = [name for name in NAMES if any(cell.name == name for cell in cells)]
    figure, panels = small.picture(
        len(names), xlabel="learning rate", ylabel="held-out loss, nats a byte", xscale="log"
    )
    for axes, name in zip(panels, names, strict=True):
        for number, width in enumerate(sorted({c.width for c in cells if c.name == name})):
            row = sorted(
                (c for c in cells if (c.name, c.width) == (name, width)), key=lambda c: c.power
            )
            found, color = best(row), f"C{number}"
            rates = [2.0**c.power for c in row]
            axes.plot(rates, [c.loss for c in row], "o-", color=color, label=f"width {width}")
            low, high = ([end(c.losses) for c in row] for end in (min, max))
            axes.fill_between(rates, low, high, color=color, alpha=0.15)
            axes.plot(2.0**found.power, found.loss, "*", color=color, markersize=15)
        axes.set_title(name + ("" if name == "muP" else ": nothing scaled with the width"))
        axes.legend()
    figure.suptitle(note, fontsize=9)
    return figure


def run(flags: Flags) -> tuple[list[Cell], list[Best]]:
    """All cells, and the best of each width."""
    cells, found, progress = [], [], Progress()
    for name, widths in zip(NAMES, (flags.widths, flags.control), strict=True):
        for width in widths:
            row = list(sweep(name, width, flags))
            cells += row
            found.append(best(row))
            progress.note(f"{name} {width}: best 2^{found[-1].power}, loss {found[-1].loss:.4f}")
    return cells, found


def main() -> None:
    """Train, print, draw."""

    def numbers(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split(",") if part)

    parser = small.arguments(__doc__, "mup")
    parser.add_argument("--widths", type=numbers, default=Flags.widths)
    parser.add_argument("--control", type=numbers, default=Flags.control, help="its widths")
    parser.add_argument("--steps", type=int, default=Flags.steps, help="of every run")
    parser.add_argument("--seeds", type=int, default=Flags.seeds, help="below the widest")
    given = parser.parse_args()
    flags = Flags(given.work, given.widths, given.control, given.steps, given.seeds)
    cells, found = run(flags)
    cfg = small.config(flags.work, small.shape(), flags.steps, 1.0)
    tokens = flags.steps * cfg.batch * cfg.seq_len
    note = f"two layers, {tokens:,} bytes of text a run"
    print(note, table(cells), verdict(found), sep="\n")
    result = {
        "tokens": tokens, "steps": flags.steps, "verdict": verdict(found),
        "best": [asdict(one) for one in found], "cells": [asdict(cell) for cell in cells],
        "base_width": small.BASE, "head_width": small.HEAD, "optim": asdict(cfg.optim),
    }  # fmt: skip
    small.finish(given.out, result, plot(cells, note))


if __name__ == "__main__":
    main()
