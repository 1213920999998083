"""Does predicting two tokens ahead cost the next one, and what does it leave behind?

    python reproduce/mtp.py                  about 3 minutes on one core
    python reproduce/mtp.py --steps 1000     longer runs

The claim (MiniCPM4, arXiv 2506.07900; training spec, "MTP"): a further layer that predicts the
token after the next, trained with weight 0.3 beside the main loss, does not harm the main model
(large models gain), and is a draft model afterwards. Pairs of runs with the same seed, start, data
and number of tokens, with and without the layer. Measured on held-out text: the main loss, the
layer's own loss, and how often its first guess behind a text prefix is the main model's greedy
choice, which is how often greedy speculation accepts it. `prior` is how often the main model's
choices are the one byte it chooses most: what a draft without input would get.

Equal tokens, not equal work: the layer adds its own products to every training step.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from endside.data.loader import Windows
from endside.data.source import open_data
from endside.log import Progress
from endside.model.config import ModelConfig
from endside.model.transformer import Transformer
from endside.ops.cross_entropy.reference import IGNORE, cross_entropy
from endside.train.loop import load_model
from endside.train.losses import LossConfig, model_batch, shifted_targets
from endside.train.pretrain import PretrainConfig
from endside.train.run_folder import read_checkpoint
from reproduce import small
from reproduce.small import Records

WIDTH = 128
RATE = 2.0**-7  # the best of mup.py
WEIGHTS = (0.0, 0.3)
ROWS = 128  # held-out windows asked for acceptance
HARM = 0.005  # of the main loss: beyond this it counts as harmed or helped


@dataclass(frozen=True)
class Draft:
    """What the layer is worth on held-out text."""

    loss: float  # nats a byte, of the byte after the next
    accepted: float  # share of guesses that greedy verification accepts
    prior: float  # the same for the main model's most frequent choice
    guesses: int


@dataclass(frozen=True)
class Run:
    """One training."""

    weight: float  # of the MTP loss; 0: no layer
    seed: int
    loss: float  # held out, next byte, nats
    draft: Draft | None


def shape(weight: float) -> ModelConfig:
    """Without weight there is no layer either."""
    return replace(small.shape(WIDTH), mtp_layers=int(weight > 0))


@torch.no_grad()
def measure(model: Transformer, cfg: PretrainConfig, rows: int = ROWS) -> Draft:
    """The layer's guesses on windows spread over the held-out text."""
    packed = open_data(cfg.data, cfg.model.vocab_size)
    windows = Windows(packed, "heldout", cfg.seq_len)
    rows = min(rows, len(windows))
    batch = windows.stack([number * len(windows) // rows for number in range(rows)])
    inputs = model_batch(batch)
    hidden = model(inputs)
    further = model.predict_further(hidden, batch.tokens[:, 1:], inputs)
    targets = shifted_targets(batch, 2)
    # The guess at i and the main model's choice at i + 1 are about the same byte.
    counts = targets[:, :-1] != IGNORE
    choice = model.logits(hidden).argmax(-1)[:, 1:][counts]
    guess = further.argmax(-1)[:, :-1][counts]
    prior = choice.bincount().max() / len(choice)
    accepted = (guess == choice).float().mean()
    return Draft(cross_entropy(further, targets).item(), accepted.item(), prior.item(), len(guess))


def run(work: Path, steps: int, seeds: int) -> tuple[list[Run], dict[tuple[float, int], Records]]:
    """Every run, and its metrics."""
    runs, curves, progress = [], {}, Progress()
    for seed in range(seeds):
        for weight in WEIGHTS:
            base = small.config(work, shape(weight), steps, RATE, decay=steps // 5, seed=seed)
            cfg = replace(base, loss=LossConfig(mtp_weight=weight))
            name = f"weight-{weight:g}-seed-{seed}"
            folder = work / f"steps-{steps}" / name
            curves[weight, seed], loss = small.run(cfg, folder, name, progress)
            model = Transformer(cfg.model)
            load_model(model, read_checkpoint(folder / "checkpoints" / f"step_{steps}"))
            draft = measure(model.eval(), cfg) if weight else None
            runs.append(Run(weight, seed, loss, draft))
    return runs, curves


def gaps(runs: list[Run]) -> list[float]:
    """Per seed, how far the main loss with MTP is from the one without it."""
    losses = {(one.weight, one.seed): one.loss for one in runs}
    without, weight = WEIGHTS
    return [losses[weight, s] / losses[without, s] - 1 for w, s in sorted(losses) if w == weight]


def verdict(runs: list[Run]) -> str:
    """Harm or help to the main loss, and what the draft is worth."""
    each = gaps(runs)
    mean = statistics.mean(each)
    said = "harms" if mean > HARM else "helps" if mean < -HARM else "leaves as it is"
    drafts = [one.draft for one in runs if one.draft]
    accepted = statistics.mean(draft.accepted for draft in drafts)
    prior = statistics.mean(draft.prior for draft in drafts)
    return (
        f"at equal tokens MTP {said} the main loss ({mean:+.2%}, seeds {min(each):+.2%} to "
        f"{max(each):+.2%}); its first guess is accepted {accepted:.0%} of the time (prior "
        f"{prior:.0%}): the claim {'did not hold' if said == 'harms' else 'held'}"
    )


def table(runs: list[Run]) -> str:
    """One line per run."""
    lines = [f"{'weight':>6} {'seed':>4} {'loss':>8} {'MTP loss':>9} {'accepted':>9} {'prior':>6}"]
    for one in sorted(runs, key=lambda one: (one.seed, one.weight)):
        line = f"{one.weight:>6g} {one.seed:>4} {one.loss:>8.4f}"
        if one.draft:
            line += f" {one.draft.loss:>9.4f} {one.draft.accepted:>9.1%} {one.draft.prior:>6.1%}"
        lines.append(line)
    return "\n".join(lines)


def plot(curves: dict[tuple[float, int], Records], note: str) -> Any:
    """Main loss over steps, with and without; the layer's own beside it."""
    from endside.train.plot import series, smooth

    figure, (axes,) = small.picture(xlabel="step", ylabel="training loss, nats a byte")
    lines = [("loss", 0.0, "C1", "without MTP"), ("loss", 0.3, "C0", "with MTP")]
    for key, weight, color, name in [*lines, ("mtp_loss", 0.3, "C2", "of the MTP layer")]:
        for (own, seed), records in curves.items():
            if own == weight:
                steps, losses = series(records, key)
                label = name if seed == 0 else None
                axes.plot(steps, smooth(losses), color=color, linewidth=1, label=label)
    axes.set_ylim(top=3.5)
    axes.legend()
    axes.set_title(note, fontsize=9)
    return figure


def main() -> None:
    """Train, print, draw."""
    parser = small.arguments(__doc__, "mtp")
    parser.add_argument("--steps", type=int, default=500, help="of every run")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    runs, curves = run(given.work, given.steps, given.seeds)
    said, more = (table(runs), verdict(runs)), f", {given.seeds} seeds"
    small.report(given, shape(0), runs, said, lambda note: plot(curves, note), more=more)


if __name__ == "__main__":
    main()
