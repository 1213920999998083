"""TOML and overrides become dataclasses; every mistake is a sentence with the key in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from endside import config
from endside.errors import UserError


@dataclass(frozen=True)
class Inner:
    learning_rate: float = 0.01
    betas: tuple[float, ...] = (0.9, 0.95)
    shape: Literal["linear", "sqrt"] = "sqrt"

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise UserError(f"optim.learning_rate is {self.learning_rate}: it must be above 0")


@dataclass(frozen=True)
class Outer:
    steps: int
    name: str = "a"
    deep: bool = False
    limit: int | None = 7
    optim: Inner = field(default_factory=Inner)
    extra: Inner | None = None


def write(folder: Path, text: str) -> Path:
    path = folder / "tiny.toml"
    path.write_text(text)
    return path


def test_file_and_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "steps = 3\n[optim]\nlearning_rate = 1e-4\n")
    overrides = ["optim.betas=[0.5, 1]", "name=two words", "deep=true", "extra.shape=linear"]
    assert config.load(path, Outer, overrides) == Outer(
        steps=3, name="two words", deep=True, optim=Inner(1e-4, (0.5, 1.0)),
        extra=Inner(shape="linear"),
    )  # fmt: skip


def test_a_misspelt_key_names_the_nearest_one(tmp_path: Path) -> None:
    path = write(tmp_path, "steps = 3\n[optim]\nlearnin_rate = 1e-4\n")
    with pytest.raises(UserError) as caught:
        config.load(path, Outer)
    assert str(caught.value) == (
        f"unknown key optim.learnin_rate in {path}; did you mean optim.learning_rate?"
    )


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("stepps=3", "unknown key stepps in"),
        ("stepps=3", "did you mean steps?"),
        ("optim.zzz=3", "known: learning_rate, betas, shape"),
        ("extra.shap=linear", "did you mean extra.shape?"),
        ('steps="3"', "steps is '3'"),
        ("steps=true", "steps is True"),
        ("steps=2.5", "steps is 2.5"),
        ("name=3", "name is 3"),
        ("deep=1", "deep is 1"),
        ("optim.shape=cubic", "optim.shape is 'cubic'"),
        ("optim.betas=0.9", "optim.betas is 0.9"),
        ("optim.learning_rate=-1.0", "optim.learning_rate is -1.0: it must be above 0"),
        ("steps.a=1", "steps is a value, not a table"),
        ("steps", "is not key=value"),
        ("optim..shape=linear", "is not key=value"),
        ("steps=none", "steps is 'none'"),
        ("optim=3", "optim is 3"),
    ],
)
def test_a_wrong_value_is_named(tmp_path: Path, override: str, part: str) -> None:
    path = write(tmp_path, "steps = 3\n")
    with pytest.raises(UserError) as caught:
        config.load(path, Outer, [override])
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"steps is missing in .*tiny\.toml"):
        config.load(write(tmp_path, "name = 'x'\n"), Outer)


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no configuration file"):
        config.load(tmp_path / "absent.toml", Outer)
    with pytest.raises(UserError, match="is not valid TOML"):
        config.load(write(tmp_path, "steps: 3\n"), Outer)
    with pytest.raises(UserError, match="cannot read"):
        config.load(tmp_path, Outer)
    (tmp_path / "latin.toml").write_bytes(b"name = '\xe9'\n")
    with pytest.raises(UserError, match="cannot read"):
        config.load(tmp_path / "latin.toml", Outer)


configs = st.builds(
    Outer,
    steps=st.integers(-(2**60), 2**60),
    name=st.text(st.characters(codec="utf-8")),
    deep=st.booleans(),
    limit=st.none() | st.integers(0, 9),
    optim=st.builds(
        Inner,
        learning_rate=st.floats(1e-300, 1e300),
        betas=st.lists(st.floats(allow_nan=False)).map(tuple),
        shape=st.sampled_from(["linear", "sqrt"]),
    ),
    extra=st.none() | st.just(Inner(3.0)),
)


@settings(max_examples=50, deadline=None)
@given(configs)
def test_what_is_dumped_loads_as_it_was(value: Outer) -> None:
    import tomllib

    data = tomllib.loads(config.dump(value))
    assert config.build(Outer, data, source="here") == value


def test_flatten_lists_every_leaf() -> None:
    flat = config.flatten(Outer(steps=1, extra=Inner(2.0)))
    assert flat["extra.learning_rate"] == 2.0
    assert list(flat) == [
        "steps", "name", "deep", "limit", "optim.learning_rate", "optim.betas", "optim.shape",
        "extra.learning_rate", "extra.betas", "extra.shape",
    ]  # fmt: skip
