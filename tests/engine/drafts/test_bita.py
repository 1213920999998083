"""Soft tokens as the draft: questions in the tree, answers as guesses, files, names, sizes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from endside.checkpoint import Checkpoint
from endside.data.loader import TokenBatch
from endside.engine.draft import MAX_ROWS, FixedSize, Tree
from endside.engine.drafts import drafts_of
from endside.engine.drafts.bita import Bita, BitaDrafter
from endside.engine.engine import Engine
from endside.engine.executors import Plan, create
from endside.engine.request import Request, SamplingConfig
from endside.engine.treesize import AutoSize
from endside.errors import UserError
from endside.formats import draft_soft
from endside.formats.draft_soft import SoftTokens
from endside.formats.hf import load_checkpoint, save
from endside.model.config import ModelConfig
from endside.model.transformer import Transformer
from endside.train import bita
from tests.engine.fake import FakeExecutor, history_logits
from tests.engine.tiny import HAS_CORE, VOCAB, awkward, checkpoint, tokens

EXECUTORS = ["torch", pytest.param("native", marks=pytest.mark.skipif(not HAS_CORE, reason="core"))]


def soft_tokens(config: ModelConfig, *, prompts: int = 1, masks: int = 3) -> SoftTokens:
    rows = np.random.default_rng(4).normal(size=(prompts + masks, config.hidden_size))
    return SoftTokens(replace(config, sparse=None), rows.astype(np.float32), prompts)


class Foreseeing(FakeExecutor):
    """Mask i says what plain decoding would say i + 1 tokens further."""

    def verify(self, seq: int, rows: np.ndarray, parents: np.ndarray) -> np.ndarray:
        logits = super().verify(seq, rows, parents)
        for row in range(len(rows)):
            path, at = [], row
            while at >= 0:
                path.insert(0, int(rows[at]))
                at = int(parents[at])
            text = [*self._tokens[seq], *(one for one in path if one < self.vocab_size)]
            deep = len([one for one in path if one >= self.vocab_size])
            for _ in range(deep - 1):  # the first soft token is the prompt
                text.append(int(history_logits(text, self.vocab_size).argmax()))
            if deep:
                logits[row] = 10 * history_logits(text, self.vocab_size)  # sure of it
        return logits


def test_right_answers_are_kept_as_far_as_they_reach() -> None:
    """A pass to ask, then the token of the text's end and three guessed ones in every pass."""
    config = awkward("tiny", vocab_size=32)
    asked = Request(tuple(range(1, 9)), SamplingConfig(max_tokens=41, temperature=0.0))
    plain = Engine(FakeExecutor()).submit(asked)
    executor = Foreseeing()
    drafts = Bita(soft_tokens(config))
    handle = Engine(executor, drafts=drafts, size=FixedSize(3)).submit(asked)
    assert [one.id for one in handle] == [one.id for one in plain]
    np.testing.assert_array_equal(executor.inputs, drafts.inputs)
    # the prompt's own token, a pass that asks, and 39 tokens by four
    assert handle.runs == 2 + 10 and handle.drafted < 40


def test_every_guess_is_followed_by_the_questions() -> None:
    drafter = BitaDrafter(VOCAB, np.zeros((4, 8), np.float32), prompts=1)
    first = drafter.propose(np.arange(5), 2)
    assert first.tokens.tolist() == [331, 332, 333, 334]
    assert first.parents.tolist() == [-1, 0, 1, 2] and len(first.guesses(VOCAB)) == 0
    logits = np.zeros((5, VOCAB), np.float32)
    logits[2:, 40] = logits[3:, 50] = 9  # row 0 is the root, row 1 the prompt
    logits[3:, 50] = 10
    drafter.verified(first, logits, [0])
    tree = drafter.propose(np.arange(6), 2)
    assert tree.guesses(VOCAB).tokens.tolist() == [40, 50]
    assert tree.tokens.tolist() == [40, 50, *3 * [331, 332, 333, 334]]
    assert tree.parents.tolist() == [-1, 0, -1, 2, 3, 4, 0, 6, 7, 8, 1, 10, 11, 12]
    tree.check(VOCAB + 4)
    # the path ends at the second guess: the last four rows answer
    logits = np.zeros((15, VOCAB), np.float32)
    logits[12:, 60] = 9
    drafter.verified(tree, logits, [0, 1, 2])
    assert drafter.propose(np.arange(9), 1).tokens[0] == 60
    drafter.accepted(np.arange(1), None)
    assert len(drafter.propose(np.arange(9), 1).guesses(VOCAB)) == 0, "old answers are forgotten"
    with pytest.raises(UserError, match="a token that the model's vocabulary"):
        tree.check(VOCAB)


def test_a_tree_has_room_for_all_of_them() -> None:
    drafter = BitaDrafter(VOCAB, np.zeros((draft_soft.MOST, 8), np.float32), prompts=0)
    assert draft_soft.MOST == MAX_ROWS - 1
    drafter.propose(np.arange(5), 60).check(VOCAB + draft_soft.MOST)
    drafter = BitaDrafter(VOCAB, np.zeros((3, 8), np.float32), prompts=0)
    drafter._answers = np.log(np.full((3, VOCAB), 1 / VOCAB, np.float32))
    tree = drafter.propose(np.arange(5), 60)
    tree.check(VOCAB + 3)
    assert len(tree.guesses(VOCAB)) == 15 and len(tree) == 63
    # near the end of the context the deepest go, and what is left still answers
    cut = tree.cut(len(tree), 2)
    drafter.verified(cut, np.zeros((len(cut) + 1, VOCAB), np.float32), [0])
    assert len(drafter._answers) == 2


@torch.no_grad()
@pytest.mark.parametrize("prompts", [0, 2])
@pytest.mark.parametrize("name", EXECUTORS)
def test_what_is_trained_is_what_runs(name: str, prompts: int, tmp_path: Path) -> None:
    """A mask's logits in the training pass are those in a tree, wherever the question stands."""
    config = awkward("tiny", num_hidden_layers=3)
    stored = checkpoint(tmp_path, config)
    model = load_checkpoint(stored, dtype=torch.float32, context=256)
    embedding = bita.SoftEmbedding(config, prompts, 3)
    soft = bita.export(embedding)
    text = tokens(31)
    batch = TokenBatch(torch.from_numpy(text)[None], torch.zeros(1, 31, dtype=torch.int64))
    asked = bita.ask(embedding, model, batch)
    assert len(asked.places) > 4 and asked.inside.all()
    executor = create(stored, Plan(executor=name, context=256))
    executor.set_inputs(soft.rows)
    size, depths = len(soft.rows), np.arange(len(soft.rows) + 1, dtype=np.int32) - 1
    for number, place in enumerate(asked.places.tolist()):
        seq = executor.open(64)
        if place:
            executor.prefill(seq, text[:place], logits="none")
        chain = np.concatenate([text[place : place + 1], VOCAB + np.arange(size)])
        found = executor.verify(seq, chain, depths)[1 + prompts :]
        wanted = model.logits(asked.masks[0, number]).numpy()
        np.testing.assert_allclose(found, wanted, atol=2e-3 * np.abs(wanted).max())
        executor.close(seq)


@torch.no_grad()
def test_questions_see_their_own_text_alone(tmp_path: Path) -> None:
    """Other questions, later text and other documents change nothing; text sees no question."""
    model = Transformer(awkward("tiny"))
    model.init_weights(torch.Generator().manual_seed(5))
    soft = bita.SoftEmbedding(model.config, 1, 3)
    # the ids' sum, from which the places follow, stays the same
    ids = torch.from_numpy(tokens(41))[None]
    owners = (torch.arange(41) >= 20).long()[None]
    one = bita.ask(soft, model, TokenBatch(ids, owners))
    changed = ids.clone()
    changed[0, 20:24] = ids[0, [23, 22, 21, 20]]
    changed[0, 36:40] = ids[0, [39, 38, 37, 36]]
    two = bita.ask(soft, model, TokenBatch(changed, owners))
    same = (one.masks - two.masks).abs().amax((0, 2, 3)) == 0
    assert same.tolist() == [not 20 <= place <= 36 for place in one.places.tolist()]
    plain = model(bita.model_batch(TokenBatch(ids, owners)))
    torch.testing.assert_close(one.text, plain, rtol=0, atol=1e-5)
    crossing = [place < 20 <= place + 3 for place in one.places.tolist()]
    assert [not one.all() for one in one.inside[0]] == crossing and any(crossing)


def test_folders_and_names(tmp_path: Path) -> None:
    config = awkward("tiny")
    stored = checkpoint(tmp_path, config)
    plan = Plan(executor="torch", context=64)
    executor = create(stored, plan)

    def use(draft: str, folder: Path | None = stored.folder) -> Bita:
        return drafts_of(replace(plan, draft=draft), executor, folder)

    with pytest.raises(UserError, match=r"draft bita: .*bita is missing: train it"):
        use("bita")
    with pytest.raises(UserError, match="this model has none"):
        use("bita", None)
    with pytest.raises(UserError, match=r"no MTP layer: it must be trained with mtp_layers = 1"):
        use("mtp")
    soft = soft_tokens(config)
    draft_soft.write(soft, stored.folder / "bita")
    found = use("bita")
    assert found.name == "bita" and found.prompts == 1
    np.testing.assert_array_equal(found.inputs, soft.rows)
    apart = draft_soft.write(soft, tmp_path / "apart")
    assert isinstance(use(str(apart)), Bita)
    other = draft_soft.write(soft_tokens(replace(config, vocab_size=77)), tmp_path / "other")
    with pytest.raises(UserError, match="vocabulary of 77 tokens, the model one of 331"):
        use(str(other))
    wide = soft_tokens(replace(config, hidden_size=2 * config.hidden_size))
    with pytest.raises(UserError, match="is 96 wide, the model 48"):
        use(str(draft_soft.write(wide, tmp_path / "wide")))
    with pytest.raises(UserError, match="no hidden states and takes no tokens but its own"):
        drafts_of(replace(plan, draft=str(apart)), FakeExecutor())


def test_a_model_with_an_mtp_layer_is_named_mtp(tmp_path: Path) -> None:
    model = Transformer(awkward("tiny", mtp_layers=1))
    model.init_weights(torch.Generator().manual_seed(5))
    stored = Checkpoint.open(save(model, tmp_path / "m"))
    plan = Plan(executor="torch", context=64, draft="mtp")
    assert drafts_of(plan, create(stored, plan), stored.folder).name == "mtp"


@pytest.mark.parametrize("prompts", [-1, 4, True, None, "1"])
def test_damaged_files_are_refused(prompts: object, tmp_path: Path) -> None:
    config = awkward("tiny")
    broken = replace(soft_tokens(config), prompts=prompts)
    folder = draft_soft.write(broken, tmp_path / "d")
    with pytest.raises(UserError, match="train it again"):
        draft_soft.read(Checkpoint.open(folder))


def _run(size: AutoSize, luck: list[float], passes: int = 400) -> float:
    """Mean guesses of the last passes, where a pass can only guess what the one before asked."""
    noise, used, could = np.random.default_rng(1), [], False
    for _ in range(passes):
        guesses = size.rows(1)
        used.append(guesses)
        if not guesses:
            could = False
            continue
        tree = Tree.chain(list(range(guesses))) if could else Tree.empty()
        kept = 0
        while kept < min(len(tree), len(luck)) and noise.random() < luck[kept]:
            kept += 1
        size.record(tree, list(range(kept)), 1e-6)
        could = True
    return float(np.mean(used[-100:]))


def test_sizes_count_the_questions() -> None:
    """The same luck pays where rows are cheap, not where they are dear; a try asks, then runs."""
    flat = {rows: 1.0 + 0.02 * rows for rows in (1, 2, 4, 16, 64)}
    steep = {rows: 0.5 + 0.5 * rows for rows in (1, 2, 4, 16, 64)}
    luck = [0.9, 0.8, 0.5]
    assert 2 <= _run(AutoSize(flat, questions=3), luck) <= 5
    assert _run(AutoSize(steep, questions=3), luck) < 0.2
    assert _run(AutoSize(flat, questions=3), [0.0]) < 0.2
    assert AutoSize({1: 1.0, 2: 1.0}, questions=3).rows(1) == 0, "no room to guess and ask"
    # Off at first, since nothing is known yet; a try and the guesses it asked for turn it on.
    late = AutoSize({rows: 1.0 + 0.05 * rows for rows in (1, 2, 4, 16, 64)}, questions=3)
    late._luck[:] = 0.0
    assert late.rows(1) == 0
    assert _run(late, [0.95, 0.9, 0.9], 600) >= 2
