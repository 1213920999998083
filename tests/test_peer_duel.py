"""How bench/ compares two engines: rounds, ratios, limits, workers, and the peer's models."""

from __future__ import annotations

import os
import sys
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from bench.peer_duel import Probe, Rounds, Worker, duel, page_kind, spread, worker
from bench.peer_gguf import write
from endside.formats.gguf import open_gguf
from endside.model.presets import preset

ECHO = """
import json, sys
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    verb, *words = line.split()
    if verb == "quit": break
    if verb == "die": sys.exit(3)
    answer = {"error": "no"} if verb == "fail" else {"did": verb, "words": words}
    print(json.dumps(answer), flush=True)
"""


def test_rounds_alternate_with_the_probe_around_each() -> None:
    """P A B P A B P, so that every round of ours has a bandwidth before and after it."""
    order: list[str] = []
    ticks = count(1)

    def called(name: str) -> float:
        order.append(name)
        return float(next(ticks))

    found = duel(lambda: called("A"), lambda: called("B"), lambda: called("P"), rounds=2, seconds=9)
    assert "".join(order) == "PABPABP"
    assert (found.ours, found.peer, found.bandwidth) == ([2, 5], [3, 6], [1, 4, 7])
    assert found.ratios == [2 / 3, 5 / 6]
    assert found.limit_shares(10.0) == [2 * 10 / 2.5, 5 * 10 / 5.5]


def test_no_round_begins_after_the_time_is_up() -> None:
    """At least one round, however long it takes."""
    found = duel(lambda: 1.0, lambda: 1.0, lambda: 1.0, rounds=50, seconds=0)
    assert len(found.ours) == len(found.peer) == 1 and len(found.bandwidth) == 2


def test_results_start_empty_every_time() -> None:
    """Two cells never share a list."""
    assert Rounds().ours is not Rounds().ours
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}


def test_a_worker_answers_line_by_line_and_says_how_it_failed() -> None:
    """An error answer and a dead process both end the run with a reason."""
    command = [sys.executable, "-c", ECHO]
    with worker(command) as one:
        assert one.greeting == {"ready": True}
        assert one.ask("depth", 5, 6) == {"did": "depth", "words": ["5", "6"]}
        with pytest.raises(SystemExit, match="no"):
            one.ask("fail")
        assert one.ask("still")["did"] == "still"
    two = Worker(command)
    with pytest.raises(SystemExit, match="ended at 'die'"):
        two.ask("die")


def test_the_probe_asks_for_our_size_and_pages(tmp_path: Path) -> None:
    """GB/s become bytes per second; the words say what is read."""
    fake = tmp_path / "limits"
    fake.write_text(
        '#!/bin/sh\n[ "$*" = "bandwidth 2 1000 huge 5" ] && echo \'{"gb_s":{"median":12.5}}\'\n'
    )
    fake.chmod(0o755)
    assert Probe(fake, 2, 1000, "huge")() == 12.5e9


def test_page_kind_of_a_process_without_huge_pages() -> None:
    """More than the process has cannot lie in huge pages; nothing at all always does."""
    assert page_kind(os.getpid(), 1 << 50) == "small"
    assert page_kind(os.getpid(), -1) == "huge"


@pytest.mark.parametrize(("kind", "head"), [("Q4_0", "Q6_K"), ("F16", "F16")])
def test_random_models_have_the_shape_and_size_of_weights(
    kind: str, head: str, tmp_path: Path
) -> None:
    """Read back: the preset's configuration, weights of deviation 0.02 in the types asked for."""
    config, path = preset("demo"), tmp_path / "model.gguf"
    write(path, config, kind)
    found = open_gguf(path)
    for name in (
        "hidden_size",
        "num_hidden_layers",
        "vocab_size",
        "scale_emb",
        "intermediate_size",
    ):
        assert getattr(found.config, name) == getattr(config, name)
    assert found.config.residual_scale == pytest.approx(config.residual_scale)
    assert found.config.logit_divisor == pytest.approx(config.logit_divisor)
    stored = {name: one.stored for name, one in found.parameters.items()}
    assert stored["embed_tokens.weight"] == head
    assert stored["layers.3.mlp.down_proj.weight"] == kind
    for name in ("embed_tokens.weight", "layers.0.self_attn.k_proj.weight"):
        value = found.parameters[name].read()
        plain = value if isinstance(value, np.ndarray) else value.dequantize()
        assert np.std(plain.astype(np.float32)) == pytest.approx(0.02, rel=0.1)
    assert (found.parameters["norm.weight"].read() == 1).all()
