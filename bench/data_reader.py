"""How fast the reader alone is, and how much of a training step waits for it.

    python bench/data_reader.py [--steps 12]

Shards are packed from this Python's own library. Printed for windows, for a mixture of two sources
and for rows by length of document: tokens/s of the reader alone, then of training steps of a small
model fed by it, each step waiting for its batch ("direct") or finding it made ahead ("ahead"), and
which share of the steps' time was spent waiting. For rows by length also the share of padding.
Writes bench/results/data_reader.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.attend_cpu import machine
from endside.data import corpus
from endside.data.bands import Band, Bands
from endside.data.loader import Loader, LoaderConfig, Source
from endside.data.pack import Packed, byte_encoder, open_packed, pack
from endside.data.prefetch import Prefetch, Reader
from endside.model.presets import preset
from endside.model.transformer import Transformer
from endside.train.losses import LossConfig, next_token

HERE = Path(__file__).resolve().parent
LENGTH, BATCH = 1024, 4
BANDS = (Band(512, 0.25), Band(1024, 0.75))
DOCUMENTS = 400  # of the library's sources, in each of the two folders


def main() -> None:
    """Pack, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12, help="timed training steps of each kind")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=HERE / "results" / "data_reader.json")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    with tempfile.TemporaryDirectory() as scratch:
        first, second = packed(Path(scratch))
        mixture = [Source(first, 0.7), Source(second, 0.3)]
        config = LoaderConfig(BATCH, LENGTH, 0)
        makers: dict[str, Callable[[], Reader]] = {
            "windows": lambda: Loader(first, config),
            "mixture": lambda: Loader(mixture, config),
            "bands": lambda: Bands(mixture, BANDS, tokens=BATCH * LENGTH, seed=0),
        }
        report = {name: measured(make, flags.steps) for name, make in makers.items()}
        padding = Bands(mixture, BANDS, tokens=BATCH * LENGTH, seed=0).padding
    report["bands"]["padding"] = {
        str(band.length): round(share, 4) for band, share in zip(BANDS, padding, strict=True)
    }
    print(f"{'':<10}{'reader tok/s':>14}{'direct':>10}{'waits':>8}{'ahead':>10}{'waits':>8}")
    for name, row in report.items():
        print(
            f"{name:<10}{row['reader_tokens_per_s']:>14,.0f}"
            + "".join(
                f"{row[way]['tokens_per_s']:>10,.0f}{row[way]['waiting']:>8.2%}"
                for way in ("direct", "ahead")
            )
        )
    print("padding by band:", report["bands"]["padding"])
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    flags.out.write_text(
        json.dumps({"machine": machine(), **report}, indent=1) + "\n", encoding="utf-8"
    )


def packed(folder: Path) -> list[Packed]:
    """Two folders of shards from the library's sources."""
    documents = corpus.standard_library(("source",))
    for name in ("first", "second"):
        pack(islice(documents, DOCUMENTS), folder / name, byte_encoder())
    return [open_packed(folder / name) for name in ("first", "second")]


def measured(make: Callable[[], Reader], steps: int) -> dict:
    """Tokens/s of a reader alone and of steps fed by it; what share of these waits for it."""
    reader, begun, tokens = make(), time.perf_counter(), 0
    while time.perf_counter() - begun < 1.0:
        tokens += next(reader).tokens.numel()
    alone = tokens / (time.perf_counter() - begun)
    direct = trained(make(), steps)
    with Prefetch(make()) as ahead:
        return {
            "reader_tokens_per_s": round(alone), "direct": direct, "ahead": trained(ahead, steps),
        }  # fmt: skip


def trained(batches: Iterator, steps: int) -> dict[str, float]:
    """Steps of a small model; the first is not timed."""
    torch.manual_seed(0)
    shape = replace(
        preset("tiny"), hidden_size=256, intermediate_size=512, num_attention_heads=16,
        max_position_embeddings=LENGTH,
    )  # fmt: skip
    model = Transformer(shape)
    model.init_weights(torch.Generator().manual_seed(0))
    optimizer, loss_fn = torch.optim.AdamW(model.parameters()), next_token(LossConfig())
    begun = waited = 0.0
    tokens = 0
    for step in range(steps + 1):
        if step == 1:
            begun, waited, tokens = time.perf_counter(), 0.0, 0
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        optimizer.zero_grad(set_to_none=True)
        loss = loss_fn(model, batch)
        (loss.total / loss.targets).backward()
        optimizer.step()
        tokens += batch.tokens.numel()
    spent = time.perf_counter() - begun
    return {"tokens_per_s": round(tokens / spent), "waiting": round(waited / spent, 5)}


if __name__ == "__main__":
    main()
