"""Logits and greedy text against an independent implementation: transformers' Llama.

A MiniCPM model is folded into a Llama folder and loaded by transformers; ours runs unfolded, with
all its scales. Plain Llama folders written by transformers are also read back by ours.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from endside.api import LLM
from endside.formats.convert import convert
from endside.formats.hf import load, save
from endside.formats.llama import save_llama
from endside.model.batch import Batch
from endside.model.cache import Cache
from endside.model.config import ModelConfig
from endside.model.presets import preset
from endside.model.transformer import Transformer
from endside.ops.rope.frequencies import RopeConfig

transformers = pytest.importorskip("transformers", reason="the independent implementation")

TOLERANCE = 1e-4  # largest logit difference, fp32


def minicpm(*, head_dim: int = 32, **changes: object) -> ModelConfig:
    """A small MiniCPM: G != H, width != H x D, every scale non-neutral, published rope factors."""
    published = preset("minicpm4-0.5b").rope.long_factor
    short = published[:: len(published) // (head_dim // 2)]
    long = tuple(1.7 * f for f in short)
    rope = RopeConfig(kind="longrope", original=64, short_factor=short, long_factor=long)
    config = ModelConfig(
        vocab_size=503, hidden_size=96, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, head_dim=head_dim, intermediate_size=160,
        max_position_embeddings=256, rms_norm_eps=1e-5, rope=rope, scale_emb=12.0, scale_depth=1.4,
        dim_model_base=32, bos_token_id=1, eos_token_ids=(2,), pad_token_id=2,
    )  # fmt: skip
    return replace(config, **changes)


def random_model(config: ModelConfig, context: int | None = None, gain: float = 1.0) -> Transformer:
    """Random weights, norms included: a norm of ones would hide a missing multiplication.

    gain: factor of the layers' matrices; a tied head echoes its input where they are small.
    """
    generator = torch.Generator().manual_seed(7)
    model = Transformer(config, context=context)
    model.init_weights(generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif name.startswith("layers."):
                parameter.mul_(gain)
    return model.eval()


def tokens(rows: int, count: int, vocab: int = 503) -> torch.Tensor:
    """(rows, count) token ids."""
    return torch.randint(3, vocab, (rows, count), generator=torch.Generator().manual_seed(11))


def theirs(folder: Path) -> torch.nn.Module:
    """transformers' Llama in fp32."""
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def greedy(model: Transformer, prompt: torch.Tensor, count: int) -> list[int]:
    """The next `count` tokens, through the cache."""
    cache = Cache(model.config, tokens=prompt.shape[1] + count, dtype=torch.float32, device="cpu")
    seq = cache.open(prompt.shape[1] + count)
    out: list[int] = []
    step = prompt
    with torch.inference_mode():
        for _ in range(count):
            hidden = model(Batch(step, seqs=(seq,)), cache)
            out.append(int(model.logits(hidden[:, -1]).argmax()))
            step = torch.tensor([[out[-1]]])
    return out


def their_greedy(peer: torch.nn.Module, prompt: torch.Tensor, count: int) -> list[int]:
    """The next `count` tokens by transformers' own generate."""
    with torch.inference_mode():
        out = peer.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=-1,
        )
    return out[0, prompt.shape[1] :].tolist()


CASES = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "width-is-heads-times-head": {"head_dim": 16},
    "wide-head-one-group": {"head_dim": 64, "num_key_value_heads": 1},
    "every-head-its-key": {"num_key_value_heads": 6, "tie_word_embeddings": True},
    "amplitude": {"max_position_embeddings": 2048},
    "plain-rope": {"rope": RopeConfig(theta=5e5)},
    "yarn": {"rope": RopeConfig(kind="yarn", factor=4.0, original=64)},
    "llama3": {"rope": RopeConfig(kind="llama3", factor=4.0, original=64)},
    "linear": {"rope": RopeConfig(kind="linear", factor=3.0)},
}


@pytest.mark.parametrize("length", [63, 129])
@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_folded_logits_equal_transformers(changes: dict, length: int, tmp_path: Path) -> None:
    """Short prompts rotate with the short list on both sides, long ones with the long list."""
    config = minicpm(**changes)
    model = random_model(config, context=64 if length <= 64 else config.max_position_embeddings)
    batch = tokens(2, length)
    with torch.inference_mode():
        ours = model.logits(model(Batch(batch)))
        peer = theirs(save_llama(model, tmp_path / "llama"))(batch).logits
    assert ours.std() > 0.1, "logits this small would pass anything"
    assert (ours - peer).abs().max() <= TOLERANCE


def test_both_lists_act(tmp_path: Path) -> None:
    """The two contexts of the test above differ, so it compares two lists and not one."""
    batch = tokens(1, 63)
    model, longer = (random_model(minicpm(), context=context) for context in (64, 256))
    with torch.inference_mode():
        gap = model.logits(model(Batch(batch))) - longer.logits(longer(Batch(batch)))
    assert gap.abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("tied", [False, True])
def test_greedy_text_equals_transformers(tied: bool, tmp_path: Path) -> None:
    """64 tokens through our cache and theirs, past the length where the long list begins."""
    rope = replace(minicpm().rope, long_factor=minicpm().rope.short_factor)
    model = random_model(minicpm(tie_word_embeddings=tied, rope=rope), gain=4.0)
    prompt = tokens(1, 17)
    peer = theirs(save_llama(model, tmp_path / "llama"))
    want = their_greedy(peer, prompt, 64)
    assert len(set(want)) > 8, "a constant answer would match too easily"
    assert greedy(model, prompt, 64) == want


def test_whole_engine_equals_transformers(tmp_path: Path, test_data: Path) -> None:
    """The same through folder, tokenizer, engine and sampler: 64 tokens of `LLM.generate`."""
    rope = replace(minicpm().rope, long_factor=minicpm().rope.short_factor)
    model = random_model(minicpm(vocab_size=73448, rope=rope), gain=4.0)
    folder = save(model, tmp_path / "m", tokenizer_files=test_data / "minicpm4-8b")
    peer = theirs(convert(folder, tmp_path / "llama", to="llama").destination)
    llm = LLM(folder, dtype="float32", executor="torch", context=256)
    prompt = llm.tokenizer.encode("Which is the longest river, and why?")
    got = llm.generate(prompt, max_tokens=64, temperature=0.0)
    assert got.finish_reason == "length" and len(set(got.token_ids)) > 8
    assert list(got.token_ids) == their_greedy(peer, torch.tensor([list(prompt)]), 64)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 5e6},
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
         "original_max_position_embeddings": 64, "attention_factor": 1.3},
        {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
         "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_their_llama_folder_is_read(rope: dict, tied: bool, tmp_path: Path) -> None:
    """A folder that transformers wrote (MiniCPM5's kind of shape), and back again."""
    config = transformers.LlamaConfig(
        vocab_size=503, hidden_size=96, intermediate_size=160, num_hidden_layers=3,
        num_attention_heads=6, num_key_value_heads=2, head_dim=32, max_position_embeddings=256,
        rms_norm_eps=1e-5, tie_word_embeddings=tied, rope_parameters=rope, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(5)
    peer = transformers.LlamaForCausalLM(config).eval()
    peer.save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs")
    batch = tokens(2, 65)
    with torch.inference_mode():
        want = peer(batch).logits
        got = ours.logits(ours(Batch(batch)))
        again = theirs(save(ours, tmp_path / "ours"))(batch).logits
    assert (got - want).abs().max() <= TOLERANCE
    assert torch.equal(again, want)
