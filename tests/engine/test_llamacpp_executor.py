"""llama.cpp under our engine: the same greedy text, trees, prefixes, session files and traces.

Needs the optional package, or the build in the folder of peers (see tests/formats).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from endside import gguf_tokenizer
from endside.engine import session
from endside.engine.draft import FixedSize
from endside.engine.drafts.lookup import Lookup
from endside.engine.engine import Engine
from endside.engine.executor import Executor, Full
from endside.engine.executors import Plan, create
from endside.engine.executors.llamacpp import LlamaExecutor
from endside.engine.request import Request, SamplingConfig
from endside.errors import UserError
from endside.formats import convert as conversion
from endside.models import open_model
from endside.verbs.trace import compare
from tests.formats.test_llamacpp import folder, llama, published  # noqa: F401  (fixtures)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["f32", "f16"])
def file(request: pytest.FixtureRequest, llama: Any, folder: Path) -> Path:  # noqa: F811
    """A random MiniCPM with the published vocabulary, as a .gguf file."""
    path = folder.parent / f"{request.param}.gguf"
    if not path.exists():
        conversion.convert(folder, path, to="gguf", type=request.param, texts=gguf_tokenizer)
    assert llama is not None
    return path


def _make(path: Path, name: str, **plan: object) -> Executor:
    made = {"context": 700, "threads": 1, "max_batch": 3, **plan}
    return create(open_model(path), Plan(executor=name, **made))


@pytest.fixture(scope="module")
def theirs(file: Path) -> LlamaExecutor:
    made = _make(file, "llamacpp")
    assert isinstance(made, LlamaExecutor)
    return made


def _prompt(count: int, seed: int = 0) -> tuple[int, ...]:
    return (1, *(int(one) for one in np.random.default_rng(seed).integers(3, 73440, count - 1)))


def _answers(engine: Engine, prompts: list[tuple[int, ...]], count: int = 20) -> list[list[int]]:
    sampling = SamplingConfig(max_tokens=count)
    handles = [engine.submit(Request(prompt, sampling)) for prompt in prompts]
    while not engine.idle:
        engine.step()
    return [handle.token_ids for handle in handles]


def test_the_same_greedy_text_as_our_executors(file: Path, theirs: LlamaExecutor) -> None:
    """Together, in several chunks, the second and third behind a stored prefix."""
    long = _prompt(560)
    prompts = [_prompt(7, 1), long, (*long[:530], 5, 6, 7), _prompt(40, 2)]
    engine = Engine(theirs, max_batch=3)
    got = _answers(engine, prompts) + _answers(engine, [prompts[1]])
    assert engine.prefixes.counts.tokens_reused >= 512
    engine.prefixes.clear()
    assert theirs.room() == theirs.capacity
    for name in ("native", "torch"):
        ours = _make(file, name)
        beside = Engine(ours, max_batch=3)
        want = _answers(beside, prompts)
        beside.prefixes.clear()
        for prompt, one, other in zip([*prompts, prompts[1]], got, [*want, want[1]], strict=True):
            _same_or_undecided(ours, theirs, prompt, one, other)


def _same_or_undecided(
    ours: Executor, theirs: Executor, prompt: tuple[int, ...], got: list[int], want: list[int]
) -> None:
    """Texts may part only where both tokens are as likely as the executors' sums differ."""
    if got == want:
        return
    at = next(i for i, (one, other) in enumerate(zip(got, want, strict=True)) if one != other)
    history = np.array([*prompt, *want[:at]])
    rows = []
    for executor in (ours, theirs):
        seq = executor.open(len(history))
        rows.append(executor.prefill(seq, history, logits="last"))
        executor.close(seq)
    apart = np.abs(rows[0] - rows[1]).max()
    print(f"token {at} of {len(want)}: logits differ by {apart:.1e}")
    assert apart <= 5e-3 * np.abs(rows[0]).max(), "no rounding"
    assert rows[0][want[at]] - rows[0][got[at]] <= 2 * apart, "decided, and yet another token"


PARENTS = np.array([-1, 0, 0, 1, -1, 4, 3])
DRAFT = np.array([40, 41, 42, 43, 44, 45, 46])


def _path(row: int) -> list[int]:
    rows: list[int] = []
    while row >= 0:
        rows.insert(0, row)
        row = int(PARENTS[row])
    return rows


def _near(got: np.ndarray, want: np.ndarray) -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=5e-3 * np.abs(want).max())


@pytest.mark.parametrize("kept", [[], [0], [0, 1, 3, 6], [4, 5], [0, 2]])
def test_a_tree_is_as_many_plain_paths(theirs: LlamaExecutor, kept: list[int]) -> None:
    prompt = np.array(_prompt(65, 3))
    seq, plain = theirs.open(120), theirs.open(120)
    other = theirs.open(120)  # a neighbour must not be seen
    theirs.prefill(other, np.array(_prompt(30, 9)), logits="none")
    theirs.prefill(seq, prompt, logits="none")
    theirs.prefill(plain, prompt, logits="none")
    logits = theirs.verify(seq, DRAFT, PARENTS)
    for row in range(len(DRAFT)):
        for token in DRAFT[_path(row)]:
            want = theirs.decode([plain], np.array([token]))[0]
        _near(logits[row], want)
        theirs.trim(plain, len(prompt))
    apart = np.abs(logits[3] - logits[2]).max()
    assert apart > 0.1 * np.abs(logits).max(), "rows of a tree must differ to show anything"
    theirs.accept(seq, kept)
    assert theirs.length(seq) == len(prompt) + len(kept)
    if kept:
        theirs.prefill(plain, DRAFT[kept], logits="none")
    _near(theirs.decode([seq], np.array([50]))[0], theirs.decode([plain], np.array([50]))[0])
    for one in (seq, plain, other):
        theirs.close(one)
    assert theirs.room() == theirs.capacity


def test_drafts_change_no_token(theirs: LlamaExecutor) -> None:
    prompt = _prompt(30, 5) * 3
    plain, drafted = (
        Engine(theirs, prefix_cache=False),
        Engine(theirs, prefix_cache=False, drafts=Lookup(), size=FixedSize(6)),
    )
    assert _answers(plain, [prompt], 40) == _answers(drafted, [prompt], 40)


def test_pages_are_counted(theirs: LlamaExecutor) -> None:
    first = theirs.open(1024)
    ids = np.array(_prompt(600, 4))
    theirs.prefill(first, ids, logits="none")
    fork = theirs.fork(first, 700, 300)
    assert (theirs.length(fork), theirs.length(first)) == (300, 600)
    _near(
        theirs.prefill(fork, ids[300:310]), theirs.prefill(_copy(theirs, ids[:300]), ids[300:310])
    )
    theirs.shrink(first, 100)
    assert theirs.length(first) == 100
    with pytest.raises(Full):
        theirs.open(theirs.capacity)
    for seq in list(theirs._number):
        theirs.close(seq)
    assert theirs.room() == theirs.capacity


def _copy(executor: LlamaExecutor, ids: np.ndarray) -> int:
    seq = executor.open(700)
    executor.prefill(seq, ids, logits="none")
    return seq


def test_a_session_goes_on(file: Path, theirs: LlamaExecutor, tmp_path: Path) -> None:
    prompt = _prompt(560, 6)
    engine = Engine(theirs)
    want = _answers(engine, [prompt])
    assert len(session.save(tmp_path / "talk", engine.prefixes, {}).tokens) == 512
    engine.prefixes.clear()
    fresh = Engine(_make(file, "llamacpp"))
    session.load(tmp_path / "talk", fresh.prefixes)
    assert _answers(fresh, [prompt]) == want
    assert fresh.prefixes.counts.tokens_reused == 512
    with pytest.raises(UserError, match="was saved with another model"):
        session.load(tmp_path / "talk", Engine(_make(file, "llamacpp", context=800)).prefixes)


def test_stages_are_those_of_our_executors(file: Path, theirs: LlamaExecutor) -> None:
    ids = np.array(_prompt(50, 7))
    for stage in compare(_make(file, "torch").trace(ids), theirs.trace(ids)):
        assert stage.relative < 0.01, stage


def test_what_it_cannot_run_is_refused(file: Path, folder: Path) -> None:  # noqa: F811
    with pytest.raises(UserError, match=r"holds no \.gguf file"):
        _make(folder, "llamacpp")
    with pytest.raises(UserError, match=r"llama\.cpp has dense attention only"):
        _make(file, "llamacpp", attention="sparse")
    with pytest.raises(UserError, match="quant int4 needs the native executor"):
        _make(file, "llamacpp", quant="int4")
