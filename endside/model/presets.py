"""Shapes with a name: the published models, the demo's, and two small ones whose every scale bites.

Published shapes serve random-weight benchmarks and tests; a checkpoint's own config.json always
wins. LongRoPE lists are point-symmetric (f[i] + f[n-1-i] is constant, formats §2), so the first
half and that constant are the whole list.
"""

from __future__ import annotations

from dataclasses import replace

from endside.errors import UserError
from endside.model.config import ModelConfig
from endside.ops.infllm.config import SparseConfig
from endside.ops.rope.frequencies import RopeConfig

_HALF_05B = (
    1.0004360675811768, 1.0668443441390991, 1.1631425619125366, 1.3025742769241333,
    1.5040205717086792, 1.7941505908966064, 2.2101221084594727, 2.802666664123535,
    3.6389970779418945, 4.804192543029785, 6.39855432510376, 8.527148246765137,
    11.277542114257812, 14.684998512268066, 18.69317054748535, 23.13019371032715,
)  # fmt: skip
_HALF_8B = (
    0.9977997200264581, 1.014658295992452, 1.0349680404997148, 1.059429246056193,
    1.0888815016813513, 1.1243301355211495, 1.166977103606075, 1.2182568066927284,
    1.2798772354275727, 1.3538666751582975, 1.4426259039919596, 1.5489853358570191,
    1.6762658237220625, 1.8283407612492941, 2.0096956085876183, 2.225478927469756,
    2.481536379650452, 2.784415934557119, 3.1413289096347365, 3.560047844772632,
    4.048719380066383, 4.615569542115128, 5.2684819496549835, 6.014438591970396,
    6.858830049237097, 7.804668263503327, 8.851768731513417, 9.99600492938444,
    11.228766118181639, 12.536757560834843, 13.902257701387796, 15.303885189125953,
)  # fmt: skip
_HALF_41_8B = (
    0.9982316082870437, 1.033048153422584, 1.0749920956484724, 1.1255096879436193,
    1.1863348602111476, 1.259543828902579, 1.3476188888731149, 1.4535223827776373,
    1.5807816745852985, 1.7335856049489526, 1.9168922912975785, 2.1365471404135326,
    2.3994084200118646, 2.713475511863602, 3.0880118452194134, 3.533650295140154,
    4.062463396503134, 4.687974098908333, 5.425075306704039, 6.289818967956352,
    7.29902962722721, 8.469630627587671, 9.81809877306655, 11.358395779190618,
    13.102102706685605, 15.056094578627897, 17.217818336037066, 19.582192387665508,
    22.127012893836497, 24.8285861020038, 27.648788418262416, 30.543517172670757,
)  # fmt: skip


def _longrope(half: tuple[float, ...], total: float, original: int) -> RopeConfig:
    factors = half + tuple(total - f for f in reversed(half))
    return RopeConfig(kind="longrope", original=original, long_factor=factors, short_factor=factors)


def _minicpm4_05b() -> ModelConfig:
    return ModelConfig(
        vocab_size=73448, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
        num_key_value_heads=2, head_dim=64, intermediate_size=4096, max_position_embeddings=32768,
        rms_norm_eps=1e-5, rope=_longrope(_HALF_05B, 50.85382, 32768), tie_word_embeddings=True,
        scale_emb=12.0, scale_depth=1.4, dim_model_base=256,
        bos_token_id=1, eos_token_ids=(2, 73440), pad_token_id=2,
    )  # fmt: skip


def _minicpm4_8b() -> ModelConfig:
    return replace(
        _minicpm4_05b(), hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
        head_dim=128, intermediate_size=16384, rms_norm_eps=1e-6, tie_word_embeddings=False,
        rope=_longrope(_HALF_8B, 32.02172279924174, 32768),
    )  # fmt: skip


def _minicpm41_8b() -> ModelConfig:
    rope = _longrope(_HALF_41_8B, 64.0068, 65536)
    return replace(_minicpm4_8b(), max_position_embeddings=65536, rope=rope)


def _minicpm5_1b() -> ModelConfig:
    return ModelConfig(
        vocab_size=130560, hidden_size=1536, num_hidden_layers=24, num_attention_heads=16,
        num_key_value_heads=2, head_dim=128, intermediate_size=4608,
        max_position_embeddings=131072, rope=RopeConfig(theta=5e6),
        bos_token_id=0, eos_token_ids=(1, 130073), pad_token_id=1,
    )  # fmt: skip


def _demo() -> ModelConfig:
    return ModelConfig(
        vocab_size=2048, hidden_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, intermediate_size=704, max_position_embeddings=2048,
        tie_word_embeddings=True, scale_emb=12.0, scale_depth=1.4, dim_model_base=256,
    )  # fmt: skip


def _tiny() -> ModelConfig:
    half = (1.02, 1.3, 2.1, 4.4)
    return ModelConfig(
        vocab_size=320, hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, intermediate_size=96, max_position_embeddings=512,
        rms_norm_eps=1e-5, rope=_longrope(half, 20.0, 512), scale_emb=3.0, scale_depth=1.4,
        dim_model_base=16, bos_token_id=0, eos_token_ids=(1,), pad_token_id=1,
    )  # fmt: skip


def _tiny_sparse() -> ModelConfig:
    sparse = SparseConfig(window_size=128, topk=4, dense_len=256)
    half = (1.02, 1.3, 2.1, 4.4)
    return replace(
        _tiny(), max_position_embeddings=4096, rope=_longrope(half, 20.0, 4096), sparse=sparse
    )


_MAKERS = {
    "minicpm4-0.5b": _minicpm4_05b,
    "minicpm4-8b": _minicpm4_8b,
    "minicpm4.1-8b": _minicpm41_8b,
    "minicpm5-1b": _minicpm5_1b,
    "demo": _demo,
    "tiny": _tiny,
    "tiny-sparse": _tiny_sparse,
}
PRESETS: tuple[str, ...] = tuple(_MAKERS)


def preset(name: str) -> ModelConfig:
    """The shape called `name`. Raises UserError with the list of names for any other."""
    if name not in _MAKERS:
        raise UserError(f"no preset is called {name!r}: use one of {', '.join(PRESETS)}")
    return _MAKERS[name]()
