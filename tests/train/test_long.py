"""The long stage: weights of a dense run, sparse attention, stretched positions, rows by length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from endside.data.document import Document
from endside.data.loader import TokenBatch
from endside.data.pack import PackConfig, byte_encoder, pack
from endside.log import read_metrics
from endside.model.transformer import Transformer
from endside.ops.rope.frequencies import extend_longrope
from endside.train import pretrain
from endside.train.losses import LossConfig, next_token
from endside.train.pretrain import PretrainConfig
from endside.train.run_folder import RunFolder
from endside.train.sparsity import visible_share

RUNS = Path(__file__).resolve().parents[2] / "runs"


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with documents of 100 to 3000 bytes."""
    folder = tmp_path_factory.mktemp("long") / "shards"
    documents = [
        Document(f"d{i}", " ".join(str(n * n) for n in range(i, i + 20 + 70 * (i % 8))), "test")
        for i in range(48)
    ]
    pack(documents, folder, byte_encoder(), PackConfig(heldout_share=0.2))
    return folder


def base(texts: Path, folder: Path, steps: int = 2) -> Path:
    """A checkpoint of runs/tiny.toml, cut short."""
    cfg = pretrain.read_config(
        RUNS / "tiny.toml",
        [f"data.shards={texts}", "data.corpus=", f"steps={steps}", "schedule.warmup=1",
         "schedule.decay=0", "seq_len=64", "batch=4", "threads=1", "eval_rows=1"],
    )  # fmt: skip
    with RunFolder(folder) as run:
        pretrain.main(cfg, run)
    return folder / "checkpoints" / f"step_{steps}"


def long_stage(texts: Path, start: Path, *changes: str) -> PretrainConfig:
    """runs/long.toml from that checkpoint, a few steps."""
    return pretrain.read_config(
        RUNS / "long.toml",
        [f"data.shards={texts}", "data.corpus=", f"init_from={start}", "steps=3", "batch=1",
         "schedule.warmup=1", "threads=1", "eval_every=0", "eval_rows=1", *changes],
    )  # fmt: skip


def test_the_example_runs_sparse_from_dense_weights(
    texts: Path, tmp_path: Path, open_run: Callable[..., RunFolder]
) -> None:
    start = base(texts, tmp_path / "base")
    cfg, run = long_stage(texts, start), open_run("long")
    model = pretrain.main(cfg, run)
    records = [r for r in read_metrics(run.path / "metrics.jsonl") if "loss" in r]
    assert [r["step"] for r in records] == [1, 2, 3]
    visible = [r["visible"] for r in records]
    print(f"visible share of the keys at each step: {visible}")
    assert min(visible) < 0.5, "rows of the long band are sparse"
    assert max(visible) > 0.9, "rows of the short band are as good as dense"
    assert model.config.sparse is not None
    assert model.config.max_position_embeddings == 2048
    saved = {p.name for p in run.latest().folder.iterdir()}
    assert saved == {p.name for p in start.iterdir()}, "no new kind of state"


def test_short_texts_stay_dense_and_long_ones_do_not(texts: Path, tmp_path: Path) -> None:
    cfg = long_stage(texts, base(texts, tmp_path / "base"))
    sparse = pretrain.make_model(cfg)
    dense = Transformer(replace(cfg.model, sparse=None))
    dense.load_state_dict(sparse.state_dict())
    tokens = torch.randint(0, 256, (1, 2049), generator=torch.Generator().manual_seed(1))
    one = torch.zeros_like(tokens)
    several = torch.arange(2049)[None] // 205
    results = {}
    for name, owners in (("one", one), ("several", several)):
        batch = TokenBatch(tokens, owners)
        share = visible_share(owners[:, :-1], cfg.model.sparse)
        losses = [float(next_token(LossConfig())(m, batch).loss.detach()) for m in (sparse, dense)]
        results[name] = (share, *losses)
        print(
            f"{name}: visible share {share:.2f}, loss sparse {losses[0]:.5f} dense {losses[1]:.5f}"
        )
    share, ours, theirs = results["several"]
    assert share == 1.0
    assert ours == pytest.approx(theirs, abs=1e-6)
    share, ours, theirs = results["one"]
    assert share < 0.5
    assert ours != pytest.approx(theirs, abs=1e-6)


def test_the_stretched_factors_are_the_published_rule_and_act(texts: Path, tmp_path: Path) -> None:
    start = base(texts, tmp_path / "base")
    cfg = long_stage(texts, start)
    rope = cfg.model.rope
    assert rope.long_factor == pytest.approx(
        extend_longrope(rope.short_factor, 4, original=rope.original), abs=1e-3
    )
    stretched = pretrain.make_model(cfg)
    plain = pretrain.make_model(replace(cfg, model=replace(cfg.model, rope=replace(
        rope, long_factor=rope.short_factor))))  # fmt: skip
    places = torch.arange(0, 2048, 97)[None]
    assert torch.equal(stretched.rope(places)[0][0, 0], plain.rope(places)[0][0, 0])
    assert not torch.equal(stretched.rope(places)[0], plain.rope(places)[0])
    # amplitude 1: cos^2 + sin^2 is 1 although 2048 is more than the original 512
    cos, sin = stretched.rope(places)
    torch.testing.assert_close(cos.square() + sin.square(), torch.ones_like(cos))
