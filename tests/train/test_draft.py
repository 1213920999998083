"""Training draft heads: they learn to be accepted, what is measured is what runs, runs resume."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from endside import native
from endside.checkpoint import Checkpoint
from endside.data.loader import Windows
from endside.data.pack import open_packed
from endside.engine.drafts.eagle import HeadDrafter
from endside.engine.drafts.head import Head
from endside.engine.executors.torch import TorchExecutor
from endside.errors import UserError
from endside.formats import draft_head, draft_soft
from endside.formats.draft_soft import SoftTokens
from endside.log import read_metrics
from endside.model.draft import KINDS
from endside.model.transformer import Transformer
from endside.native.packed import pack
from endside.train import bita, draft, pretrain
from endside.train.draft import DraftConfig
from endside.train.optim import OptimConfig
from endside.train.pretrain import PretrainConfig
from endside.train.schedule import ScheduleConfig


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Transformer:
    """A model that has learnt how words are spelled, and so repeats itself."""
    from endside.data.source import DataConfig
    from endside.model.presets import preset
    from endside.train.run_folder import RunFolder

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6}
    chosen = PretrainConfig(
        model=replace(preset("tiny"), **sizes, tie_word_embeddings=True),
        data=DataConfig(str(shards)), steps=120, batch=8, seq_len=48, seed=3, threads=1,
        eval_rows=4, schedule=ScheduleConfig(warmup=10), optim=OptimConfig(learning_rate=0.01),
    )  # fmt: skip
    with RunFolder(tmp_path_factory.mktemp("target") / "run") as run:
        return pretrain.main(chosen, run)


def chosen(**changes: Any) -> DraftConfig:
    values = {
        "model": "target", "steps": 60, "unroll": 3, "batch": 8, "seq_len": 40, "seed": 7,
        "threads": 1, "eval_every": 20, "eval_rows": 12,
        "schedule": ScheduleConfig(warmup=4, decay=20),
        "optim": OptimConfig(learning_rate=0.01),
    }  # fmt: skip
    return DraftConfig(**{**values, **changes})


def running(head: draft_head.DraftHead, model: Transformer, bits: str) -> Head:
    table = model.embed_tokens.weight.detach().numpy()
    scale = np.float32(model.config.scale_emb)
    return Head(
        head, model.config, embed=lambda ids: table[ids] * scale, rows=lambda ids: table[ids],
        context=model.config.max_position_embeddings, bits=bits,
    )  # fmt: skip


def lengths(run_path: Path) -> list[float]:
    records = read_metrics(run_path / "metrics.jsonl")
    return [one["accepted_length"] for one in records if "accepted_length" in one]


@torch.no_grad()
def drafted_length(head: Head, model: Transformer, shards: Path, cfg: DraftConfig) -> float:
    """Tokens a pass when a `HeadDrafter` guesses chains behind every place of the held-out text."""
    windows = Windows(open_packed(shards), "heldout", cfg.seq_len)
    looked_at = min(cfg.eval_rows, len(windows))
    kept = roots = 0
    for number in [one * len(windows) // looked_at for one in range(looked_at)]:
        batch = windows.stack([number])
        text, owners = batch.tokens[0].numpy(), batch.documents[0].numpy()
        given = draft.teach(model, batch, cfg.kind)[0].features[0].numpy()
        drafter = HeadDrafter(head, depth=cfg.unroll, width=1)
        for at in range(len(text) - 1 - cfg.unroll):
            if at and owners[at] != owners[at - 1]:
                drafter = HeadDrafter(head, depth=cfg.unroll, width=1)
            drafter.accepted(text[at : at + 1], given[at : at + 1])
            tree = drafter.propose(text[: at + 2], cfg.unroll)
            said = text[at + 2 : at + 2 + cfg.unroll]
            kept += int(np.cumprod(tree.tokens == said).sum())
            roots += 1
    return 1 + kept / roots


@pytest.mark.parametrize("kind", KINDS)
def test_heads_learn_and_run_as_they_were_measured(
    kind: str, target: Transformer, shards: Path, open_run: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("endside.engine.drafts.head.native.load", lambda: None)
    cfg = chosen(kind=kind)
    with open_run(kind) as run:
        folder = draft.train(cfg, target, open_packed(shards), run)
        measured = lengths(run.path)
    assert measured[-1] > 2 and measured[-1] > measured[0] + 0.1, measured
    head = running(draft_head.read(Checkpoint.open(folder)), target, "float")
    assert head.kind == kind
    assert drafted_length(head, target, shards, cfg) == pytest.approx(measured[-1], abs=0.03)


def test_a_head_of_frequent_tokens_names_them(
    target: Transformer, shards: Path, open_run: Callable[..., Any], tmp_path: Path
) -> None:
    """FR-Spec and eagle3's own head, cut while training; the tokens left out are never guessed."""
    text = np.concatenate(open_packed(shards).tokens("train"))
    order = np.argsort(-np.bincount(text, minlength=257), kind="stable")
    (tmp_path / "f.npy").write_bytes(draft_head.ranking_bytes(order))
    packed = open_packed(shards)
    for kind, keep, count in (("eagle3", 12, 12), ("eagle2", 0, 257)):
        cfg = chosen(kind=kind, ranking=str(tmp_path / "f.npy"), keep=keep, steps=30)
        with open_run(f"{kind}-cut") as run:
            folder = draft.train(cfg, target, packed, run)
            assert lengths(run.path)[-1] > 1.3
        head = draft_head.read(Checkpoint.open(folder))
        assert head.ids is not None and len(head.ids) == count
        np.testing.assert_array_equal(head.ids, np.sort(order[:count]))


def test_int4_heads_are_trained_as_they_are_stored(
    target: Transformer, shards: Path, open_run: Callable[..., Any]
) -> None:
    cfg = chosen(bits="int4", group=64)
    with open_run("int4") as run:
        folder = draft.train(cfg, target, open_packed(shards), run)
        measured = lengths(run.path)
    stored = draft_head.read(Checkpoint.open(folder))
    assert (stored.bits, stored.group) == ("int4", 64)
    for name in ("fc", "layers.0.self_attn.q_proj", "layers.0.mlp.up_proj"):
        weight = stored.tensors[f"{name}.weight"]
        assert max(len(np.unique(one)) for one in weight.reshape(-1, 64)) <= 15, "not in 4 bits"
        if native.available_isas():  # what the native core packs of it is the same matrix again
            np.testing.assert_array_equal(pack(weight, "int4", group=64).unpack(), weight)
    found = drafted_length(running(stored, target, "int4"), target, shards, cfg)
    # The model's own head is rounded too, and was not trained so.
    assert found == pytest.approx(measured[-1], abs=0.15) and found > 1.9


def test_a_torn_run_goes_on_to_the_same_head(
    target: Transformer, shards: Path, open_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, cfg = (
        open_packed(shards),
        chosen(
            steps=12, eval_every=6, checkpoint_every=4, schedule=ScheduleConfig(warmup=4, decay=4)
        ),
    )
    with open_run("whole") as run:
        whole = Checkpoint.open(draft.train(cfg, target, packed, run))
    teach, calls = draft.teach, []

    def dies(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return teach(*given)

    with open_run("torn") as run:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(draft, "teach", dies)
            draft.train(cfg, target, packed, run)
        torn = Checkpoint.open(draft.train(cfg, target, packed, run))
    for name in whole.names():
        np.testing.assert_array_equal(whole.numpy(name), torn.numpy(name), err_msg=name)


def test_bad_wishes_are_refused(
    target: Transformer, shards: Path, open_run: Callable[..., Any], tmp_path: Path
) -> None:
    for wrong, message in [
        ({"steps": 0}, "steps is 0"),
        ({"bits": "int4", "group": 48}, "group is 48"),
        ({"seq_len": 4}, "leaves no guess of 3 steps"),
        ({"keep": 5}, "keep cuts eagle3"),
        ({"kind": "bita", "bits": "int4"}, "no head to cut or round"),
        ({"kind": "bita", "prompts": -1}, "prompts -1 and unroll 3"),
        ({"kind": "bita", "prompts": 61}, "at most 63 soft tokens"),
    ]:
        with pytest.raises(UserError, match=message):
            chosen(**wrong)
    shallow = Transformer(replace(target.config, num_hidden_layers=4))
    small = Transformer(replace(target.config, vocab_size=200))
    packed = open_packed(shards)
    with open_run("refused") as run:
        with pytest.raises(UserError, match="at least 6 are needed"):
            draft.train(chosen(kind="eagle3"), shallow, packed, run)
        with pytest.raises(UserError, match="vocabulary of 257, the model target has 200"):
            draft.train(chosen(), small, packed, run)
        (tmp_path / "f.npy").write_bytes(draft_head.ranking_bytes(np.arange(9)))
        cut = chosen(kind="eagle3", ranking=str(tmp_path / "f.npy"), keep=10)
        with pytest.raises(UserError, match="ranks 9 tokens"):
            draft.train(cut, target, packed, run)


def test_soft_tokens_learn_and_run_as_they_were_measured(
    target: Transformer, shards: Path, open_run: Callable[..., Any]
) -> None:
    """The frozen model guesses ahead; asked through an executor it says what was measured."""
    before = [one.clone() for one in target.parameters()]
    cfg = chosen(kind="bita", optim=OptimConfig(learning_rate=0.3))
    with open_run("bita") as run:
        folder = draft.train(cfg, target, open_packed(shards), run)
        measured = lengths(run.path)
        losses = [one["loss_1"] for one in read_metrics(run.path / "metrics.jsonl")
                  if "loss_1" in one]  # fmt: skip
    assert measured[-1] > 1.2 and losses[-1] < losses[0] / 3, (measured, losses)
    assert all(torch.equal(old, new) for old, new in zip(before, target.parameters(), strict=True))
    soft = draft_soft.read(Checkpoint.open(folder))
    assert (soft.prompts, soft.masks) == (1, 3)
    executor = TorchExecutor(target, context=256)
    executor.set_inputs(soft.rows)
    windows = Windows(open_packed(shards), "heldout", cfg.seq_len)
    looked_at = min(cfg.eval_rows, len(windows))
    kept = roots = 0
    for start in range(0, looked_at, cfg.batch):
        numbers = [one * len(windows) // looked_at for one in range(looked_at)]
        batch = windows.stack(numbers[start : start + cfg.batch])
        places = bita.ask(bita.make(cfg, target), target, batch).places.tolist()
        for text, owners in zip(batch.tokens.numpy(), batch.documents.numpy(), strict=True):
            for place in places:
                first = place - int((owners[:place] == owners[place]).sum())
                kept += _right(executor, text[first:], place - first, soft)
                roots += 1
    assert 1 + kept / roots == pytest.approx(measured[-1], abs=0.03)


def _right(executor: TorchExecutor, text: np.ndarray, place: int, soft: SoftTokens) -> int:
    """How many masks behind the token at `place` guess the text's own tokens, in a row."""
    seq = executor.open(len(text) + len(soft.rows))
    if place:
        executor.prefill(seq, text[:place], logits="none")
    chain = [text[place], *range(executor.vocab_size, executor.vocab_size + len(soft.rows))]
    logits = executor.verify(seq, np.array(chain), np.arange(len(chain), dtype=np.int32) - 1)
    executor.close(seq)
    guessed = logits[1 + soft.prompts :].argmax(1)
    return int(np.cumprod(guessed == text[place + 2 : place + 2 + soft.masks]).sum())
