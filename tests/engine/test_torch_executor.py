"""The torch executor with a real model: exact under any company, and equal to a plain forward."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from endside.engine.engine import Engine
from endside.engine.executor import Full
from endside.engine.executors.torch import TorchExecutor
from endside.engine.request import Request, SamplingConfig
from endside.model.batch import Batch
from endside.model.presets import preset
from endside.model.transformer import Transformer


def _executor(name: str = "tiny", *, context: int = 400, capacity: int = 1024) -> TorchExecutor:
    model = Transformer(preset(name), context=context)
    model.init_weights(torch.Generator().manual_seed(5))
    return TorchExecutor(model, context=context, capacity=capacity)


def _tokens(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, 320, count)


def _plain(executor: TorchExecutor, tokens: np.ndarray) -> np.ndarray:
    """Logits (T, V) of one forward without a cache."""
    with torch.inference_mode():
        hidden = executor.model(Batch(tokens=torch.from_numpy(tokens)[None]))
        return executor.model.logits(hidden)[0].numpy()


@pytest.mark.parametrize(
    ("name", "length"), [("tiny", 1), ("tiny", 63), ("tiny", 129), ("tiny-sparse", 300)]
)
def test_chunks_and_single_steps_equal_one_forward(name: str, length: int) -> None:
    executor = _executor(name)
    tokens = _tokens(length)
    expected = _plain(executor, tokens)
    scale = np.abs(expected).max()
    seq = executor.open(length)
    cut = length // 2
    rows = []
    if cut:
        assert executor.prefill(seq, tokens[: cut - 1], logits="none") is None or cut == 1
        rows.append(executor.prefill(seq, tokens[cut - 1 : cut], logits="last")[None])
    rows += [executor.decode([seq], tokens[at : at + 1]) for at in range(cut, length)]
    got = np.concatenate(rows)
    assert executor.length(seq) == length
    np.testing.assert_allclose(got, expected[length - len(got) :], rtol=0, atol=2e-5 * scale)


def test_prefill_all_gives_every_position() -> None:
    executor = _executor()
    tokens = _tokens(70)
    got = executor.prefill(executor.open(70), tokens, logits="all")
    expected = _plain(executor, tokens)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_company_changes_no_bit() -> None:
    """Logits of a decode step, alone and among others that stand at other lengths."""
    executor = _executor()
    alone, together = executor.open(90), [executor.open(80 + i) for i in range(4)]
    prompt = _tokens(66)
    for number, seq in enumerate((alone, *together)):
        executor.prefill(seq, prompt if number < 2 else _tokens(3 + 9 * number, seed=number))
    single = executor.decode([alone], np.array([9]))
    several = executor.decode(together[::-1], np.array([5, 6, 7, 9]))
    np.testing.assert_array_equal(several[3], single[0])


def test_company_changes_no_token_of_sparse_attention() -> None:
    """Prompts on both sides of dense_len 256, answers that cross it; chunks of 64."""
    executor = _executor("tiny-sparse", context=700, capacity=3 * 704)
    wanted = [
        Request(
            tuple(_tokens(length, seed=length)),
            SamplingConfig(max_tokens=8, temperature=2.0, seed=length),
        )
        for length in (250, 255, 256, 330, 640)
    ]
    answers = []
    for max_batch in (1, 3):
        engine = Engine(executor, max_batch=max_batch, prefill_chunk=64, prefix_cache=False)
        handles = [engine.submit(request) for request in wanted[:: 1 if max_batch == 1 else -1]]
        while not engine.idle:
            engine.step()
        answers.append({len(one.request.tokens): one.token_ids for one in handles})
    assert answers[0] == answers[1]


def test_a_full_pool_says_so() -> None:
    executor = _executor(capacity=128)
    first = executor.open(100)
    with pytest.raises(Full):
        executor.open(1)
    executor.close(first)
    executor.open(128)


def test_a_chain_is_verified_then_partly_accepted() -> None:
    executor = _executor("tiny-sparse")
    prompt, draft = _tokens(270), _tokens(6, seed=1)
    seq = executor.open(330)
    executor.prefill(seq, prompt)
    logits = executor.verify(seq, draft, np.arange(6) - 1)
    expected = _plain(executor, np.concatenate([prompt, draft]))
    tolerance = 2e-5 * np.abs(expected).max()
    np.testing.assert_allclose(logits, expected[270:], rtol=0, atol=tolerance)
    executor.accept(seq, [0, 1, 2])
    assert executor.length(seq) == 273
    after = executor.decode([seq], np.array([40]))[0]
    kept = np.concatenate([prompt, draft[:3], [40]])
    np.testing.assert_allclose(after, _plain(executor, kept)[-1], rtol=0, atol=tolerance)


PARENTS = np.array([-1, 0, 0, 1, 1, 2, 5, 3, -1], np.int32)


def _root_path(row: int) -> list[int]:
    return ([] if PARENTS[row] < 0 else _root_path(int(PARENTS[row]))) + [row]


@pytest.mark.parametrize("spare", [0, 128, 1024])
@pytest.mark.parametrize("length", [1, 63, 64, 127, 900])
def test_a_node_sees_what_plain_decoding_sees_on_its_path(length: int, spare: int) -> None:
    """Sparse attention; with pages for all paths at once, for one, and for none beside it."""
    executor = _executor("tiny-sparse", capacity=-(-(length + 9) // 64) * 64 + spare)
    prompt, draft = _tokens(length), _tokens(9, seed=1)
    seq = executor.open(length + 9)
    executor.prefill(seq, prompt)
    free = executor.room()
    logits = executor.verify(seq, draft, PARENTS)
    plain = _executor("tiny-sparse")
    for row in range(9):
        expected = _plain(plain, np.concatenate([prompt, draft[_root_path(row)]]))[-1]
        tolerance = 2e-5 * np.abs(expected).max()
        np.testing.assert_allclose(logits[row], expected, rtol=0, atol=tolerance)
    path = [0, 2, 5, 6]
    executor.accept(seq, path)
    assert executor.length(seq) == length + 4 and executor.room() == free
    after = executor.decode([seq], np.array([40]))[0]
    kept = np.concatenate([prompt, draft[path], [40]])
    np.testing.assert_allclose(after, _plain(plain, kept)[-1], rtol=0, atol=tolerance)
    if length == 900:
        seen = executor.attention(length)[1] / length
        print(f"visible / available {seen:.2f}")
        assert seen < 0.5, "sparsity does not act"


def test_a_tree_without_a_verdict_is_forgotten() -> None:
    executor = _executor()
    seq = executor.open(64)
    executor.prefill(seq, _tokens(5))
    free = executor.room()
    executor.verify(seq, _tokens(9, seed=1), PARENTS)
    with pytest.raises(AssertionError, match="no path"):
        executor.accept(seq, [0, 3])
    executor.verify(seq, _tokens(9, seed=1), PARENTS)
    executor.trim(seq, 5)
    assert executor.length(seq) == 5 and executor.room() == free


def test_fork_shares_and_diverges() -> None:
    executor = _executor()
    prompt = _tokens(100)
    first = executor.open(150)
    executor.prefill(first, prompt)
    second = executor.fork(first, 120)
    one, two = (
        executor.decode([seq], np.array([token]))[0] for seq, token in ((first, 3), (second, 4))
    )
    for got, token in ((one, 3), (two, 4)):
        expected = _plain(executor, np.append(prompt, token))[-1]
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    with pytest.raises(Full):
        executor.fork(first, 5000)


def test_attention_is_reported() -> None:
    assert _executor().attention(300) == ("dense", 300)
    sparse = _executor("tiny-sparse", context=2048, capacity=64)
    assert sparse.attention(200) == ("dense", 200)
    assert sparse.attention(1024) == ("sparse", 6 * 64)


requests = st.builds(
    lambda prompt, length, seed, **values: Request(
        tuple(_tokens(length, seed=prompt)), SamplingConfig(seed=seed, **values), {1}
    ),
    st.integers(0, 5),
    st.integers(1, 80),
    st.integers(0, 99),
    max_tokens=st.integers(1, 12),
    temperature=st.sampled_from([0.0, 1.0, 3.0]),
    repetition_penalty=st.sampled_from([None, 1.2]),
)


@pytest.fixture(scope="module")
def shared() -> TorchExecutor:
    return _executor(capacity=6 * 64)


@settings(max_examples=12, deadline=None)
@given(
    wanted=st.lists(requests, min_size=2, max_size=5),
    max_batch=st.integers(1, 4),
    order=st.randoms(use_true_random=False),
)
def test_the_same_seed_gives_the_same_text_in_any_company(shared, wanted, max_batch, order) -> None:
    expected = []
    for request in wanted:
        alone = Engine(shared, max_batch=1, prefill_chunk=32, prefix_cache=False)
        handle = alone.submit(request)
        expected.append([token.id for token in handle])
    engine = Engine(shared, max_batch=max_batch, prefill_chunk=32)
    numbers = list(range(len(wanted)))
    order.shuffle(numbers)
    handles = {number: engine.submit(wanted[number]) for number in numbers}
    while not engine.idle:
        engine.step()
    assert [handles[number].token_ids for number in range(len(wanted))] == expected
    engine.prefixes.clear()
    assert shared.cache.room() == shared.capacity
