"""One stable run, annealed from several points, against a cosine run for each length.

    python reproduce/wsd.py                  about 4 minutes on one core
    python reproduce/wsd.py --unit 400       every run longer

The claim (MiniCPM, arXiv 2404.06395, section 4): the WSD schedule reaches, with a short decay from
any point of one stable run, the loss of a cosine schedule made for exactly that length, so that no
length has to be chosen in advance. For each length the cosine run starts anew and its rate is
tuned: the better of the stable run's and twice that, because a cosine's mean rate is about half its
peak. The WSD side is tuned no further than the one rate of the stable run. Decays are the last 10 %
and 20 % of the length. Same data in the same order, same seed, held-out loss in the end.

A WSD length costs its decay only; what all lengths cost together is counted and printed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from endside.log import Progress
from endside.train.schedule import ScheduleConfig
from reproduce import small
from reproduce.small import Records

WIDTH = 128
RATE = 2.0**-7  # of the stable run: the best of mup.py
COSINE_RATES = (RATE / 2, RATE, 2 * RATE)
DECAYS = (0.1, 0.2)  # of the length
MULTIPLES = (2, 4, 6)  # lengths, in units
CLOSE = 0.01  # of the cosine's loss


@dataclass(frozen=True)
class End:
    """The end of one run."""

    name: str  # "cosine", "WSD 10%", "stable"
    steps: int
    rate: float
    loss: float  # held out, nats a byte
    cost: int  # steps spent for this line alone


def run(work: Path, unit: int, seed: int = 0) -> tuple[list[End], dict[str, Records]]:
    """All ends, and the metrics of every run."""
    progress, ends, curves = Progress(), [], {}
    where = work / f"unit-{unit}-seed-{seed}"
    model = small.shape(WIDTH)
    lengths = [unit * multiple for multiple in MULTIPLES]
    warmup = max(1, unit // 5)

    def one(name: str, cfg: Any, steps: int, cost: int) -> None:
        label = f"{name} {steps}"
        if name == "cosine":
            label += f" {cfg.optim.learning_rate:.4f}"
        curves[label] = small.train(cfg, where / label.replace(" ", "-").replace("%", ""))
        loss = small.heldout(curves[label])
        ends.append(End(name, steps, cfg.optim.learning_rate, loss, cost))
        progress.note(f"{label}: {loss:.4f}")

    longest = lengths[-1]
    base = small.config(work, model, longest, RATE, seed=seed)
    stable = replace(
        base, checkpoint_every=unit // 5, schedule=ScheduleConfig(warmup=warmup),
        steps=longest - round(min(DECAYS) * longest),
    )  # fmt: skip
    folder = where / "stable"
    curves["stable"] = small.train(stable, folder, keep=1000)
    ends.append(End("stable", stable.steps, RATE, small.heldout(curves["stable"]), stable.steps))
    for steps in lengths:
        for share in DECAYS:
            decay = round(share * steps)
            start = folder / "checkpoints" / f"step_{steps - decay}"
            one(f"WSD {share:.0%}", small.branch(stable, start, decay), steps, decay)
        for rate in COSINE_RATES:
            schedule = ScheduleConfig(warmup=warmup, decay=steps - warmup, shape="cosine")
            optim = replace(base.optim, learning_rate=rate)
            one("cosine", replace(base, steps=steps, schedule=schedule, optim=optim), steps, steps)
    return ends, curves


def pairs(ends: list[End]) -> list[tuple[End, End]]:
    """For each length the best WSD and the best cosine end."""
    lengths = sorted({end.steps for end in ends if end.name == "cosine"})
    return [
        tuple(
            min((e for e in ends if e.steps == n and e.name.startswith(kind)), key=lambda e: e.loss)
            for kind in ("WSD", "cosine")
        )
        for n in lengths
    ]  # type: ignore[return-value]


def verdict(ends: list[End]) -> str:
    """Whether the claim held, and what each side cost."""
    gaps = {cosine.steps: wsd.loss / cosine.loss - 1 for wsd, cosine in pairs(ends)}
    held = "held" if max(gaps.values()) <= CLOSE else "did not hold"
    said = ", ".join(f"{gap:+.2%} at {steps} steps" for steps, gap in gaps.items())
    tried = [end.rate for end in ends if end.name == "cosine"]
    ended = [cosine.steps for _, cosine in pairs(ends) if cosine.rate in (min(tried), max(tried))]
    edge = f" (cosine is best at the edge of its rates at {ended} steps)" if ended else ""
    branched = sum(e.cost for e in ends if e.name != "cosine")
    anew = sum(e.cost for e in ends if e.name == "cosine")
    return (
        f"WSD against a cosine tuned to its length: {said}; the claim (at most {CLOSE:.0%} worse) "
        f"{held}{edge}. Steps of all lengths: {branched} branched, {anew} with cosine"
    )


def table(ends: list[End]) -> str:
    """Every end, shortest first."""
    best = {cosine.steps: cosine.loss for _, cosine in pairs(ends)}
    lines = [f"{'steps':>6} {'run':<10} {'rate':>8} {'cost':>6} {'loss':>8} {'against cosine':>15}"]
    for end in sorted(ends, key=lambda end: (end.steps, end.name, end.rate)):
        gap = f"{end.loss / best[end.steps] - 1:>+15.2%}" if end.steps in best else ""
        lines.append(
            f"{end.steps:>6} {end.name:<10} {end.rate:>8.4f} {end.cost:>6} {end.loss:>8.4f} {gap}"
        )
    return "\n".join(lines)


def plot(ends: list[End], curves: dict[str, Records], note: str) -> Any:
    """The stable loss with its branches, and the ends of both schedules over the length."""
    from endside.train.plot import series, smooth

    figure, (left, right) = small.picture(2, xlabel="step", ylabel="loss, nats a byte")
    for label, records in curves.items():
        steps, losses = series(records, "loss")
        heavy = label == "stable" or label.startswith("WSD")
        color = "C0" if label == "stable" else "C2" if heavy else "C1"
        left.plot(steps, smooth(losses), color=color, alpha=0.9 if heavy else 0.35, linewidth=1)
    left.set_title("training loss, smoothed: stable, branches, cosines", fontsize=9)
    left.set_ylim(top=3.0)
    names = [*(f"WSD {share:.0%}" for share in DECAYS), "cosine"]
    for name in names:
        row: dict[int, float] = {}
        for end in ends:
            if end.name == name:
                row[end.steps] = min(end.loss, row.get(end.steps, end.loss))
        style = "s--" if name == "cosine" else "o-"
        right.plot(list(row), list(row.values()), style, label=name)
    right.set_title("held out, at the end", fontsize=9)
    right.legend()
    figure.suptitle(note, fontsize=9)
    return figure


def main() -> None:
    """Train, print, draw."""
    parser = small.arguments(__doc__, "wsd")
    parser.add_argument("--unit", type=int, default=150, help="steps; lengths are multiples of it")
    given = parser.parse_args()
    if given.unit < 10 or given.unit % 10:
        raise SystemExit(f"--unit {given.unit}: give a multiple of 10, so that decays are whole")
    ends, curves = run(given.work, given.unit)
    cfg = small.config(given.work, small.shape(WIDTH), given.unit, RATE)
    tokens = cfg.batch * cfg.seq_len
    note = f"width {WIDTH}, two layers, {tokens} bytes of text a step, one seed"
    print(note, table(ends), verdict(ends), sep="\n")
    result = {"unit": given.unit, "tokens_per_step": tokens, "width": WIDTH,
              "verdict": verdict(ends), "ends": [asdict(end) for end in ends]}  # fmt: skip
    small.finish(given.out, result, plot(ends, curves, note))


if __name__ == "__main__":
    main()
