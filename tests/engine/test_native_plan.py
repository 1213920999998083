"""Which executor runs a model, with how many bits and threads, and what it will take."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from endside import native
from endside.engine.executors import Plan, choose, native_plan
from endside.engine.executors.native import random_executor
from endside.engine.executors.native_plan import choose_context, memory, physical_cores, recipe
from endside.engine.executors.native_weights import shapes
from endside.errors import UserError
from endside.model.config import ModelConfig
from endside.model.presets import preset
from endside.ops.infllm.config import SparseConfig
from tests.engine.tiny import HAS_CORE

needs_core = pytest.mark.skipif(not HAS_CORE, reason="no native core here")
TINY, LARGE = preset("tiny"), preset("minicpm4-0.5b")


@pytest.fixture
def isas(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Instruction sets that this test says are there."""
    names = ["portable", "avx2"]
    monkeypatch.setattr(native, "available_isas", lambda: names)
    monkeypatch.setattr("endside.engine.executors.GPUS", ())
    return names


def _sparse(**sizes: object) -> ModelConfig:
    return replace(TINY, sparse=SparseConfig(**sizes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("plan", "config", "name", "why"),
    [
        ({}, TINY, "native", "a CPU"),
        ({"executor": "torch"}, TINY, "torch", "asked for"),
        ({"executor": "native"}, TINY, "native", "asked for"),
        ({"quant": "int4"}, LARGE, "native", "quant is asked for"),
        ({"kv": "int8"}, TINY, "native", "kv is asked for"),
        ({"dtype": "float32"}, TINY, "torch", "dtype float32"),
        ({"device": "cuda"}, TINY, "torch", "device cuda is asked for"),
        ({}, _sparse(window_size=128), "native", "a CPU"),
        ({}, _sparse(compat="hf"), "torch", "compat"),
        (
            {}, _sparse(block_size=128, kernel_stride=32, kernel_size=64), "torch",
            "blocks of 128 tokens",
        ),
        ({}, replace(TINY, head_dim=12), "torch", "heads of width 12"),
    ],
)  # fmt: skip
def test_auto_takes_the_core_where_it_can(
    plan: dict, config: ModelConfig, name: str, why: str, isas: list[str]
) -> None:
    choice = choose(Plan(**plan), config)
    assert (choice.name, choice.device) == (name, plan.get("device", "cpu"))
    assert why in choice.why


@pytest.mark.parametrize(
    ("plan", "config", "message"),
    [
        ({"executor": "torch", "quant": "int8"}, TINY, "--quant out, or use --executor native"),
        ({"executor": "torch", "isa": "avx2"}, TINY, "isa avx2 needs the native executor"),
        ({"isa": "avx512"}, TINY, "isa avx512 is not available here, only portable, avx2"),
        ({"executor": "native", "device": "cuda"}, TINY, "runs on a CPU"),
        ({"quant": "int4", "dtype": "bfloat16"}, TINY, "dtype bfloat16 is asked for"),
        ({"quant": "int4"}, _sparse(compat="hf"), "compat"),
    ],
)
def test_what_cannot_be_is_refused(
    plan: dict, config: ModelConfig, message: str, isas: list[str]
) -> None:
    with pytest.raises(UserError, match=message):
        choose(Plan(**plan), config)


def test_without_vectors_only_small_models_run_natively(isas: list[str]) -> None:
    isas.remove("avx2")
    assert choose(Plan(), TINY).name == "native"
    assert choose(Plan(), LARGE).why.startswith("this processor has neither AVX2 nor NEON")
    assert choose(Plan(executor="native"), LARGE).name == "native"
    assert choose(Plan(quant="int4"), LARGE).name == "native"


def test_without_a_core_pytorch_runs(isas: list[str]) -> None:
    isas.clear()
    assert choose(Plan(), TINY).name == "torch"
    with pytest.raises(UserError, match="--quant cannot be used: native core"):
        choose(Plan(quant="int4"), TINY)


@pytest.mark.parametrize(
    ("plan", "stored", "body", "head"),
    [
        ({}, "none", "none", "none"),
        ({"quant": "int8"}, "none", "int8", "int8"),
        ({"quant": "int4"}, "none", "int4", "int4"),
        ({"quant": "ternary"}, "none", "ternary", "int8"),
        ({"quant": "int4", "head": "int8"}, "none", "int4", "int8"),
        ({"quant": "int4", "head": "none"}, "none", "int4", "none"),
        ({}, "ternary", "ternary", "int8"),
        ({}, "int4", "int4", "int8"),
        ({"head": "int4"}, "int4", "int4", "int4"),
        ({}, "mixed", "mixed", "int8"),
    ],
)
def test_the_head_follows_the_blocks(plan: dict, stored: str, body: str, head: str) -> None:
    made = recipe(Plan(**plan), stored)
    assert (made.body, made.head) == (body, head)


def test_bits_of_a_low_bit_checkpoint_are_not_changed() -> None:
    with pytest.raises(UserError, match="stored in int4"):
        recipe(Plan(quant="int8"), "int4")


@needs_core
def test_memory_grows_with_context_and_shrinks_with_bits() -> None:
    def of(context: int, **plan: object) -> native_plan.Memory:
        made = Plan(max_batch=1, **plan)  # type: ignore[arg-type]
        asked = recipe(made)
        sizes = shapes(LARGE, asked)
        return memory(LARGE, made, asked, sizes, context=context, threads=1)

    short, long = of(1024), of(8192)
    behind = 64  # bytes behind the last summary, once
    assert long.working["cache"] - behind == 8 * (short.working["cache"] - behind)
    assert long.weights == short.weights
    few = of(1024, quant="int4", kv="int8")
    assert sum(few.weights.values()) < 0.27 * sum(short.weights.values())
    assert 0.5 < few.cache_per_token / short.cache_per_token < 0.56
    assert any("int4 group 128" in step for step in few.steps)
    wide = of(1024, quant="int4", group=32)
    assert sum(wide.weights.values()) > sum(few.weights.values())


@needs_core
@pytest.mark.parametrize("isa", native.available_isas())
def test_the_cache_is_what_the_kernels_read_fastest(isa: str) -> None:
    """Tiles read bfloat16 as it lies, where a head fills whole tiles; what is asked for wins."""
    wide, odd = (replace(LARGE, head_dim=dim) for dim in (64, 40))
    assert native_plan.cache_type(Plan(isa=isa), wide) == ("bf16" if isa == "amx" else "f16")
    assert native_plan.cache_type(Plan(isa=isa), odd) == "f16"
    assert native_plan.cache_type(Plan(isa=isa, kv="int8"), wide) == "int8"
    auto = native_plan.cache_type(Plan(), wide)
    assert auto == native_plan.cache_type(Plan(isa=native.available_isas()[-1]), wide)


@needs_core
def test_context_is_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --context the model's own length, or what a quarter of free memory holds."""
    monkeypatch.setattr(native_plan, "free_memory", lambda: 2 * 10**9)
    plan = Plan(quant="int4")
    asked = recipe(plan)
    chosen = choose_context(LARGE, plan, asked, shapes(LARGE, asked))
    assert chosen.context == 32768
    monkeypatch.setattr(native_plan, "free_memory", lambda: 6 * 10**8)
    chosen = choose_context(LARGE, plan, asked, shapes(LARGE, asked))
    assert 8000 < chosen.context < 16000
    monkeypatch.setattr(native_plan, "free_memory", lambda: 10**8)
    with pytest.raises(UserError, match="not even a short context fits"):
        choose_context(LARGE, plan, asked, shapes(LARGE, asked))


@needs_core
def test_more_threads_than_cores_is_a_note(caplog: pytest.LogCaptureFixture) -> None:
    assert 1 <= physical_cores() <= len(native_plan.usable_threads())
    with caplog.at_level(logging.WARNING):
        made = random_executor("tiny", Plan(threads=physical_cores(), context=64))
        assert not caplog.records and made.threads == physical_cores()
        assert random_executor("tiny", Plan(context=64)).threads == physical_cores()
        random_executor("tiny", Plan(threads=99, context=64))
    assert "99 threads on" in caplog.text
