"""Sampling values: what is refused, and where a value comes from when the user gave none."""

from __future__ import annotations

import math

import numpy as np
import pytest

from endside.engine.request import Request, SamplingConfig
from endside.errors import UserError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0), ("max_tokens", -3), ("max_tokens", 2.5), ("max_tokens", True),
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf),
        ("temperature", "hot"), ("temperature", 10**400), ("top_p", True),
        ("top_p", 0), ("top_p", -0.5), ("top_p", 1.01), ("top_p", math.nan),
        ("top_k", -1), ("top_k", 2.0), ("top_k", "5"),
        ("min_p", -0.01), ("min_p", 1.5), ("min_p", math.nan),
        ("repetition_penalty", 0), ("repetition_penalty", -1), ("repetition_penalty", math.inf),
        ("seed", -1), ("seed", 1.5),
        ("stop", ""), ("stop", ("a", "")), ("stop", 7), ("stop", ["a", b"b"]),
    ],
)  # fmt: skip
def test_bad_values_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(UserError, match=name):
        SamplingConfig(**{name: value})


@pytest.mark.parametrize("filters", [{"top_p": 0.9}, {"top_k": 40}, {"min_p": 0.1}])
def test_a_filter_that_cannot_act_is_refused(filters: dict) -> None:
    with pytest.raises(UserError, match="temperature 0"):
        SamplingConfig(temperature=0, **filters)
    with pytest.raises(UserError, match="the model's default"):
        SamplingConfig(**filters).with_defaults({})
    with pytest.raises(UserError, match="the model's default"):
        SamplingConfig(**filters).with_defaults({"do_sample": False, "temperature": 0.6})
    assert SamplingConfig(**filters).with_defaults({"temperature": 0.6}).temperature == 0.6


def test_neutral_values_and_a_seed_go_with_greedy() -> None:
    config = SamplingConfig(temperature=0, top_p=1.0, top_k=0, min_p=0.0, seed=4)
    assert config.with_defaults({"top_p": 0.8}).greedy
    assert SamplingConfig(temperature=0, top_k=1).greedy


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ({}, 0.0),
        (None, 0.0),
        ({"do_sample": True}, 1.0),
        ({"do_sample": True, "temperature": 0.8}, 0.8),
        ({"do_sample": False, "temperature": 0.8}, 0.0),
        ({"temperature": 0.8}, 0.8),
    ],
)
def test_default_temperature(file: dict | None, expected: float) -> None:
    assert SamplingConfig().with_defaults(file).temperature == expected
    assert SamplingConfig(temperature=0.3).with_defaults(file).temperature == 0.3


def test_the_file_fills_what_the_user_left_open() -> None:
    file = {
        "do_sample": True, "temperature": 0.8, "top_p": 0.7, "top_k": 30, "min_p": 0.02,
        "repetition_penalty": 1.1, "max_new_tokens": 99, "eos_token_id": [2, 73440],
    }  # fmt: skip
    config = SamplingConfig(top_p=0.9, stop="x").with_defaults(file)
    assert config == SamplingConfig(
        max_tokens=99, temperature=0.8, top_p=0.9, top_k=30, min_p=0.02, repetition_penalty=1.1,
        stop=("x",),
    )  # fmt: skip


def test_greedy_drops_the_files_filters_and_keeps_its_penalty() -> None:
    file = {"do_sample": True, "top_p": 0.7, "top_k": 30, "repetition_penalty": 1.1}
    config = SamplingConfig(temperature=0).with_defaults(file)
    assert config == SamplingConfig(temperature=0.0, repetition_penalty=1.1)


def test_a_bad_file_is_named() -> None:
    with pytest.raises(UserError, match=r"generation_config\.json: top_p"):
        SamplingConfig().with_defaults({"do_sample": True, "top_p": 7})


def test_numpy_numbers_are_numbers() -> None:
    config = SamplingConfig(temperature=np.float32(0.5), top_k=np.int64(3), seed=np.int32(2))
    assert not config.greedy


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(UserError, match="prompt is empty"):
        Request(tokens=())
