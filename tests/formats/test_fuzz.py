"""Some cases of every fuzzing target; `make fuzz` runs them for as long as one likes."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from tests.formats import fuzz


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_readers_only_complain(target: str) -> None:
    """Anything but a UserError, a hang or a hoard of memory fails and is shrunk."""
    ended = fuzz.check(target)(60)
    assert ended["refused"] > 5, f"{ended}: the damage does nothing"


@pytest.mark.parametrize("kind", ["plain", *fuzz.BLOCKS])
def test_seeds_are_right(kind: str) -> None:
    """Damage means something only where the undamaged model is read."""
    assert fuzz.run(fuzz.Case(fuzz.folder(kind), ""))


@pytest.mark.parametrize("kind", fuzz.DRAFTS)
def test_draft_seeds_are_right(kind: str) -> None:
    assert fuzz.run(fuzz.Case(fuzz.draft(kind), ""))


def test_gguf_seed_is_right() -> None:
    assert fuzz.run(fuzz.Case({"x.gguf": fuzz.gguf_bytes(*fuzz.gguf_parts())}, "x.gguf"))


def nested(depth: int) -> bytes:
    """GGUF with a key that is an array of arrays of arrays."""
    inner = struct.pack("<IQ", 9, 1) * depth + struct.pack("<IQB", 0, 1, 7)
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sI", 1, b"k", 9) + inner


@pytest.mark.parametrize(
    "files",
    [
        {"x.gguf": nested(100000)},
        {"x.gguf": b"GGUF" + struct.pack("<IQQ", 3, 2**63, 2**63)},
        {"x.gguf": b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**63) + b"k" * 99},
        {"config.json": b"[" * 100000, "model.safetensors": b""},
        {"config.json": b'{"vocab_size": ' + b"9" * 6000 + b"}", "model.safetensors": b""},
        {
            "config.json": json.dumps(fuzz._config()).encode(),
            "model.safetensors": struct.pack("<Q", 200000) + b"[" * 200000,
        },
    ],
)
def test_known_traps(files: dict[str, bytes]) -> None:
    """Depth and digits that make parsers give up; counts that no memory holds."""
    name = "x.gguf" if "x.gguf" in files else ""
    assert not fuzz.run(fuzz.Case(files, name))


@pytest.mark.parametrize("block", [{"quant_method": []}, {"quant_method": "endside", "kind": [1]}])
def test_names_that_cannot_be_looked_up(block: dict) -> None:
    config = json.dumps(fuzz._config() | {"quantization_config": block}).encode()
    assert not fuzz.run(fuzz.Case({**fuzz.folder("plain"), "config.json": config}, ""))


def test_the_limits_bite() -> None:
    """A reader that hoards or hangs is noticed."""
    with pytest.raises(AssertionError, match="bytes held"), fuzz.limits(10):
        hoard = bytearray(fuzz.SLACK * 2)
        del hoard
    seconds, fuzz.SECONDS = fuzz.SECONDS, 0.05
    try:
        with pytest.raises(fuzz.TooSlow), fuzz.limits(10):
            while Path():
                pass
    finally:
        fuzz.SECONDS = seconds
