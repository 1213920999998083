"""Measuring at a depth: copies where they should be, nothing left behind, what is counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from endside import native
from endside.engine.executors import Plan
from endside.engine.measure import Bench, bandwidth, cache_bytes, weight_bytes
from endside.errors import UserError
from endside.model.flops import visible_keys
from tests.engine.fake import FakeExecutor

pytestmark = pytest.mark.skipif(
    not native.available_isas(), reason="the native core is not built here"
)


@pytest.fixture(scope="module")
def executor() -> Any:
    """Random weights of the small sparse shape: dense below 256 tokens, then 6 blocks of 64."""
    from endside.engine.executors.native import random_executor

    return random_executor("tiny-sparse", Plan(context=8192, threads=1, quant="int4", max_batch=2))


class Spy:
    """Records the calls of two methods of one object's parts, and lets them through."""

    def __init__(self, executor: Any, patch: pytest.MonkeyPatch) -> None:
        self.copies: list[tuple[int, int]] = []
        self.prefills: list[int] = []
        copy: Callable[[int, int], None] = executor.model.copy_chunk
        prefill: Callable[..., Any] = executor.prefill

        def copied(source: int, target: int) -> None:
            self.copies.append((source, target))
            copy(source, target)

        def prefilled(seq: int, tokens: np.ndarray, **more: Any) -> Any:
            self.prefills.append(len(tokens))
            return prefill(seq, tokens, **more)

        patch.setattr(executor.model, "copy_chunk", copied)
        patch.setattr(executor, "prefill", prefilled)


@pytest.fixture
def spied(executor: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A fresh bench and the spy that watches it."""
    bench = Bench(executor)
    yield bench, Spy(executor, monkeypatch)
    executor.close(bench._seq)


def test_a_depth_is_a_real_prefix_and_copies_of_its_chunks_in_turn(spied: Any) -> None:
    """2,048 real tokens in chunks a b, then 3,500 more: a b a b, each from the right source."""
    bench, spy = spied
    bench.stand(5500, 2048)
    chunks = bench.executor.sequences[bench._seq].chunks.tolist()
    assert spy.prefills == [2048]
    turns = ((0, 2), (1, 3), (0, 4), (1, 5))
    assert spy.copies == [(chunks[source], chunks[target]) for source, target in turns]
    assert bench.depth == bench.executor.length(bench._seq) == 5500


def test_a_base_as_long_as_the_depth_is_a_real_prefill(spied: Any) -> None:
    """What copies are compared with must hold none."""
    bench, spy = spied
    bench.stand(2500, 2500)
    assert (spy.prefills, spy.copies) == ([2500], [])
    assert bench.executor.length(bench._seq) == 2500


def test_what_is_run_is_forgotten_and_spoils_only_the_prefix_behind_it(spied: Any) -> None:
    """Runs at 700 overwrite the prefix from there on; going deep again makes that part anew."""
    bench, spy = spied
    bench.stand(4096, 2048)
    bench.stand(700, 2048)
    assert len(bench.decode(3)) == 3 and bench.prefill(65) > 0
    assert bench.executor.length(bench._seq) == bench.depth == 700
    spy.prefills.clear()
    bench.stand(4096, 2048)
    assert spy.prefills == [2048 - 700]
    spy.prefills.clear()
    bench.decode(2)
    bench.stand(6000, 2048)
    assert spy.prefills == []
    bench.stand(4096, 4096)
    bench.stand(6000, 2048)
    spy.prefills.clear()
    bench.stand(3072, 3072)  # the third chunk was real and holds a copy now
    assert spy.prefills == [1024]


def test_sight_is_what_the_core_counted(spied: Any) -> None:
    """Sparse behind 256 tokens: few keys of many; the shape's own formula says the same."""
    bench, _ = spied
    bench.stand(3000, 1024)
    one = bench.sight()
    assert one.available == 3001 and one.share < 0.5
    assert one.visible == visible_keys(bench.executor.config, 3001)
    many = bench.sight(129)
    assert many.available == 3065
    exact = [visible_keys(bench.executor.config, 3001 + row) for row in range(129)]
    assert many.visible == pytest.approx(np.mean(exact))
    bench.stand(0)
    assert bench.sight(1100) == bench.expected(1100)  # more rows than one call takes


def test_an_executor_without_chunks_prefills_for_real() -> None:
    """The same measurements on any executor; what a depth holds is then never a copy."""
    executor = FakeExecutor(context=512)
    executor.attention = lambda length: ("dense", length)  # type: ignore[attr-defined]
    bench = Bench(executor)
    bench.stand(300, 64)
    assert executor.calls == [("prefill", 1, 300)]
    bench.stand(100, 64)
    bench.stand(110, 64)
    bench.decode(2)
    bench.stand(120, 64)
    assert executor.calls[-4:] == [
        ("prefill", 1, 10), ("decode", 1, 1), ("decode", 1, 1), ("prefill", 1, 10)
    ]  # fmt: skip
    assert bench.sight(2).visible == 121.5 and weight_bytes(executor) is None


def test_a_depth_beyond_the_context_is_refused(spied: Any) -> None:
    """Before anything runs, with the number that is allowed."""
    bench, spy = spied
    with pytest.raises(UserError, match="9,000 tokens are more than the context of 8,192"):
        bench.stand(9000)
    bench.stand(8192, 1024)
    with pytest.raises(UserError, match="8,193 tokens"):
        bench.decode(1)
    assert spy.prefills == [1024]


def test_bytes_per_token_are_those_of_packed_weights_and_seen_keys(spied: Any) -> None:
    """int4 in groups of 128: half a byte a weight, columns filled up, and two bytes a group."""
    bench, _ = spied
    heads, layers, width, ff, vocab = (4 + 2 * 2) * 16, 2, 48, 96, 320
    shapes = [(heads, width), (width, 64), (2 * ff, width), (width, ff)] * layers + [(vocab, width)]
    groups = sum(-(-rows // 16) * 16 * -(-columns // 128) for rows, columns in shapes)
    assert weight_bytes(bench.executor) == groups * (128 // 2 + 2)
    bench.stand(3000, 1024)
    sight = bench.sight()
    keys = 2 * sight.visible + 3001 / 16 * 1.25
    expected = keys * 2 * 16 * layers * 2
    assert cache_bytes(bench.executor.config, sight, 2) == pytest.approx(expected)


def test_bandwidth_is_in_bytes_per_second() -> None:
    """Any machine reads between 0.1 and 10,000 GB/s; a wrong unit is off by more."""
    assert 1e8 < bandwidth(1 << 24, 2, repeats=3) < 1e13
