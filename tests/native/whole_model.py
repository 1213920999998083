"""One random decoder twice: the PyTorch reference on emulated low-bit layers, and the native core.

The reference fills the linear slot with `model.quantized` (activations rounded as the kernels round
them) and keeps keys, values and summaries in a cache of the native type, so what is left between
the two is the order of float32 sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import islice

import numpy as np
import torch

from endside.data.corpus import standard_library
from endside.model.batch import Batch
from endside.model.cache import Cache
from endside.model.config import ModelConfig
from endside.model.quantized import QuantizedLinear
from endside.model.transformer import Transformer
from endside.native import model as native
from endside.native.packed import Packed, from_codes, interleave
from endside.ops.infllm.config import SparseConfig
from endside.ops.rope.frequencies import inverse_frequencies
from endside.quant.pack import ZERO, round_to_nearest
from endside.quant.pack import QuantizedLinear as Codes

STORED = {"f16": torch.float16, "bf16": torch.bfloat16}
TRAINED, STEPS, BATCH, SPAN = 1024, 140, 2, 640  # tokens, steps, rows, tokens per row
SPARSE = SparseConfig(window_size=64, topk=2, dense_len=256)


class RoundedCache(Cache):
    """Stores in the pool's type, shows float32, as the native core reads its cache."""

    def view(self, layer: int, seq: int, new: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as float32."""
        keys, values = super().view(layer, seq, new)
        return keys.float(), values.float()

    def summaries(self, layer: int, seq: int, new: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Fine and coarse summaries as float32."""
        fine, coarse = super().summaries(layer, seq, new)
        return fine.float(), coarse.float()


def shape(*, sparse: bool) -> ModelConfig:
    """A small decoder whose every scale bites; 4 query heads per key head."""
    return ModelConfig(
        vocab_size=257, hidden_size=160, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2, head_dim=32, intermediate_size=232, max_position_embeddings=4096,
        rms_norm_eps=1e-5, scale_emb=3.0, scale_depth=1.4, dim_model_base=64,
        sparse=SPARSE if sparse else None,
    )  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """The two forms of one model."""

    config: ModelConfig
    reference: Transformer
    native: native.Model
    cache: str


def text(count: int) -> np.ndarray:
    """Bytes of the language reference as tokens."""
    joined = b"".join(one.text.encode() for one in islice(standard_library(("topics",)), 3, 9))
    assert len(joined) >= count, "the language reference is shorter than the test needs"
    return np.frombuffer(joined[:count], np.uint8).astype(np.int64)


@cache
def trained() -> dict[str, np.ndarray]:
    """Weights that know `text` almost by heart, so that most of their choices are clear ones."""
    torch.manual_seed(11)
    model = Transformer(shape(sparse=False))
    model.init_weights(torch.Generator().manual_seed(11))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.98))
    tokens = torch.from_numpy(text(TRAINED))
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1, step / 20, 3 * (1 - step / STEPS))
        starts = torch.randint(len(tokens) - SPAN, (BATCH,))
        rows = tokens[starts[:, None] + torch.arange(SPAN + 1)]
        logits = model.logits(model(Batch(tokens=rows[:, :-1])))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"trained to a loss of {loss.item():.2f}")
    return {name: value.detach().numpy() for name, value in model.named_parameters()}


def build(kind: str, *, group: int, sparse: bool, cache: str = "f16", isa: str = "auto") -> Pair:
    """The trained weights rounded to `kind`, in both forms; the head has 8 bits."""
    config = shape(sparse=sparse)
    weights = trained()
    codes = {
        name.removesuffix(".weight"): round_to_nearest(
            value, "int8" if name.startswith("lm_head") else kind, group
        )
        for name, value in weights.items()
        if "_proj" in name or name.startswith("lm_head")
    }
    model = native.Model(
        _native_shape(config),
        _native_weights(config, weights, codes),
        sparse=_native_sparse(config.sparse),
        cache=cache,
        limits=native.Limits(rows=96, context=4096, chunks=8, threads=2),
        isa=isa,
    )
    return Pair(config, _reference(config, weights, codes, kind), model, cache)


def _reference(
    config: ModelConfig, weights: dict[str, np.ndarray], codes: dict[str, Codes], kind: str
) -> Transformer:
    group = codes["lm_head"].group

    def make(inputs: int, outputs: int) -> QuantizedLinear:
        body = "int8" if outputs == config.vocab_size else kind
        return QuantizedLinear(inputs, outputs, kind=body, group=group, symmetric=True)

    model = Transformer(config, make_linear=make)
    state = {name: torch.from_numpy(value) for name, value in weights.items()}
    for name, one in codes.items():
        padding = -one.codes.shape[1] % group
        padded = np.pad(one.codes, ((0, 0), (0, padding)), constant_values=ZERO[one.kind])
        del state[f"{name}.weight"]
        state |= {f"{name}.codes": torch.from_numpy(padded)}
        state |= {f"{name}.scales": torch.from_numpy(one.scales)}
    model.load_state_dict(state, strict=True)
    return model.eval()


def _native_shape(config: ModelConfig) -> native.Shape:
    return native.Shape(
        layers=config.num_hidden_layers, width=config.hidden_size,
        heads=config.num_attention_heads, kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim, ff=config.intermediate_size, vocab=config.vocab_size,
        norm_eps=config.rms_norm_eps, embed_scale=config.scale_emb,
        residual_scale=config.residual_scale, logit_scale=1 / config.logit_divisor,
    )  # fmt: skip


def _native_sparse(sparse: SparseConfig | None) -> native.Sparse | None:
    if sparse is None:
        return None
    return native.Sparse(
        init_blocks=sparse.init_blocks, window_blocks=sparse.window_blocks, topk=sparse.topk,
        dense_len=sparse.dense_len, selection_41=sparse.selection == "4.1",
        coarse_lse=sparse.lse == "coarse",
    )  # fmt: skip


def _native_weights(
    config: ModelConfig, weights: dict[str, np.ndarray], codes: dict[str, Codes]
) -> native.Weights:
    layers = []
    for index in range(config.num_hidden_layers):
        at = f"layers.{index}"
        parts = [codes[f"{at}.self_attn.{name}_proj"] for name in "qkv"]
        gate, up = (codes[f"{at}.mlp.{name}_proj"] for name in ("gate", "up"))
        layers.append(
            native.Layer(
                attention_norm=weights[f"{at}.input_layernorm.weight"],
                qkv=_stacked(parts),
                output=_packed(codes[f"{at}.self_attn.o_proj"]),
                mlp_norm=weights[f"{at}.post_attention_layernorm.weight"],
                gate_up=_interleaved(gate, up),
                down=_packed(codes[f"{at}.mlp.down_proj"]),
            )
        )
    frequencies, amplitude = inverse_frequencies(
        config.rope, config.head_dim, 4096, config.max_position_embeddings
    )
    return native.Weights(
        embed=weights["embed_tokens.weight"],
        layers=layers,
        final_norm=weights["norm.weight"],
        head=_packed(codes["lm_head"]),
        inverse_frequencies=np.asarray(frequencies, np.float32),
        rope_amplitude=amplitude,
    )


def _packed(one: Codes) -> Packed:
    return from_codes(one.codes, one.scales, None, _kind(one), group=one.group, scale_type="f16")


def _kind(one: Codes) -> str:
    return "ternary2" if one.kind == "ternary" else one.kind


def _stacked(parts: list[Codes]) -> Packed:
    codes = np.concatenate([one.codes for one in parts])
    scales = np.concatenate([one.scales for one in parts])
    return from_codes(codes, scales, None, _kind(parts[0]), group=parts[0].group, scale_type="f16")


def _interleaved(gate: Codes, up: Codes) -> Packed:
    codes = interleave(gate.codes, up.codes)
    scales = interleave(gate.scales, up.scales)
    return from_codes(codes, scales, None, _kind(gate), group=gate.group, scale_type="f16")


def reference_logits(pair: Pair, tokens: np.ndarray) -> np.ndarray:
    """tokens (T,) -> logits (T, V), teacher-forced in one forward."""
    cache = RoundedCache(pair.config, tokens=len(tokens), dtype=STORED[pair.cache], device="cpu")
    seq = cache.open(len(tokens))
    with torch.inference_mode():
        batch = Batch(tokens=torch.from_numpy(tokens.astype(np.int64))[None], seqs=(seq,))
        return pair.reference.logits(pair.reference(batch, cache))[0].numpy()


def native_logits(
    pair: Pair, tokens: np.ndarray, *, step: int = 96
) -> tuple[np.ndarray, np.ndarray]:
    """tokens (T,) -> logits (T, V) and the keys each row saw (L, T, G), `step` rows at a time."""
    chunks = np.arange(8, dtype=np.int32)
    logits, seen = [], []
    for start in range(0, len(tokens), step):
        part = tokens[start : start + step].astype(np.int32)
        visible = np.zeros(
            (pair.config.num_hidden_layers, len(part), pair.config.num_key_value_heads), np.int32
        )
        request = native.Request(tokens=part, chunks=chunks, start=start, want="all")
        logits.append(pair.native.forward([request], visible=visible))
        seen.append(visible)
    return np.concatenate(logits), np.concatenate(seen, axis=1)
