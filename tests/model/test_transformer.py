"""The decoder: its scales act, cached equals uncached, the MTP layer and the counts are right."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from endside.errors import UserError
from endside.model.batch import Batch
from endside.model.cache import Cache
from endside.model.flops import parameters
from endside.model.presets import PRESETS, preset
from endside.model.transformer import Transformer


def _model(name: str = "tiny", **changes: object) -> Transformer:
    model = Transformer(replace(preset(name), **changes))
    model.init_weights(torch.Generator().manual_seed(1))
    return model.eval()


def _tokens(rows: int, count: int, vocab: int = 320) -> torch.Tensor:
    return torch.randint(0, vocab, (rows, count), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    "changes",
    [
        {"scale_emb": 1.0},
        {"scale_depth": None},
        {"dim_model_base": None},
        {"tie_word_embeddings": True},
        {"rms_norm_eps": 1e-2},
    ],
    ids=lambda c: next(iter(c)),
)
def test_every_scale_acts(changes: dict) -> None:
    """No scale of the fixture is neutral: taking one away changes the logits."""
    tokens = _tokens(1, 9)
    with torch.inference_mode():
        plain, changed = _model(), _model(**changes)
        changed.load_state_dict(plain.state_dict(), strict=False)
        before = plain.logits(plain(Batch(tokens)))
        after = changed.logits(changed(Batch(tokens)))
    assert (before - after).abs().max() > 1e-3, f"{changes} does nothing"


def test_golden_logits() -> None:
    """A seeded tiny model keeps its numbers."""
    model = _model()
    with torch.inference_mode():
        logits = model.logits(model(Batch(_tokens(1, 5))))
    got = logits[0, -1, :4]
    want = torch.tensor(GOLDEN)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


GOLDEN = [-0.36431736, 0.06027077, 0.03218105, 0.14474744]


@pytest.mark.parametrize("name", ["tiny", "tiny-sparse"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_cached_equals_uncached(name: str, tied: bool) -> None:
    """Any chunking of two rows through the cache gives the logits of one whole forward."""
    model = _model(name, tie_word_embeddings=tied)
    length = 700 if name == "tiny-sparse" else 200
    tokens = _tokens(2, length)
    cache = Cache(model.config, tokens=2 * length + 128, dtype=torch.float32, device="cpu")
    with torch.inference_mode():
        whole = model.logits(model(Batch(tokens)))
        seqs = (cache.open(length), cache.open(length))
        parts, start = [], 0
        for size in (7, 64, 1, 1, 63, 65, length):
            chunk = tokens[:, start : start + size]
            if chunk.shape[1]:
                parts.append(model.logits(model(Batch(chunk, seqs=seqs), cache)))
            start += size
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=2e-5)


def test_positions_are_relative_to_the_row() -> None:
    """Rows of different stored length decode together as they would alone."""
    model = _model()
    a, b = _tokens(1, 40), _tokens(1, 57)[:, 40:]
    cache = Cache(model.config, tokens=256, dtype=torch.float32, device="cpu")
    with torch.inference_mode():
        seqs = (cache.open(50), cache.open(50))
        for tokens, seq in ((a, seqs[0]), (b, seqs[1])):
            model(Batch(tokens, seqs=(seq,)), cache)
        step = torch.tensor([[5], [6]])
        both = model.logits(model(Batch(step, seqs=seqs), cache))
        for row, tokens in enumerate((a, b)):
            alone = model.logits(model(Batch(torch.cat((tokens, step[row : row + 1]), 1))))
            torch.testing.assert_close(both[row, -1], alone[0, -1], rtol=1e-4, atol=2e-5)


def test_mtp_reads_the_next_token_and_learns() -> None:
    """The extra layer depends on h_i and x_{i+1} only up to i, and gets gradients."""
    model = _model(mtp_layers=1)
    tokens = _tokens(1, 12)
    hidden = model(Batch(tokens[:, :-1]))
    logits = model.predict_further(hidden, tokens[:, 1:], Batch(tokens[:, :-1]))
    assert logits.shape == (1, 11, 320)
    changed = tokens.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 320
    again = model.predict_further(hidden, changed[:, 1:], Batch(tokens[:, :-1]))
    moved = (again - logits).abs().amax(-1)[0] > 0
    assert moved.tolist() == [False] * 5 + [True] * 6, "token 6 enters at position 5 and after"
    logits.logsumexp(-1).sum().backward()
    assert model.mtp.proj.weight.grad.abs().sum() > 0, "no gradient reaches the MTP layer"


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_count_is_the_models(name: str) -> None:
    """The arithmetic of flops.parameters equals what the modules hold (meta device: no memory)."""
    with torch.device("meta"):
        model = Transformer(replace(preset(name), mtp_layers=1))
    held = sum(p.numel() for p in model.parameters())
    assert parameters(model.config).total == held


@pytest.mark.parametrize(
    ("name", "millions"),
    [("minicpm4-0.5b", 433.9), ("minicpm4-8b", 8185), ("minicpm5-1b", 1080.6)],
)
def test_published_sizes(name: str, millions: float) -> None:
    """The published parameter counts (formats §1)."""
    assert parameters(preset(name)).total / 1e6 == pytest.approx(millions, rel=1e-3)


def test_init_follows_mup() -> None:
    """Embedding std 0.1; matrices 0.1 / sqrt(m), at two widths (training spec)."""
    for hidden, base in ((64, 16), (256, 16)):
        model = Transformer(replace(preset("tiny"), hidden_size=hidden, dim_model_base=base))
        model.init_weights(torch.Generator().manual_seed(0))
        deep = model.layers[0].mlp.up_proj.weight.std().item()
        assert deep == pytest.approx(0.1 / (hidden / base) ** 0.5, rel=0.05)
        assert model.embed_tokens.weight.std().item() == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 15}, "head_dim"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"mtp_layers": 2}, "mtp_layers"),
    ],
)
def test_impossible_shapes_are_refused(changes: dict, said: str) -> None:
    """A shape that cannot be says which number is wrong."""
    with pytest.raises(UserError, match=said):
        replace(preset("tiny"), **changes)


def test_unknown_preset_lists_the_names() -> None:
    """The message names what there is."""
    with pytest.raises(UserError, match="minicpm4-8b"):
        preset("minicpm9")
