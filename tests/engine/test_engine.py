"""The engine over a fake executor: scheduling, independence of requests, limits, no leaks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from endside.engine.engine import Engine
from endside.engine.request import Handle, Request, SamplingConfig
from endside.errors import UserError
from tests.engine.fake import FakeExecutor

BYTES = [bytes([97 + i % 26]) * (1 + i % 3) for i in range(32)]
STOP_IDS = frozenset({31})


def _request(
    prompt: tuple[int, ...], *, max_tokens: int | None = 9, seed: int = 3, **more: object
) -> Request:
    values = {"temperature": 1.0, "max_tokens": max_tokens, "seed": seed, **more}
    return Request(prompt, SamplingConfig(**values), STOP_IDS)


def _drain(engine: Engine) -> None:
    for _ in range(5000):
        if engine.idle:
            return
        engine.step()
    pytest.fail("the engine does not come to rest")


def _answer(handle: Handle) -> tuple[list[int], str | None]:
    return handle.token_ids, handle.finish_reason


def _alone(request: Request) -> tuple[list[int], str | None]:
    handle = Engine(FakeExecutor(), BYTES, max_batch=1, prefill_chunk=8).submit(request)
    for _ in handle:
        pass
    return _answer(handle)


requests = st.builds(
    _request,
    st.lists(st.integers(0, 31), min_size=1, max_size=40).map(tuple),
    max_tokens=st.integers(1, 30),
    seed=st.integers(0, 99),
    temperature=st.sampled_from([0, 0.7, 1.5]),
    repetition_penalty=st.sampled_from([None, 1.3]),
    stop=st.sampled_from([(), ("ab",), ("zz", "c")]),
)


@settings(max_examples=40, deadline=None)
@given(
    wanted=st.lists(requests, min_size=1, max_size=7),
    max_batch=st.integers(1, 5),
    delays=st.lists(st.integers(0, 6), min_size=7, max_size=7),
)
def test_the_same_seed_gives_the_same_text_in_any_company(
    wanted: list[Request], max_batch: int, delays: list[int]
) -> None:
    executor = FakeExecutor(capacity=4 * 64)
    engine = Engine(executor, BYTES, max_batch=max_batch, prefill_chunk=8)
    handles = []
    for request, delay in zip(wanted, delays, strict=False):
        handles.append(engine.submit(request))
        for _ in range(delay):
            engine.step()
    _drain(engine)
    assert [_answer(handle) for handle in handles] == [_alone(request) for request in wanted]
    assert executor.free == 4


def test_several_sequences_share_a_step() -> None:
    executor = FakeExecutor()
    engine = Engine(executor, BYTES, max_batch=3)
    for first in range(5):
        engine.submit(_request((first, 1)))
    _drain(engine)
    sizes = [count for verb, count, _ in executor.calls if verb == "decode"]
    assert max(sizes) == 3


def test_chunk_borders_belong_to_the_sequence() -> None:
    executor = FakeExecutor()
    engine = Engine(executor, BYTES, max_batch=4, prefill_chunk=16)
    engine.submit(_request(tuple(range(20)) * 2 + (5,)))
    engine.submit(_request((1, 2, 3)))
    _drain(engine)
    assert [size for verb, _, size in executor.calls if verb == "prefill"] == [16, 3, 16, 9]


def test_a_long_prompt_does_not_freeze_the_others() -> None:
    executor = FakeExecutor(context=2048, capacity=8192)
    engine = Engine(executor, BYTES, max_batch=4, prefill_chunk=8)
    long = engine.submit(_request((1,) * 1500))
    short = engine.submit(_request((2,) * 20, max_tokens=5))
    for _ in range(14):
        engine.step()
    assert short.done
    assert not long.token_ids
    _drain(engine)
    assert long.token_ids


def test_first_come_first_served_when_pages_are_short() -> None:
    engine = Engine(FakeExecutor(context=256, capacity=256), BYTES, max_batch=8)
    first = engine.submit(_request((1,) * 100, max_tokens=5))
    large = engine.submit(_request((2,) * 180, max_tokens=5))
    small = engine.submit(_request((3,), max_tokens=2))
    order = []
    while not engine.idle:
        order += [token.request for token in engine.step()]
    seen = list(dict.fromkeys(order))
    assert seen == [first.number, large.number, small.number]


def test_no_page_is_lost_over_thousands_of_requests() -> None:
    executor = FakeExecutor(capacity=2048)
    engine = Engine(executor, BYTES, max_batch=6, prefill_chunk=8)
    rng = np.random.default_rng(0)
    live: list[Handle] = []
    for number in range(3000):
        prompt = tuple(int(x) for x in rng.integers(0, 31, rng.integers(1, 12)))
        live.append(
            engine.submit(_request(prompt, max_tokens=int(rng.integers(1, 6)), seed=number))
        )
        if rng.random() < 0.2:
            live[rng.integers(0, len(live))].cancel()
        for _ in range(int(rng.integers(0, 4))):
            engine.step()
    _drain(engine)
    engine.step()
    assert all(handle.done for handle in live)
    assert {handle.finish_reason for handle in live} == {"stop", "length", "cancelled"}
    assert executor.free * 64 == executor.capacity
    assert not engine.scheduler.running


def test_cancel_gives_the_pages_back_and_ends_the_iteration() -> None:
    executor = FakeExecutor(capacity=256)
    engine = Engine(executor, BYTES)
    handle = engine.submit(_request((1, 2), max_tokens=None, temperature=2.0))
    tokens = []
    for token in handle:
        tokens.append(token.id)
        if len(tokens) == 3:
            handle.cancel()
    assert tokens == handle.token_ids
    assert len(tokens) == 3
    assert handle.finish_reason == "cancelled"
    engine.step()
    assert executor.free == 4


def test_a_waiting_request_can_be_cancelled() -> None:
    engine = Engine(FakeExecutor(), BYTES, max_batch=1)
    running, waiting = engine.submit(_request((1,))), engine.submit(_request((2,)))
    waiting.cancel()
    _drain(engine)
    assert running.token_ids
    assert not waiting.token_ids
    assert waiting.finish_reason == "cancelled"


def test_without_max_tokens_the_context_is_filled() -> None:
    engine = Engine(FakeExecutor(context=64), BYTES)
    request = Request((1,) * 10, SamplingConfig(temperature=0))
    handle = engine.submit(request)
    _drain(engine)
    assert handle.finish_reason == "length"
    assert len(handle.token_ids) == 54


def test_stop_ids_and_stop_strings_end_the_answer() -> None:
    reference, _ = _alone(_request((4, 5), max_tokens=30, temperature=0))
    stop_id = Request((4, 5), SamplingConfig(max_tokens=30, temperature=0), {reference[3]})
    engine = Engine(FakeExecutor(), BYTES)
    handle = engine.submit(stop_id)
    tokens = list(handle)
    assert handle.finish_reason == "stop"
    first = reference.index(reference[3])
    assert handle.token_ids == reference[: first + 1]
    assert tokens[-1].text == b""
    text = b"".join(BYTES[one] for one in reference).decode()
    stop = text[4:7]
    handle = engine.submit(_request((4, 5), max_tokens=30, temperature=0, stop=stop))
    shown = b"".join(token.text for token in handle)
    assert shown.decode() == text[: text.index(stop)]
    assert handle.finish_reason == "stop"


def test_withheld_text_comes_out_when_the_answer_ends_otherwise() -> None:
    reference, _ = _alone(_request((8, 9), max_tokens=6, temperature=0))
    text = b"".join(BYTES[one] for one in reference).decode()
    engine = Engine(FakeExecutor(), BYTES)
    never = text[-2:] + "#"
    handle = engine.submit(_request((8, 9), max_tokens=6, temperature=0, stop=never))
    pieces = [token.text for token in handle]
    assert b"".join(pieces).decode() == text
    assert handle.finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ((1,) * 256, "prompt has 256 tokens, cache holds 256"),
        ((1,) * 9214, "prompt has 9,214 tokens, cache holds 256.*--context"),
        ((1, 32), "token id 32, the model knows 0 to 31"),
        ((1, -1), "token id -1"),
    ],
)
def test_what_can_never_run_is_refused_at_the_door(prompt: tuple[int, ...], message: str) -> None:
    executor = FakeExecutor(context=256)
    with pytest.raises(UserError, match=message):
        Engine(executor, BYTES).submit(_request(prompt))
    assert not executor.calls


def test_stop_strings_need_the_bytes_of_the_tokens() -> None:
    with pytest.raises(UserError, match="token_bytes"):
        Engine(FakeExecutor()).submit(_request((1,), stop="x"))


def test_broken_logits_end_one_request_and_no_other() -> None:
    executor = FakeExecutor()
    engine = Engine(executor, BYTES)
    good, bad = engine.submit(_request((1, 2))), engine.submit(_request((1, 2, 3)))
    engine.step()
    append = executor._append

    def broken(seq: int, token: int) -> np.ndarray:
        row = append(seq, token)
        return np.full_like(row, np.nan) if seq == 2 else row

    executor._append = broken
    with pytest.raises(UserError, match="no finite maximum"):
        list(bad)
    _drain(engine)
    assert _answer(good) == _alone(_request((1, 2)))
    assert executor.free * 64 == executor.capacity


@pytest.mark.parametrize("moment", range(2, 12))
def test_an_interrupt_inside_a_step_changes_nothing(moment: int) -> None:
    """Ctrl-C may hit between storing a token and taking note of it; the others must not suffer."""
    wanted = [_request((1, 2) * 8, temperature=0), _request((7,) * 11, temperature=0)]
    executor = FakeExecutor()
    engine = Engine(executor, BYTES, prefill_chunk=8)
    handles = [engine.submit(request) for request in wanted]
    append, calls = executor._append, iter(range(10**6))

    def interrupted(seq: int, token: int) -> np.ndarray:
        row = append(seq, token)
        if next(calls) == 3 * moment:
            raise KeyboardInterrupt
        return row

    executor._append = interrupted
    with pytest.raises(KeyboardInterrupt):
        _drain(engine)
    _drain(engine)
    assert [_answer(handle) for handle in handles] == [_alone(request) for request in wanted]


def test_a_fresh_seed_is_reported_and_repeats_the_text() -> None:
    engine = Engine(FakeExecutor(), BYTES)
    first = engine.submit(_request((1, 2), seed=None, max_tokens=20))
    other = engine.submit(_request((1, 2), seed=None, max_tokens=20))
    _drain(engine)
    assert first.seed != other.seed
    assert first.token_ids != other.token_ids
    again = engine.submit(_request((1, 2), seed=first.seed, max_tokens=20))
    _drain(engine)
    assert again.token_ids == first.token_ids


@pytest.mark.parametrize("wrong", [{"max_batch": 0}, {"prefill_chunk": 0}])
def test_engine_sizes_are_checked(wrong: dict[str, int]) -> None:
    with pytest.raises(UserError, match="at least 1"):
        Engine(FakeExecutor(), BYTES, **wrong)
