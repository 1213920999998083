"""What do the bits that the CPU engine rounds to at load cost, the output head's apart?

    python reproduce/bits.py                  train, then measure twelve settings: results/bits.*
    python reproduce/bits.py --minutes 3      less training; the run folder resumes

`endside run MODEL --quant int4` rounds the linears of the blocks to the nearest code, in groups of
128, and the output head to what `--head` says (by itself: as the blocks). This is that very path:
the native executor reads a trained model of the demo's shape in each setting and gives the logits
of held-out rows, with its activations rounded to 8 bits and its cache in 16 as in any run.

    increase   of perplexity over the same engine with float weights
    KL         mean divergence of the next-token distribution from that engine's, nats a token
    same       share of positions whose likeliest token is the same

A tied embedding is not rounded: only the head's copy is.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from endside.engine.executor import Executor
from endside.engine.executors import Plan, create
from endside.formats import hf
from endside.log import Progress
from endside.models import open_model
from reproduce.pgptq import Training, packed_text, rows, steps_that_fit, trained, with_steps
from reproduce.small import RESULTS, finish, picture

ROWS = 64
BLOCKS = ("none", "int8", "int4")
HEADS = ("none", "int8", "int4")
CACHES = ("f16", "bf16", "int8")


@dataclass(frozen=True)
class Row:
    """One setting against float weights and an f16 cache."""

    blocks: str
    head: str
    cache: str
    perplexity: float
    increase: float
    apart: float
    same: float


def log_probabilities(executor: Executor, tokens: np.ndarray) -> np.ndarray:
    """Rows of tokens (B, T) -> log probabilities of every next token (B, T, V), float32."""
    out = []
    for one in tokens:
        seq = executor.open(len(one))
        logits = executor.prefill(seq, one, logits="all")
        executor.close(seq)
        top = logits.max(-1, keepdims=True)
        out.append(logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True)))
    return np.stack(out)


def setting(folder: Path, tokens: np.ndarray, blocks: str, head: str, cache: str) -> np.ndarray:
    """What the native engine says of `tokens` (B, T) in one setting (B, T - 1, V)."""
    plan = Plan(
        executor="native", quant=blocks, head=head, kv=cache, context=tokens.shape[1],
        attention="dense", draft="none",
    )  # fmt: skip
    return log_probabilities(create(open_model(folder), plan), tokens[:, :-1])


def perplexity(said: np.ndarray, tokens: np.ndarray) -> float:
    """Of the tokens (B, T) that came, by log probabilities (B, T - 1, V)."""
    chosen = np.take_along_axis(said, tokens[:, 1:, None], -1)
    return float(np.exp(-chosen.mean(dtype=np.float64)))


def measure(folder: Path, tokens: np.ndarray) -> list[Row]:
    """Every setting; the first is what the others are compared with."""
    plain = setting(folder, tokens, "none", "none", "f16")
    base, likeliest = perplexity(plain, tokens), plain.argmax(-1)
    settings = [(blocks, head, "f16") for blocks in BLOCKS for head in HEADS]
    settings += [("none", "none", cache) for cache in CACHES[1:]] + [("int4", "int4", "int8")]
    made = []
    for blocks, head, cache in settings:
        said = setting(folder, tokens, blocks, head, cache)
        apart = (np.exp(plain) * (plain - said)).sum(-1).mean(dtype=np.float64)
        now, same = perplexity(said, tokens), (said.argmax(-1) == likeliest).mean()
        made.append(Row(blocks, head, cache, now, now / base - 1, float(apart), float(same)))
    return made


def table(made: list[Row]) -> str:
    """The rows as text."""
    names = ("blocks", "head", "cache", "perplexity", "increase", "KL, 1e-3", "same")
    lines = ["{:<7} {:<5} {:<6} {:>10} {:>9} {:>9} {:>7}".format(*names)]
    lines += [
        f"{row.blocks:<7} {row.head:<5} {row.cache:<6} {row.perplexity:>10.3f} "
        f"{row.increase:>+9.2%} {1e3 * row.apart:>9.3f} {row.same:>7.1%}"
        for row in made
    ]
    return "\n".join(lines)


def main() -> None:
    """Train, measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=6.0, help="of training")
    parser.add_argument("--steps", type=int, help="of training, instead of minutes")
    parser.add_argument("--work", type=Path, default=Path("runs/pgptq"), help="tokens, training")
    parser.add_argument("--out", type=Path, default=RESULTS / "bits.json", help="PNG beside it")
    flags = parser.parse_args()
    packed, cfg = packed_text(flags.work), Training()
    cfg = (
        with_steps(cfg, flags.steps)
        if flags.steps
        else steps_that_fit(cfg, packed, flags.work, flags.minutes)
    )
    model = trained(cfg, packed, flags.work)
    folder = hf.save(model, flags.work / "as-trained", overwrite=True)
    made = measure(folder, rows(packed, "heldout", ROWS, cfg.seq_len + 1, 0).numpy())
    print(table(made))
    figure, (panel,) = picture(ylabel="KL to float weights, 1e-3 nats a token")
    names = [f"{row.blocks}\n{row.head}\n{row.cache}" for row in made]
    panel.bar(range(len(made)), [1e3 * row.apart for row in made])
    panel.set_xticks(range(len(made)), names, fontsize=7)
    panel.set_title("blocks, head, cache", fontsize=10)
    count = sum(parameter.numel() for parameter in model.parameters())
    result = {"parameters": count, "training": asdict(cfg), "rows": [asdict(row) for row in made]}
    Progress().note(f"{count:,} parameters, {ROWS} rows of {cfg.seq_len} tokens")
    finish(flags.out, result, figure)


if __name__ == "__main__":
    main()
