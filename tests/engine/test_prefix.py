"""Stored prefixes: the same text with and without, work done once, and nobody waits for them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from endside.checkpoint import Checkpoint
from endside.engine.engine import Engine
from endside.engine.executor import Executor, Full
from endside.engine.executors import Plan, create
from endside.engine.prefix import PIECE, PrefixCache
from endside.engine.request import Handle, Request, SamplingConfig
from endside.ops.infllm.config import SparseConfig
from tests.engine.fake import PAGE, FakeExecutor
from tests.engine.tiny import HAS_CORE, awkward, checkpoint, tokens


class Inexact(FakeExecutor):
    """A backend whose rows depend on how they are cut."""

    row_exact = False


def _request(prompt: tuple[int, ...], *, max_tokens: int = 5, seed: int = 1) -> Request:
    return Request(prompt, SamplingConfig(temperature=1.0, max_tokens=max_tokens, seed=seed))


def _drain(engine: Engine) -> None:
    for _ in range(5000):
        if engine.idle:
            return
        engine.step()
    pytest.fail("the engine does not come to rest")


def _run(engine: Engine, prompt: tuple[int, ...], **more: int) -> Handle:
    handle = engine.submit(_request(prompt, **more))
    _drain(engine)
    return handle


def _prompt(count: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(int(one) for one in np.random.default_rng(seed).integers(0, 32, count))


def _prefilled(executor: FakeExecutor) -> int:
    return sum(count for verb, _, count in executor.calls if verb == "prefill")


STEMS = [_prompt(count, seed) for seed, count in enumerate((20, 70, 64, 140))]
prompts = st.tuples(
    st.sampled_from(STEMS), st.sampled_from([(), STEMS[1], STEMS[2][:9]]), st.integers(0, 31)
).map(lambda parts: (*parts[0], *parts[1], parts[2]))


@settings(max_examples=40, deadline=None)
@given(
    wanted=st.lists(prompts, min_size=2, max_size=8),
    exact=st.booleans(),
    max_batch=st.integers(1, 4),
    pages=st.integers(4, 12),
    delays=st.lists(st.integers(0, 9), min_size=8, max_size=8),
)
def test_a_stored_prefix_changes_no_token(
    wanted: list[tuple[int, ...]], exact: bool, max_batch: int, pages: int, delays: list[int]
) -> None:
    kind = FakeExecutor if exact else Inexact
    executor = kind(capacity=pages * PAGE)
    engine = Engine(executor, max_batch=max_batch, prefill_chunk=32)
    handles = []
    for prompt, delay in zip(wanted, delays, strict=False):
        handles.append(engine.submit(_request(prompt)))
        for _ in range(delay):
            engine.step()
    _drain(engine)
    for handle in handles:
        alone = Engine(kind(), prefill_chunk=32, prefix_cache=False)
        assert handle.token_ids == _run(alone, handle.request.tokens).token_ids
    assert engine.prefixes.tokens <= executor.capacity
    engine.prefixes.clear()
    assert executor.free == pages, "pages are lost"


@pytest.mark.parametrize(("kind", "reused"), [(FakeExecutor, 192), (Inexact, 160)])
def test_what_was_stored_is_not_run_again(kind: type[FakeExecutor], reused: int) -> None:
    executor = kind()
    engine = Engine(executor, prefill_chunk=80)
    prompt = _prompt(200)
    assert _run(engine, prompt).reused == 0
    executor.calls.clear()
    second = _run(engine, (*prompt[:195], 7, 8, 9), seed=2)
    assert second.reused == reused
    assert _prefilled(executor) == 198 - reused
    counts = engine.prefixes.counts
    assert (counts.lookups, counts.hits, counts.tokens_reused) == (2, 1, reused)


def test_the_whole_prompt_again_still_runs_its_last_token() -> None:
    engine = Engine(FakeExecutor())
    prompt = _prompt(2 * PIECE)
    assert _run(engine, prompt).token_ids == _run(engine, prompt).token_ids
    assert engine.prefixes.counts.tokens_reused == PIECE


@pytest.mark.parametrize(("kind", "reused"), [(FakeExecutor, 128), (Inexact, 64)])
def test_answers_count_where_rows_are_exact(kind: type[FakeExecutor], reused: int) -> None:
    """70 tokens of prompt and 80 of answer: stored pieces of 64, the last token never is."""
    engine = Engine(kind(), prefill_chunk=64)
    first = _run(engine, _prompt(70), max_tokens=80)
    turn = (*first.request.tokens, *first.token_ids, 3, 4)
    assert _run(engine, turn).reused == reused


def test_off_means_nothing_is_kept() -> None:
    executor = FakeExecutor()
    engine = Engine(executor, prefix_cache=False)
    for _ in range(2):
        assert _run(engine, _prompt(200)).reused == 0
        assert executor.free * PAGE == executor.capacity


def test_twins_share_the_work_while_they_run() -> None:
    executor = FakeExecutor(capacity=2048)
    engine = Engine(executor, prefill_chunk=64, max_batch=3)
    prompt = _prompt(200)
    handles = [engine.submit(_request(prompt, seed=seed)) for seed in range(3)]
    _drain(engine)
    assert _prefilled(executor) == 192 + 3 * 8
    assert sum(handle.reused for handle in handles) == 2 * 192
    for seed, handle in enumerate(handles):
        alone = Engine(FakeExecutor(), prefix_cache=False)
        assert handle.token_ids == _run(alone, prompt, seed=seed).token_ids


def test_kept_prefixes_never_make_a_request_wait() -> None:
    executor = FakeExecutor(context=256, capacity=256)
    engine = Engine(executor, max_batch=4)
    _run(engine, _prompt(190))
    assert engine.prefixes.tokens == 192
    large = engine.submit(_request(_prompt(240, seed=5)))
    engine.step()
    assert large.token_ids, "the pages of the kept prefix were not given to it"


def test_nothing_is_dropped_in_vain() -> None:
    """A request that must wait for a running one anyway does not cost the kept prefix."""
    executor = FakeExecutor(context=256, capacity=384)
    engine = Engine(executor, max_batch=4)
    _run(engine, _prompt(150))
    assert engine.prefixes.tokens == 128
    running = engine.submit(_request(_prompt(150, seed=1), max_tokens=40))
    engine.step()
    waiting = engine.submit(_request(_prompt(200, seed=2)))
    for _ in range(5):
        engine.step()
    assert not waiting.token_ids and not running.done
    assert engine.prefixes.counts.tokens_dropped == 0
    _drain(engine)
    assert waiting.token_ids
    assert engine.prefixes.counts.tokens_dropped > 0


@pytest.mark.parametrize(("asked", "pieces"), [(0, 2), (1, 1)])
def test_the_least_recently_used_prefix_goes_first_from_its_end(asked: int, pieces: int) -> None:
    """One question for each state: a fork of this executor shares no pages, so asking needs some,
    and what was not asked for makes room."""
    executor = FakeExecutor(context=256, capacity=448)
    engine = Engine(executor)
    stems = _prompt(140), _prompt(140, seed=1)
    for which in (0, 1, 0):
        _run(engine, stems[which])
    _run(engine, _prompt(195, seed=2))  # 200 tokens, four pages; three are free
    assert engine.prefixes.counts.tokens_dropped == PIECE
    assert _run(engine, stems[asked], max_tokens=1).reused == pieces * PIECE


def test_a_longer_turn_takes_the_place_of_a_shorter_one() -> None:
    executor = FakeExecutor()
    engine = Engine(executor)
    prompt = _prompt(250)
    for count in (70, 140, 250, 130):
        _run(engine, prompt[:count], max_tokens=1)
    assert engine.prefixes.tokens == 3 * PIECE
    assert executor.capacity // PAGE - executor.free == 3


def test_a_cancelled_request_leaves_what_it_had_read() -> None:
    engine = Engine(FakeExecutor(), prefill_chunk=64)
    handle = engine.submit(_request(_prompt(200)))
    engine.step()
    handle.cancel()
    engine.step()
    assert _run(engine, _prompt(200)).reused == 64


class Executors:
    """The same small sparse model on every executor that is here."""

    def __init__(self, model: Checkpoint) -> None:
        self.model = model

    def make(self, name: str, **plan: object) -> Executor:
        made = {"context": 1300, "threads": 2, "max_batch": 2, **plan}
        return create(self.model, Plan(executor=name, **made))


@pytest.fixture(scope="module")
def executors(tmp_path_factory: pytest.TempPathFactory) -> Executors:
    # three blocks of 64: from 400 tokens on, less than half of them are seen
    sizes = SparseConfig(window_size=64, topk=2, dense_len=128)
    config = awkward("tiny-sparse", tie_word_embeddings=True, sparse=sizes)
    return Executors(checkpoint(tmp_path_factory.mktemp("prefix"), config))


NAMES = ["torch", pytest.param("native", marks=pytest.mark.skipif(not HAS_CORE, reason="no core"))]


@pytest.mark.parametrize("name", NAMES)
def test_keys_of_a_stored_prefix_have_the_same_bits(executors: Executors, name: str) -> None:
    """Sparse attention, compressed keys of the prefix included; the fork's start is no page's."""
    executor = executors.make(name)
    cache = PrefixCache(executor, chunk=256)
    ids = tokens(1100)
    assert np.mean([executor.attention(n)[1] / n for n in range(900, 1100)]) < 0.5
    first, stored = cache.open(ids, 1200)
    assert stored == 0
    _fill(executor, first, ids, 0)
    cache.note(first, ids)
    cache.close(first, ids, len(ids))
    other = np.append(ids[:1000], tokens(90, seed=7))
    fork, stored = cache.open(other, 1200)
    assert stored == (960 if name == "native" else 768)
    got = _fill(executor, fork, other, stored)
    fresh = executors.make(name)
    seq = fresh.open(1200)
    np.testing.assert_array_equal(got, _fill(fresh, seq, other, 0))
    for token in (5, 6, 7):
        pair = [one.decode([at], np.array([token])) for one, at in ((executor, fork), (fresh, seq))]
        np.testing.assert_array_equal(*pair)


def _fill(executor: Executor, seq: int, ids: np.ndarray, stored: int) -> np.ndarray:
    """Run the rest of a prompt in chunks of 256 -> the last logits."""
    while stored < len(ids):
        end = min((stored // 256 + 1) * 256, len(ids))
        logits = executor.prefill(seq, ids[stored:end])
        stored = end
    assert logits is not None
    return logits


@pytest.mark.parametrize("name", NAMES)
def test_the_next_turn_of_a_chat_is_the_same_text(executors: Executors, name: str) -> None:
    config = SamplingConfig(max_tokens=30)
    cached, plain = (
        Engine(executors.make(name), prefix_cache=on, prefill_chunk=256) for on in (True, False)
    )
    prompt = tuple(tokens(600))
    for turn in range(2):
        handles = [engine.submit(Request(prompt, config)) for engine in (cached, plain)]
        for engine in (cached, plain):
            _drain(engine)
        assert handles[0].token_ids == handles[1].token_ids
        assert (handles[0].reused > 0) == (turn > 0)
        prompt += (*handles[0].token_ids, *tokens(20, seed=turn))
    assert cached.prefixes.counts.tokens_reused == (576 if name == "native" else 512)


@pytest.mark.parametrize("name", NAMES)
def test_pages_are_shared_and_given_back(executors: Executors, name: str) -> None:
    """Two forks of one stored prompt fit where two copies would not."""
    executor = executors.make(name, capacity=2560)
    cache, ids, all_free = PrefixCache(executor, chunk=256), tokens(1100), executor.room()
    first, _ = cache.open(ids, 1101)
    _fill(executor, first, ids, 0)
    cache.close(first, ids, len(ids))
    (kept,) = cache._kept
    assert executor.room() < executor.room([kept]) == all_free
    forks = []
    with pytest.raises(Full):
        for _ in range(9):
            forks.append(cache.open(ids, 1250)[0])
    alone = -(-1250 // executor.page) * executor.page
    assert len(forks) > executor.capacity // alone, "no page is shared"
    for fork in forks:
        cache.close(fork, ids[:0], 0)
    cache.clear()
    assert executor.room() == all_free
