"""The needle experiment's own parts: what it asks, what it counts, what it prints. No training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from endside.model.batch import Batch
from endside.model.presets import preset
from endside.model.transformer import Transformer
from endside.ops.cross_entropy.reference import IGNORE
from endside.ops.infllm.reference import chosen_blocks
from reproduce import needle
from reproduce.needle import NEEDLES, Haystacks, Row, Scale, Task

TASK = Task()
SPARSE = preset("tiny-sparse").sparse
SMALL = Scale(width=32, short=(128,), long=(128, 1600), tokens=1600, dense_steps=2, long_steps=10)


def small_model(sparse=SPARSE) -> Transformer:
    config = replace(needle.shape(SMALL, TASK), sparse=sparse)
    model = Transformer(config)
    model.init_weights(torch.Generator().manual_seed(3))
    return model


def generator(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_token_ids_are_disjoint_and_fill_the_vocabulary():
    keys, values = torch.arange(TASK.keys), torch.arange(TASK.values)
    ids = torch.cat(
        [
            torch.arange(TASK.noise),
            TASK.key(keys),
            TASK.value(values),
            TASK.fact(keys[:, None], values[None]).flatten(),
        ]
    )
    assert torch.equal(ids.sort().values, torch.arange(TASK.vocab))


@pytest.mark.parametrize("length", [129, 256, 1600])
def test_every_question_is_answered_by_its_needle_and_no_other(length):
    count = 3 if length == 129 else NEEDLES
    starts = needle.anywhere(TASK, (5, count), length - 2 * count, generator())
    batch = needle.haystack(TASK, starts, length, generator(6))
    first_fact = TASK.noise + TASK.keys + TASK.values
    assert batch.tokens.shape == batch.targets.shape == (5, length)
    assert (batch.targets != IGNORE).sum() == 5 * count
    assert (batch.tokens >= first_fact).sum() == 5 * count * TASK.repeat, "needles overlap"
    for row in range(5):
        for j in range(count):
            asked = length - 2 * count + 2 * j
            key = batch.tokens[row, asked] - TASK.noise
            value = batch.targets[row, asked] - TASK.noise - TASK.keys
            start = int(batch.starts[row, j])
            said = batch.tokens[row, start : start + TASK.repeat]
            assert (said == TASK.fact(key, value)).all()
            assert batch.tokens[row, asked + 1] == batch.targets[row, asked]
            same_key = (batch.tokens[row] - first_fact).div(
                TASK.values, rounding_mode="floor"
            ) == key
            assert same_key.sum() == TASK.repeat, "another needle has the same key"


@pytest.mark.parametrize("length", [256, 1024, 2560])
def test_depths_cover_the_text_and_needles_do_not_overlap(length):
    starts, order = needle.at_depths(TASK, 40, length, generator())
    last = length - 2 * NEEDLES - TASK.repeat
    assert starts.min() >= 0 and starts.max() <= last
    assert (starts.sort(1).values.diff(dim=1) >= TASK.repeat).all()
    wanted = order * last / (NEEDLES - 1)
    assert (starts - wanted).abs().max() <= 33
    assert (order.sort(1).values == torch.arange(NEEDLES)).all()
    assert not (order == torch.arange(NEEDLES)).all(1).all(), "questions are not shuffled"
    if length > 256:
        assert len((starts % 64).unique()) > 32, "needles keep one place relative to blocks"


def test_batches_depend_on_their_number_only():
    one, other = (Haystacks(TASK, SMALL.long, 3200, 4) for _ in range(2))
    batches = [next(one) for _ in range(4)]
    assert [batch.tokens.shape[1] for batch in batches] == [128, 1600, 128, 1600]
    assert [batch.tokens.shape[0] for batch in batches] == [25, 2, 25, 2]
    assert not torch.equal(batches[0].tokens, batches[2].tokens)
    next(other)
    state = other.state()
    next(other)
    other.restore(state)
    assert torch.equal(next(other).tokens, batches[1].tokens)
    assert other.fits(state) and not Haystacks(TASK, SMALL.long, 3200, 9).fits(state)


def test_loss_is_the_mean_over_answers_only():
    model = small_model()
    batch = next(Haystacks(TASK, (128,), 256, 1))
    loss = needle.answers(model, batch)
    logits = model.logits(model(Batch(batch.tokens)))
    places = [(row, t) for row in range(2) for t in range(128) if batch.targets[row, t] != IGNORE]
    each = [-logits[r, t].log_softmax(-1)[batch.targets[r, t]] for r, t in places]
    assert loss.targets == len(each) == 16
    assert torch.allclose(loss.loss, torch.stack(each).mean(), rtol=1e-5)
    assert torch.allclose(loss.total, torch.stack(each).sum(), rtol=1e-5)


def test_another_attention_keeps_the_weights_and_owns_them():
    model = small_model()
    copy = needle.with_attention(model, None)
    assert model.config.sparse == SPARSE and copy.config.sparse is None
    assert all(map(torch.equal, model.parameters(), copy.parameters()))
    with torch.no_grad():
        copy.norm.weight.add_(1)
    assert not torch.equal(model.norm.weight, copy.norm.weight)


def test_both_copies_start_from_the_dense_weights_and_training_repeats_itself():
    scale = replace(SMALL, long=(640,), tokens=640, long_steps=2)
    (start, full, sparse), again = (needle.train_all(scale, TASK, "cpu") for _ in range(2))
    assert full.config.sparse is None and sparse.config.sparse == SPARSE
    assert replace(sparse.config, sparse=None) == full.config
    pairs = zip(full.parameters(), sparse.parameters(), strict=True)
    gaps = [(a - b).abs().max().item() for a, b in pairs]
    # two steps from common weights, each at most 0.006 over m = 32 / 64, may go opposite ways
    assert 0 < max(gaps) < 0.06
    for one, two in zip((start, full, sparse), again, strict=True):
        assert all(map(torch.equal, one.parameters(), two.parameters()))


def test_watching_sees_the_blocks_the_layer_itself_would_choose():
    model = small_model()
    tokens = next(Haystacks(TASK, (1600,), 3200, 1)).tokens
    caught = []
    hook = model.layers[1].self_attn.q_proj.register_forward_pre_hook(
        lambda _, inputs: caught.append(inputs[0])
    )
    with torch.no_grad(), needle.watching(model) as seen:
        model(Batch(tokens))
    hook.remove()
    attention, x = model.layers[1].self_attn, caught[0]
    with torch.no_grad():
        rope = model.rope(torch.arange(1600).expand(2, -1))
        q, k = (
            needle.rotate(project(x).view(2, 1600, -1, 8), *rope)
            for project in (attention.q_proj, attention.k_proj)
        )
        blocks = chosen_blocks(q, k, sparse=SPARSE)[:, :, -2 * NEEDLES :: 2]
    assert len(seen) == 2 and seen[1].shape == (2, 2, NEEDLES, SPARSE.total_blocks)
    assert torch.equal(seen[1], blocks)
    with needle.watching(needle.with_attention(model, None)) as none:
        assert none == []


def test_holds_finds_needles_that_cross_a_block_border():
    starts = torch.tensor([[64, 127, 200, 62]])  # blocks 1, 1 and 2, 3, 0 and 1
    blocks = torch.tensor([[[[0, 1], [0, 2], [0, 2], [3, 4]], [[2, 3], [1, 5], [3, -1], [0, 7]]]])
    found = needle.holds(blocks, starts, TASK)
    assert found[0].T.tolist() == [[True, True, False, False], [False, True, True, True]]


def test_must_choose_leaves_out_what_every_query_sees():
    length = 1600  # questions stand in block 24, whose local blocks are 22 .. 24
    starts = torch.tensor([[0, 62, 64, 1404, 1405, 1408, 1500, 700]])
    free = needle.must_choose(starts, TASK, length, SPARSE)[0].tolist()
    assert free == [False, False, True, True, False, False, False, True]
    assert needle.blind(length, SPARSE) == pytest.approx(2 / 21)


def test_measure_is_dense_by_identity_below_the_budget_and_counts_above():
    model = small_model()
    short, long = (needle.measure(model, "sparse, coarse", TASK, n, 3) for n in (256, 1600))
    dense = needle.measure(needle.with_attention(model, None), "same, dense", TASK, 256, 3)
    assert short.ratio == 1 and short.accuracy == dense.accuracy and short.recall is None
    assert long.counts and long.ratio < 0.5
    heads = [part for layer in long.per_head for part in layer]
    assert len(long.per_head) == 2 and all(0 <= part <= 1 for part in heads)
    assert max(heads) <= long.recall <= max(map(sum, long.per_head)) + 1e-6
    assert long.by_chance == pytest.approx(1 - (1 - 2 / 21) ** 2)
    assert not dense.counts and dense.ratio == 1 and dense.by_chance is None


def row(attention: str, length: int, ratio: float, **changes) -> Row:
    sparse = ratio < 0.5
    recall, chance, heads = (0.875, 0.125, [[0.5, 0.75]]) if sparse else (None, None, None)
    accuracy = [i / (NEEDLES - 1) for i in range(NEEDLES)]
    fields = dict(counts=sparse, accuracy=accuracy, chosen=0.625)
    fields |= dict(recall=recall, by_chance=chance, per_head=heads)
    return Row(attention, length, ratio, **{**fields, **changes})


def all_rows() -> list[Row]:
    sparse = ("sparse, coarse", "sparse, exact", "sparse, topk 8")
    rows = [row(name, n, 1.0) for name in ("full", "same, dense") for n in (256, 2560)]
    return rows + [r for name in sparse for r in (row(name, 256, 1.0), row(name, 2560, 0.25))]


def test_check_wants_sparsity_to_act_and_to_be_an_identity_below_the_budget():
    needle.check(all_rows())
    with pytest.raises(AssertionError, match="never acts in sparse, exact"):
        needle.check([r for r in all_rows() if (r.attention, r.length) != ("sparse, exact", 2560)])
    with pytest.raises(AssertionError, match="2560 does not count"):
        needle.check([*all_rows(), row("sparse, coarse", 2560, 0.6, counts=True)])
    with pytest.raises(AssertionError, match="differs from dense"):
        needle.check([*all_rows(), row("sparse, exact", 256, 1.0, accuracy=[0.0] * NEEDLES)])


def test_table_shows_ratio_mark_and_best_recall():
    lines = needle.table([*all_rows(), row("sparse, coarse", 1024, 0.57)], TASK).splitlines()
    assert "guessing: 12" in lines[0]
    acting = next(line for line in lines if line.startswith("sparse, coarse    2560"))
    assert "0.250" in acting and " yes " in acting and acting.endswith("62.5      88 (12)")
    assert " 14 " in acting and " 100 " in acting
    assert " dense " in next(line for line in lines if line.startswith("full"))
    assert "  no " in lines[-1] and lines[-1].endswith("62.5")


def test_plot_draws_a_panel_per_attention(tmp_path):
    needle.plot(all_rows(), tmp_path / "deep" / "needle.png")
    assert (tmp_path / "deep" / "needle.png").read_bytes().startswith(b"\x89PNG")
