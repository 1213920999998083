"""The training benchmarks on shapes that take no time: what they compare, count and print."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import train_cpu, train_gpu
from endside.model.flops import training_flops
from endside.model.presets import preset
from endside.ops.infllm.config import SparseConfig

TINY = replace(
    train_cpu.SHAPE, vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, intermediate_size=48,
)  # fmt: skip
TASK = train_cpu.Task(shape=TINY, rows=2, length=40, document=9)


def test_batches_depend_on_their_number_and_hold_several_documents() -> None:
    one, other = train_cpu.Packed(TASK), train_cpu.Packed(TASK)
    next(one)
    second = next(one)
    other.restore({"number": 1})
    assert torch.equal(next(other).tokens, second.tokens)
    assert second.tokens.shape == (2, 41) and int(second.documents[:, -1].min()) >= 1
    whole = train_cpu.Packed(replace(TASK, document=0)).at(0)
    assert not whole.documents.any()


def test_our_round_goes_through_the_loop_and_keeps_nothing() -> None:
    model = train_cpu.Transformer(TINY)
    model.init_weights(torch.Generator().manual_seed(0))
    side = train_cpu.Side()
    train_cpu.ours(TASK, model, "float32", side)
    assert len(side.seconds) == TASK.steps and min(side.seconds) > 0
    assert len(side.losses) == TASK.steps + 1


@pytest.mark.parametrize("document", [0, 9])
def test_the_baseline_is_the_same_model_on_the_same_packing(document: int) -> None:
    pytest.importorskip("transformers")
    task = replace(TASK, document=document)
    model = train_cpu.Transformer(TINY)
    model.init_weights(torch.Generator().manual_seed(0))
    llama = train_cpu.peer(task, model)
    batch = train_cpu.Packed(task).at(0)
    with torch.no_grad():
        theirs = llama(**train_cpu.inputs(batch)).loss.item()
    assert theirs == pytest.approx(train_cpu.expected_loss(task, "float32"), abs=1e-5)
    if document:
        apart = train_cpu.inputs(batch) | {"position_ids": torch.arange(40).expand(2, -1)}
        with torch.no_grad():
            assert abs(llama(**apart).loss.item() - theirs) > 1e-5, (
                "documents saw each other anyway"
            )


def test_a_row_compares_in_turn() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    found = train_cpu.row(replace(TASK, rounds=2), "float32")
    assert len(found["ours_s"]) == len(found["trainer_s"]) == 2 * TASK.steps
    low, high = found["ratio_of_rounds"]
    assert low <= high and "packed documents" in train_cpu.line(found)
    assert found["products_alone_s"] > 0


def test_the_products_of_a_step_are_all_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where each size takes one second: seven projections in each of two layers, and the head."""
    ticks = itertools.count()
    monkeypatch.setattr(train_cpu.time, "perf_counter", lambda: float(next(ticks)))
    assert train_cpu.products_alone(TASK, "float32") == 15.0


def test_the_gpu_step_trains_and_counts() -> None:
    """The step of bench/train_gpu.py on a CPU: dense and sparse, loss falling, MFU by hand."""
    sparse = SparseConfig(window_size=64, topk=2, dense_len=-1)
    shape = replace(preset("tiny"), tie_word_embeddings=True)
    both = train_gpu.contenders(shape, 1024, sparse, tokens=1024, device="cpu")
    assert [one.config.sparse for one in both] == [None, sparse]
    first = [one.step() for one in both]
    rows = train_gpu.compare(both, rounds=1, peak=1e9)
    assert all(one.step() < before for one, before in zip(both, first, strict=True))
    dense, hidden = rows
    assert "visible_over_available" not in dense and hidden["visible_over_available"] < 0.5
    speed = dense["tokens_per_s"][1]
    assert dense["mfu"] == pytest.approx(speed * training_flops(both[0].config, 1024) / 1e9)
    assert hidden["operations_per_token"] < dense["operations_per_token"]
    assert "MFU" in train_gpu.line(dense) and "visible" in train_gpu.line(hidden)


def test_the_gpu_budgets_hide_more_than_half() -> None:
    for length, sparse in train_gpu.BUDGETS.items():
        assert train_gpu.attend_stats(length, length, sparse).ratio < 0.5
    with pytest.raises(AssertionError, match="does not act"):
        train_gpu.contenders(preset("tiny"), 512, SparseConfig(dense_len=-1), device="cpu")
