"""Greedy text with drafts is the text without: every source, dense and sparse, both executors.

A source's guesses on random weights are rarely right, so some right tokens are put beside them:
paths of every length are kept, and what a head is shown afterwards is what it would see in use.
PyTorch runs in float64, where no two candidates come so close that rounding could choose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from endside.checkpoint import Checkpoint
from endside.engine.draft import MAX_ROWS, Asking, Drafter, Drafts, Tree
from endside.engine.drafts.bita import Bita
from endside.engine.drafts.eagle import Heads
from endside.engine.drafts.head import Head
from endside.engine.drafts.lookup import Lookup
from endside.engine.drafts.model import ModelDrafts
from endside.engine.engine import Engine
from endside.engine.executor import Executor
from endside.engine.executors import Plan, create
from endside.engine.executors.torch import TorchExecutor
from endside.engine.request import Request, SamplingConfig
from endside.formats.draft_head import LAYER, DraftHead
from endside.formats.draft_soft import SoftTokens
from endside.formats.hf import load_checkpoint, save
from endside.model.config import ModelConfig
from endside.model.transformer import Transformer
from endside.ops.infllm.config import SparseConfig
from tests.engine.tiny import HAS_CORE, VOCAB, awkward

CONTEXT = 560
ANSWER = 14  # tokens
SOURCES = ("lookup", "model", "eagle2", "frspec", "eagle3", "mtp", "bita")
KINDS = [
    pytest.param((backend, kind), id=f"{backend}-{kind}", marks=marks)
    for backend, marks in (
        ("torch", ()),
        ("native", pytest.mark.skipif(not HAS_CORE, reason="no native core here")),
    )
    for kind in ("dense", "sparse")
]


class Helped:
    """Some right tokens beside the guesses of a source. known: prompt -> the plain answer."""

    def __init__(self, inner: Drafts, known: dict[tuple[int, ...], list[int]]) -> None:
        self.name, self.vocab_size = inner.name, inner.vocab_size
        self.feature_layers, self.inputs = inner.feature_layers, inner.inputs
        self.inner, self.known = inner, known
        self.own = 0  # guesses that the source made itself

    def start(self, request: Request) -> HelpedDrafter:
        return HelpedDrafter(self, self.inner.start(request), request.tokens)


class HelpedDrafter:
    def __init__(self, owner: Helped, inner: Drafter, prompt: tuple[int, ...]) -> None:
        self.owner, self.inner, self.prompt = owner, inner, prompt
        self.noise = np.random.default_rng(len(prompt))

    def propose(self, history: np.ndarray, rows: int) -> Tree:
        tree = self.inner.propose(history, rows)
        guesses = len(tree.guesses(VOCAB))
        assert guesses <= rows, "a tree larger than was asked for"
        self.owner.own += guesses
        at = len(history) - len(self.prompt)
        right = self.owner.known[self.prompt][at : at + self.noise.integers(0, 5)]
        right = right[: MAX_ROWS - 1 - len(tree)]
        parents = np.where(tree.parents < 0, -1, tree.parents + len(right))
        return Tree(
            np.concatenate([np.array(right, np.int64), tree.tokens]),
            np.concatenate([np.arange(len(right)) - 1, parents]).astype(np.int32),
        )

    def accepted(self, tokens: np.ndarray, features: np.ndarray | None) -> None:
        self.inner.accepted(tokens, features)

    def verified(self, tree: Tree, logits: np.ndarray, path: list[int]) -> None:
        if isinstance(self.inner, Asking):
            self.inner.verified(tree, logits, path)

    def close(self) -> None:
        self.inner.close()


class AnySize:
    """Implements `Size`: now this many, now that, now none."""

    def __init__(self) -> None:
        self.noise = np.random.default_rng(0)

    def rows(self, running: int) -> int:
        return int(self.noise.choice([0, 1, 3, 5, 8, 14]))

    def record(self, tree: Tree, path: list[int], seconds: float) -> None:
        pass


def _config(kind: str) -> ModelConfig:
    if kind == "dense":
        return awkward("tiny", num_hidden_layers=4)
    # Three blocks of 64: from 400 tokens on, less than half of them are seen.
    sizes = SparseConfig(window_size=64, topk=2, dense_len=128)
    return awkward("tiny-sparse", num_hidden_layers=4, tie_word_embeddings=True, sparse=sizes)


class Setting:
    """A model, one a little off as its draft, and prompts with their plain answers."""

    def __init__(self, backend: str, kind: str, place: Path, prompts: int) -> None:
        self.backend, self.config = backend, _config(kind)
        model = Transformer(self.config)
        model.init_weights(torch.Generator().manual_seed(5))
        self.checkpoint = Checkpoint.open(save(model, place / "model"))
        noise = torch.Generator().manual_seed(6)
        with torch.no_grad():
            for weight in model.parameters():
                spread = weight.std() if weight.numel() > 1 else 0.0
                weight += 0.01 * spread * torch.randn(weight.shape, generator=noise)
        self.near = Checkpoint.open(save(model, place / "near"))
        self.executor = self.load(self.checkpoint, capacity=24 * CONTEXT)
        self.prompts = _prompts(kind, prompts)
        self.plain, self.passes = self.answers()

    def load(self, checkpoint: Checkpoint, *, capacity: int) -> Executor:
        if self.backend == "native":
            plan = Plan(executor="native", context=CONTEXT, capacity=capacity, threads=1)
            return create(checkpoint, plan)
        model = load_checkpoint(checkpoint, dtype=torch.float64, context=CONTEXT)
        return TorchExecutor(model, context=CONTEXT, capacity=capacity, dtype=torch.float64)

    def answers(self, drafts: Drafts | None = None) -> tuple[dict, int]:
        """Prompt -> answer, and the passes all of them took."""
        self.executor.feature_layers = ()
        engine = Engine(self.executor, max_batch=4, prefill_chunk=64, drafts=drafts, size=AnySize())
        config = SamplingConfig(max_tokens=ANSWER, temperature=0.0)
        handles = [engine.submit(Request(one, config, frozenset({1}))) for one in self.prompts]
        while not engine.idle:
            engine.step()
        engine.prefixes.clear()
        answers = {one.request.tokens: one.token_ids for one in handles}
        return answers, sum(one.runs for one in handles)

    def source(self, name: str) -> Drafts:
        if name == "lookup":
            return Lookup()
        if name == "model":
            return ModelDrafts(self.load(self.near, capacity=4 * CONTEXT))
        executor = self.executor
        if name == "bita":
            rows = executor.embed_rows(np.array([5, 17, 40, 90]))
            return Bita(SoftTokens(replace(self.config, sparse=None), rows, prompts=1))
        head = Head(
            _random_head(name, self.config), self.config, embed=executor.embed_rows,
            rows=executor.head_rows, context=CONTEXT,
        )  # fmt: skip
        return Heads(head)

    def visible(self) -> float:
        """The mean share of the keys that is seen while answering."""
        lengths = [
            len(prompt) + at for prompt, answer in self.plain.items() for at in range(len(answer))
        ]
        return float(np.mean([self.executor.attention(one)[1] / one for one in lengths]))


def _prompts(kind: str, count: int) -> list[tuple[int, ...]]:
    """Different prompts; the sparse ones are long, and begin alike so that they cost less."""
    make = np.random.default_rng(3)
    begins = make.integers(2, VOCAB, (8, 448 if kind == "sparse" else 0))
    found: dict[tuple[int, ...], None] = {}
    while len(found) < count:
        tail = make.integers(2, VOCAB, make.integers(1, 70))
        if len(tail) > 6:
            tail = np.concatenate([tail, tail[:5]])  # something to look up
        found[(*begins[len(found) % 8].tolist(), *tail.tolist())] = None
    return list(found)


def _random_head(name: str, config: ModelConfig) -> DraftHead:
    """Weights of a head for a model of this shape; frspec: eagle2 over a part of the vocabulary."""
    kind = "eagle2" if name == "frspec" else name
    make, width = np.random.default_rng(8), config.hidden_size
    q, kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    taken = 2 * width if kind == "eagle3" else width
    of_layer = {
        "self_attn.q_proj": (q, taken), "self_attn.k_proj": (kv, taken),
        "self_attn.v_proj": (kv, taken), "self_attn.o_proj": (width, q),
        "mlp.gate_proj": (config.intermediate_size, width),
        "mlp.up_proj": (config.intermediate_size, width),
        "mlp.down_proj": (width, config.intermediate_size),
        "input_layernorm": (width,), "post_attention_layernorm": (width,),
    }  # fmt: skip
    sizes = {f"{LAYER}{key}.weight": size for key, size in of_layer.items()}
    sizes["fc.weight"] = (width, (3 if kind == "eagle3" else 2) * width)
    if kind == "eagle3":
        sizes |= {f"{LAYER}hidden_norm.weight": (width,), "lm_head.weight": (VOCAB, width)}
    else:
        sizes |= {"input_norm1.weight": (width,), "input_norm2.weight": (width,)}
    if kind != "eagle2":
        sizes["norm.weight"] = (width,)
    tensors = {}
    for key, size in sizes.items():
        noise = make.normal(size=size)
        values = noise / size[-1] ** 0.5 if len(size) > 1 else 1 + 0.1 * noise
        tensors[key] = values.astype(np.float32)
    ids = make.permutation(VOCAB)[:83] if name == "frspec" else None
    return DraftHead(kind, replace(config, sparse=None), tensors, ids)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Setting]:
    """Settings by (backend, kind) and prompts, each made once."""
    made: dict[tuple, Setting] = {}

    def setting(which: tuple[str, str], prompts: int) -> Setting:
        if (which, prompts) not in made:
            made[which, prompts] = Setting(*which, tmp_path_factory.mktemp("equal"), prompts)
        return made[which, prompts]

    return setting


class Watching:
    """Keeps what it is shown."""

    vocab_size = None

    def __init__(self, inner: Drafts, layers: tuple[int, ...]) -> None:
        self.name, self.feature_layers, self.inner = "watching", layers, inner
        self.inputs = inner.inputs
        self.shown: list[tuple[tuple[int, ...], list, list]] = []

    def start(self, request: Request) -> HelpedDrafter:
        drafter = self.inner.start(request)
        tokens: list[np.ndarray] = []
        rows: list[np.ndarray] = []
        self.shown.append((request.tokens, tokens, rows))

        def accepted(new: np.ndarray, features: np.ndarray | None) -> None:
            assert features is not None and len(features) == len(new)
            tokens.append(new.copy())
            rows.append(features.copy())

        drafter.accepted = accepted
        return drafter


@pytest.mark.parametrize("which", KINDS)
def test_drafters_are_shown_what_plain_decoding_would_show(settings, which) -> None:
    """After prompts, trees and single tokens: the stored tokens in order, and their features."""
    setting = settings(which, 8)
    setting.executor.feature_layers = ()
    layers = (0, 2, setting.config.num_hidden_layers)
    watching = Watching(Helped(Lookup(), setting.plain), layers)
    assert setting.answers(watching)[0] == setting.plain
    assert len(watching.shown) == 8
    for prompt, tokens, rows in watching.shown:
        stored, seen = np.concatenate(tokens), np.concatenate(rows)
        text = np.array([*prompt, *setting.plain[prompt]][:-1])
        # What came from the prefix cache was not run and is not shown.
        assert np.array_equal(stored[-ANSWER:], text[-len(stored) :][-ANSWER:])
        setting.executor.feature_layers = layers
        seq = setting.executor.open(len(text))
        setting.executor.prefill(seq, text, logits="none")
        expected = setting.executor.features(seq)[-len(stored) :]
        setting.executor.close(seq)
        setting.executor.feature_layers = ()
        assert seen.shape == (len(stored), 3 * setting.config.hidden_size)
        if setting.backend == "native":
            np.testing.assert_array_equal(seen, expected)
        np.testing.assert_allclose(seen, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def _check(setting: Setting, source: str) -> None:
    drafts = Helped(setting.source(source), setting.plain)
    answers, passes = setting.answers(drafts)
    tokens = sum(map(len, setting.plain.values()))
    different = [one for one in setting.plain if answers[one] != setting.plain[one]]
    print(
        f"{setting.backend} {source}: {len(setting.plain)} prompts, {tokens} tokens in {passes} "
        f"passes, {tokens / passes:.2f} a pass, {drafts.own} own guesses; visible / available "
        f"{setting.visible():.2f}; {len(different)} answers differ"
    )
    assert not different, f"{len(different)} of {len(setting.plain)} answers differ"
    assert setting.passes == tokens, "plain decoding brings one token a pass"
    assert tokens / passes > 1.2 and drafts.own > 0.03 * tokens, "the drafts hardly took part"
    if setting.config.sparse is not None:
        assert setting.visible() < 0.5, "sparsity does not act"


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("which", KINDS)
def test_drafts_change_no_greedy_token(settings, which: tuple[str, str], source: str) -> None:
    _check(settings(which, 8), source)


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("which", KINDS)
def test_drafts_change_no_greedy_token_of_1000_prompts(
    settings, which: tuple[str, str], source: str
) -> None:
    _check(settings(which, 1000), source)
