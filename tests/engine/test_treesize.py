"""The size of draft trees: chosen by cost and luck, remembered, never harmful."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from endside.engine.draft import Tree
from endside.engine.engine import Engine
from endside.engine.request import Request, SamplingConfig
from endside.engine.treesize import LARGER, PROBE, RARELY, AutoSize, LazySize, measure, remembered

from .fake import FakeExecutor

CHEAP = {1: 1.0, 64: 1.5}  # a GPU: rows are nearly free
DEAR = {1: 1.0, 2: 2.0, 64: 64.0}  # every row costs as much as a pass of its own


def chain(size: int) -> Tree:
    return Tree.chain([1] * size)


def taught(costs: dict[int, float], share: float, rounds: int = 600) -> AutoSize:
    """After trees of which the first `share` of the nodes were always kept."""
    size = AutoSize(costs)
    for _ in range(rounds):
        tree = chain(size.largest)
        size.record(tree, list(range(int(share * len(tree)))), 0.0)
    return size


def test_cheap_rows_and_good_guesses_make_large_trees() -> None:
    assert taught(CHEAP, 1.0).best(1) == 63
    assert taught(CHEAP, 0.5).best(1) == 31


def test_useless_guesses_switch_drafts_off() -> None:
    assert taught(CHEAP, 0.0).best(1) == 0
    assert taught(DEAR, 0.5).best(1) == 0, "each row costs a pass, so no guess can pay"


def test_company_makes_trees_pay_less() -> None:
    """Sequences that decode together share a pass; verified ones do not."""
    size = taught({1: 1.0, 8: 1.2, 64: 8.0}, 0.05)
    assert size.best(1) > 0 and size.best(8) == 0


def test_best_is_the_maximum_of_the_formula() -> None:
    costs = {1: 1.0, 4: 1.2, 8: 2.0, 16: 4.0, 64: 20.0}
    size, make = AutoSize(costs), np.random.default_rng(1)
    for _ in range(300):
        tree = chain(20)
        size.record(tree, list(range(make.integers(0, 8))), 0.0)
    price = lambda rows: float(np.interp(rows, list(costs), list(costs.values())))
    luck = size._luck
    speeds = {n: (1 + luck[:n].sum()) / price(n + 1) for n in range(1, 64)}
    assert size.best(1) == max(speeds, key=speeds.get)
    assert 1 < size.best(1) < 10


def test_a_larger_tree_is_tried_now_and_then() -> None:
    size = taught(CHEAP, 0.5)
    asked = [size.rows(1) for _ in range(PROBE + 2 * LARGER)]
    assert asked.count(31) == len(asked) - 3
    larger = [at + 1 for at, nodes in enumerate(asked) if nodes == 62]
    assert larger == [PROBE, PROBE + LARGER, PROBE + 2 * LARGER]


def test_tries_that_fail_become_rare() -> None:
    size = taught(DEAR, 0.0)
    tried = [at + 1 for at in range(40 * PROBE) if size.rows(1)]
    assert tried[:3] == [PROBE, 3 * PROBE, 7 * PROBE]
    assert set(np.diff(tried[3:]).tolist()) == {RARELY}
    size.record(chain(4), [0, 1], 0.0)
    assert size.rows(1) == 4, "one that works is repeated"
    size.record(chain(4), [0], 0.0)
    assert size.rows(1) == 0


def test_guesses_that_take_too_long_switch_drafts_off() -> None:
    """After few trees: a draft as large as the model must not be paid for long."""
    size = AutoSize({1: 1.0, 8: 1.2, 64: 8.0})
    assert size.best(1) > 2
    for _ in range(3):
        size.record(chain(4), [0, 1], 4 * 1.5)
    assert size.best(1) == 0


def test_one_guess_that_took_long_is_no_rule() -> None:
    """The first of an answer reads its prompt."""
    size = AutoSize({1: 1.0, 8: 1.2, 64: 8.0})
    for seconds in (4000.0, 0.01, 4000.0):
        size.record(chain(4), [0, 1, 2], seconds)
        assert size.best(1) > 2


def test_levels_are_paid_for_and_not_nodes() -> None:
    """A head guesses 8 nodes in hardly more time than 4: what was met decides, not a price each."""
    costs = {1: 1.0, 64: 2.0}
    by_level, by_node = AutoSize(costs), AutoSize(costs)
    for size, seconds in [(4, 0.5), (8, 0.6), (16, 0.7), (16, 9.0)] * 40:
        # the first four nodes are always kept, the others in one tree of four
        kept = list(range(4 if seconds < 9 else size))
        by_level.record(chain(size), kept, seconds)
        by_node.record(chain(size), kept, size / 8)
    assert by_level._guessing[3::4][:4].tolist() == pytest.approx([0.5, 0.6, 0.65, 0.7])
    assert by_level._guessing[1] == pytest.approx(0.25), "half of four"
    assert by_level._guessing[31] == pytest.approx(1.4), "twice sixteen"
    assert by_level.best(1) == 16 and by_node.best(1) == 4


def test_better_luck_is_noticed() -> None:
    size = taught(CHEAP, 0.0)
    for _ in range(50 * PROBE):
        rows = size.rows(1)
        if rows:
            size.record(chain(rows), list(range(rows)), 0.0)
    assert size.best(1) > 8


def test_costs_are_measured_and_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = FakeExecutor()
    executor.identity = lambda: "one"
    first = remembered(executor, tmp_path)
    assert first and first[1] > 0 and executor.free == FakeExecutor().free, "pages were given back"
    calls = len(executor.calls)
    assert remembered(executor, tmp_path) == first and len(executor.calls) == calls
    executor.identity = lambda: "another"
    remembered(executor, tmp_path)
    assert len(executor.calls) > calls, "another model has its own costs"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"seconds_by_rows": {"1": -1, "2": 1}}', "null"])
def test_a_damaged_file_is_measured_again(tmp_path: Path, text: str) -> None:
    executor = FakeExecutor()
    executor.identity = lambda: "one"
    remembered(executor, tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text(text)
    assert remembered(executor, tmp_path)[1] > 0
    assert file.read_text() != text


def test_no_room_to_measure_means_no_tree(tmp_path: Path) -> None:
    executor = FakeExecutor(capacity=64)
    executor.identity = lambda: "one"
    assert measure(executor) is None
    assert LazySize(executor, tmp_path).rows(1) == 0


def test_an_engine_with_it_gives_the_same_tokens(tmp_path: Path) -> None:
    from endside.engine.drafts.lookup import Lookup

    ask = Request((1, 2, 3, 1, 2), SamplingConfig(max_tokens=100, temperature=0.5, seed=1))
    plain = [one.id for one in Engine(FakeExecutor()).submit(ask)]
    executor = FakeExecutor()
    executor.identity = lambda: "one"
    engine = Engine(executor, drafts=Lookup(), size=LazySize(executor, tmp_path))
    assert [one.id for one in engine.submit(ask)] == plain
