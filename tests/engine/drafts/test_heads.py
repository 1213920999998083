"""Draft heads: numpy equals PyTorch, files keep them, and no token changes for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from endside.checkpoint import Checkpoint
from endside.engine.draft import FixedSize
from endside.engine.drafts import drafts_of
from endside.engine.drafts.eagle import HeadDrafter, _Growing
from endside.engine.drafts.head import Head
from endside.engine.engine import Engine
from endside.engine.executors import Plan, create
from endside.engine.request import Request, SamplingConfig
from endside.errors import UserError
from endside.formats import draft_head
from endside.formats.hf import save
from endside.model.batch import Batch
from endside.model.draft import KINDS, DraftHead, Pairs
from endside.model.transformer import Transformer
from tests.engine.tiny import HAS_CORE, VOCAB, awkward, checkpoint, tokens

EXECUTORS = ["torch", pytest.param("native", marks=pytest.mark.skipif(not HAS_CORE, reason="core"))]
SPARSE = {"num_hidden_layers": 6}


def made(kind: str, config, *, rows: int = 0, seed: int = 3) -> DraftHead:
    head = DraftHead(config, kind, rows=rows)
    head.init_weights(torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 1)
    for name, parameter in head.named_parameters():
        if parameter.dim() == 1:  # norms that are not one
            torch.nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
        elif "fc" in name:
            parameter.data *= 4
    return head


def weights(head: DraftHead, ids: np.ndarray | None = None) -> draft_head.DraftHead:
    tensors = {name: one.detach().numpy() for name, one in head.state_dict().items()}
    return draft_head.DraftHead(head.kind, head.config, tensors, ids)


def running(head: DraftHead, model: Transformer, ids: np.ndarray | None = None) -> Head:
    table = model.embed_tokens.weight.detach().numpy()
    own = table if model.config.tie_word_embeddings else model.lm_head.weight.detach().numpy()
    scale = np.float32(model.config.scale_emb)
    return Head(
        weights(head, ids), model.config, embed=lambda ids: table[ids] * scale,
        rows=lambda ids: own[ids], context=model.config.max_position_embeddings,
    )  # fmt: skip


def plain(name: str = "tiny", **changes: object) -> Transformer:
    model = Transformer(awkward(name, num_hidden_layers=6, **changes))
    model.init_weights(torch.Generator().manual_seed(5))
    return model.requires_grad_(False)


@torch.no_grad()
def features(model: Transformer, text: np.ndarray, kind: str) -> torch.Tensor:
    """(S, F) by hooks, as the executors gather them."""
    from endside.data.loader import TokenBatch
    from endside.train.draft import teach

    ids = torch.from_numpy(np.append(text, 0))[None]
    pairs, _ = teach(model, TokenBatch(ids, torch.zeros_like(ids)), kind)
    return pairs.features[0]


@pytest.mark.parametrize("pieces", [[40], [1, 22, 17], [13, 1, 1, 25]])
@pytest.mark.parametrize("kind", KINDS)
def test_numpy_equals_torch_however_the_text_came(
    kind: str, pieces: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """States and guesses behind a text and along a path of three more tokens."""
    monkeypatch.setattr("endside.engine.drafts.head.native.load", lambda: None)
    model = plain()
    head, text = made(kind, model.config), tokens(44)
    given = features(model, text, kind)
    batch = torch.from_numpy(text[1:])[None]
    pairs = Pairs(
        model.embed(batch), given[None, :-1], torch.arange(43)[None],
        torch.zeros(1, 43, dtype=torch.long),
    )  # fmt: skip
    own = model.embed_tokens.weight if model.config.tie_word_embeddings else model.lm_head.weight
    with torch.no_grad():
        steps = head(pairs, 4)
        wanted = [head.guess(one[0], own).log_softmax(-1).numpy() for one in steps]
    drafter = HeadDrafter(running(head, model), depth=4, width=3)
    done = 0
    for size in pieces:
        drafter.accepted(text[done : done + size], given[done : done + size].numpy())
        done += size
        drafter.propose(text[: done + 1], 2)
    np.testing.assert_allclose(drafter._head.guess(drafter._state)[0], wanted[0][39], atol=2e-4)
    grown = _Growing(drafter._head, drafter._window, drafter._state, 40, VOCAB)
    for step in range(1, 4):
        # a wrong sibling stands beside every right node and must not be seen
        last = np.array([2 * step - 4 if step > 1 else -1] * 2)
        found = grown.step(np.array([text[40 + step], 7]), last)
        said = found.chances[0][np.argsort(found.tokens[0])]
        np.testing.assert_allclose(said, wanted[step][39 + step], atol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_keeps_a_head(kind: str, tmp_path: Path) -> None:
    model = plain()
    ids = np.sort(np.random.default_rng(0).permutation(VOCAB)[:100])
    head = made(kind, model.config, rows=100 if kind == "eagle3" else 0)
    before = weights(head, ids)
    folder = draft_head.write(before, tmp_path / "draft")
    after = draft_head.read(Checkpoint.open(folder))
    assert after.kind == kind and after.bits == "none"
    np.testing.assert_array_equal(after.ids, ids)
    assert after.tensors.keys() == before.tensors.keys()
    for name, tensor in before.tensors.items():
        np.testing.assert_array_equal(after.tensors[name], tensor, err_msg=name)


def test_a_model_trained_with_an_mtp_layer_is_its_own_draft(tmp_path: Path) -> None:
    """The head read from the checkpoint says what `predict_further` says."""
    model = plain(mtp_layers=1)
    head = draft_head.read(Checkpoint.open(save(model, tmp_path / "m")))
    assert head.kind == "mtp"
    text = tokens(30)
    with torch.no_grad():
        hidden = model(Batch(tokens=torch.from_numpy(text[:-1])[None]))
        inputs = Batch(tokens=torch.from_numpy(text[:-1])[None])
        logits = model.predict_further(hidden, torch.from_numpy(text[1:])[None], inputs)
    table = model.embed_tokens.weight.numpy()
    own = table if model.config.tie_word_embeddings else model.lm_head.weight.numpy()
    scale = np.float32(model.config.scale_emb)
    runs = Head(
        head, model.config, embed=lambda ids: table[ids] * scale, rows=lambda ids: own[ids],
        context=model.config.max_position_embeddings,
    )  # fmt: skip
    drafter = HeadDrafter(runs, depth=2, width=2)
    drafter.accepted(text[:-1], hidden[0].numpy())
    drafter.propose(text, 2)
    wanted = logits[0, -1].log_softmax(-1).numpy()
    said = runs.guess(drafter._state)[0]
    np.testing.assert_allclose(said, wanted, atol=0.05)  # bfloat16 products
    assert drafter._first.tokens[0, 0] == wanted.argmax()


def test_published_names_are_understood(tmp_path: Path) -> None:
    """vLLM's prefix and its copies of the model's own matrices; EAGLE-3's midlayer."""
    from endside.checkpoint import write_folder
    from endside.formats.hf_config import config_to_hf, json_bytes

    model = plain()
    head = weights(made("eagle2", model.config))
    renamed = {
        "model." + name.replace("layers.0.", "eagle_layers.0."): draft_head._source(tensor)
        for name, tensor in head.tensors.items()
    }
    copies = np.ones((VOCAB, model.config.hidden_size), np.float32)
    for one in ("model.embed_tokens.weight", "lm_head.weight"):
        renamed[one] = draft_head._source(copies)
    raw = {**config_to_hf(model.config), "num_hidden_layers": 1, "architectures": ["EagleMiniCPM"]}
    folder = write_folder(tmp_path / "d", renamed, {"config.json": json_bytes(raw)})
    found = draft_head.read(Checkpoint.open(folder))
    assert found.kind == "eagle2" and found.tensors.keys() == head.tensors.keys()


def _answers(executor, drafts, nodes: int) -> tuple[list[list[int]], int]:
    engine = Engine(executor, max_batch=3, drafts=drafts, size=FixedSize(nodes))
    make = np.random.default_rng(1)
    asked = [
        Request(
            tuple(make.integers(2, VOCAB, int(make.integers(1, 200))).tolist()),
            SamplingConfig(temperature=temperature, max_tokens=12, seed=number),
        )
        for number, temperature in enumerate([0.0, 0.0, 0.9, 0.0, 0.7])
    ]
    handles = [engine.submit(one) for one in asked]
    while not engine.idle:
        engine.step()
    engine.prefixes.clear()
    return [one.token_ids for one in handles], sum(one.runs for one in handles)


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("kind", [*KINDS, "model", "lookup"])
def test_no_token_changes(kind: str, name: str, tmp_path: Path) -> None:
    """Greedy and sampled, several at once, through folders as users give them.

    `test_equality` has sparse attention and many prompts.
    """
    config = awkward("tiny", num_hidden_layers=6)
    target = checkpoint(tmp_path / "t", config)
    plan = Plan(executor=name, context=1024, capacity=4096)
    draft = kind
    if kind == "model":
        # itself: every guess is right
        draft = str(target.folder)
    elif kind in KINDS:
        draft = str(draft_head.write(weights(made(kind, config)), tmp_path / "draft"))
    executor = create(target, plan)
    expected, plainly = _answers(executor, None, 0)
    drafts = drafts_of(replace(plan, draft=draft), executor)
    found, runs = _answers(executor, drafts, 7)
    assert found == expected
    if kind == "model":
        assert runs < 0.85 * plainly, "the first guess of the model itself is right"


def test_fewer_tokens_in_the_head_are_the_same_guesses_among_them() -> None:
    """FR-Spec: the head of the most frequent tokens is rows of the whole one."""
    model, text = plain(), tokens(20)
    head, given = made("eagle2", model.config), features(model, text, "eagle2").numpy()
    ids = np.arange(0, VOCAB, 3)
    drafters = [HeadDrafter(running(head, model, one), depth=3, width=4) for one in (None, ids)]
    for drafter in drafters:
        drafter.accepted(text[:-1], given[:-1])
        tree = drafter.propose(text, 9)
        tree.check(VOCAB)
    whole, cut = (one._head.guess(one._state)[0] for one in drafters)
    assert len(cut) == len(ids)
    among = whole[ids] - np.log(np.exp(whole[ids]).sum())
    np.testing.assert_allclose(cut, among, atol=1e-2)
    assert set(tree.tokens.tolist()) <= set(ids.tolist())


def test_long_texts_slide_through_the_window() -> None:
    """Beyond the window the oldest pairs go, and guesses still come."""
    model = plain(max_position_embeddings=4096)
    head = running(made("eagle2", model.config), model)
    drafter, make = HeadDrafter(head, depth=2, width=2), np.random.default_rng(0)
    text = tokens(2600)
    noise = make.normal(size=(2600, model.config.hidden_size)).astype(np.float32)
    for start in range(0, 2500, 250):
        drafter.accepted(text[start : start + 250], noise[start : start + 250])
    assert sum(len(one) for one, _ in drafter._waiting) <= 1024 + 250
    assert len(drafter.propose(text[:2501], 4)) == 4
    assert drafter._window.count <= 1024
    for at in range(2500, 2590):
        drafter.accepted(text[at : at + 1], noise[at : at + 1])
        assert len(drafter.propose(text[: at + 2], 4)) == 4


def test_missing_features_are_no_gap() -> None:
    """Rows before a gap are dropped: their positions would be wrong."""
    model = plain()
    drafter = HeadDrafter(running(made("eagle2", model.config), model), depth=2, width=2)
    text, noise = tokens(50), np.ones((50, model.config.hidden_size), np.float32)
    drafter.accepted(text[:10], noise[:10])
    drafter.accepted(text[30:49], noise[30:49])
    drafter.propose(text, 3)
    assert drafter._window.count == 19


def test_wrong_drafts_are_refused(tmp_path: Path) -> None:
    config = awkward("tiny", num_hidden_layers=6)
    target = checkpoint(tmp_path / "t", config)
    plan = Plan(executor="torch", context=256)
    executor = create(target, plan)

    def use(draft: str) -> None:
        drafts_of(replace(plan, draft=draft), executor)

    with pytest.raises(UserError, match="neither a folder nor one of auto, none, lookup"):
        use(str(tmp_path / "nothing"))
    other = replace(config, vocab_size=VOCAB + 8)
    folder = draft_head.write(weights(made("eagle2", other)), tmp_path / "vocabulary")
    with pytest.raises(UserError, match="vocabulary of 339 tokens, the model one of 331"):
        use(str(folder))
    wide = replace(config, hidden_size=config.hidden_size * 2)
    folder = draft_head.write(weights(made("eagle2", wide)), tmp_path / "wide")
    with pytest.raises(UserError, match="wide"):
        use(str(folder))
    broken = weights(made("eagle2", config))
    short = {**broken.tensors, "fc.weight": broken.tensors["fc.weight"][:, :-1]}
    folder = draft_head.write(replace(broken, tensors=short), tmp_path / "short")
    with pytest.raises(UserError, match=r"fc.weight is .* and must be"):
        use(str(folder))


@pytest.mark.parametrize("what", ["text", "twice", "beyond", "floats"])
def test_a_bad_ranking_is_refused(what: str, tmp_path: Path) -> None:
    file = tmp_path / "f.npy"
    ids = {"twice": [1, 1], "beyond": [1, VOCAB], "floats": [0.5, 1.0]}.get(what)
    file.write_bytes(b"no array") if ids is None else np.save(file, np.array(ids))
    with pytest.raises(UserError):
        draft_head.read_ranking(file, VOCAB)


def test_a_published_list_is_read_without_running_it(tmp_path: Path) -> None:
    torch.save([5, 3, 1], tmp_path / "freq_3.pt")
    assert draft_head.read_ranking(tmp_path / "freq_3.pt", VOCAB).tolist() == [5, 3, 1]
    torch.save(Path("x"), tmp_path / "evil.pt")
    with pytest.raises(UserError, match="not a plain list"):
        draft_head.read_ranking(tmp_path / "evil.pt", VOCAB)
