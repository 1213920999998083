"""Session files: the same bits after a new start, and a clear refusal of every wrong file."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from endside.checkpoint import Checkpoint
from endside.engine import session
from endside.engine.engine import Engine
from endside.engine.executor import Executor
from endside.engine.executors import Plan, create
from endside.engine.request import Handle, Request, SamplingConfig
from endside.errors import UserError
from endside.ops.infllm.config import SparseConfig
from tests.engine.tiny import HAS_CORE, awkward, checkpoint, tokens

SIZES = SparseConfig(window_size=64, topk=2, dense_len=128)
CONFIG = awkward("tiny-sparse", tie_word_embeddings=True, sparse=SIZES)
NAMES = ["torch", pytest.param("native", marks=pytest.mark.skipif(not HAS_CORE, reason="no core"))]
CHUNK = 256


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return checkpoint(tmp_path_factory.mktemp("session"), CONFIG)


def _engine(model: Checkpoint, name: str, **plan: object) -> Engine:
    made = {"context": 1300, "threads": 2, "max_batch": 2, **plan}
    return Engine(create(model, Plan(executor=name, **made)), prefill_chunk=CHUNK)


def _run(engine: Engine, prompt: tuple[int, ...], count: int = 12) -> Handle:
    handle = engine.submit(Request(prompt, SamplingConfig(max_tokens=count)))
    for _ in handle:
        pass
    return handle


def _prompt(count: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(int(one) for one in tokens(count, seed))


@pytest.mark.parametrize("name", NAMES)
def test_a_conversation_goes_on_with_the_same_bits(
    model: Checkpoint, name: str, tmp_path: Path
) -> None:
    """Sparse attention, 1,100 tokens: compressed keys of the file are what chooses blocks."""
    first, fresh = _engine(model, name), _engine(model, name)
    visible = [first.executor.attention(n)[1] / n for n in range(1000, 1130)]
    assert np.mean(visible) < 0.5
    prompt = _prompt(1100)
    _run(first, prompt)
    saved = session.save(tmp_path / "talk", first.prefixes, {"history": ["é"]})
    assert len(saved.tokens) == (1088 if name == "native" else 1024)
    loaded = session.load(tmp_path / "talk", fresh.prefixes)
    assert loaded == saved and loaded.notes == {"history": ["é"]}
    assert loaded.tokens == prompt[: len(loaded.tokens)]
    further = (*prompt, *_prompt(20, seed=2))
    got, plain = _run(fresh, further), _run(_engine(model, name), further)
    assert got.reused == len(loaded.tokens) and plain.reused == 0
    assert got.token_ids == plain.token_ids
    for one, two in zip(_stored(first.executor, fresh, prompt), _stored_again(model, name, prompt)):
        np.testing.assert_array_equal(one, two)


def _stored(executor: Executor, engine: Engine, prompt: tuple[int, ...]) -> list[np.ndarray]:
    """Logits of three steps behind what the loaded file holds of `prompt`."""
    seq, stored = engine.prefixes.open(np.array(prompt), 1200)
    assert stored and executor is not engine.executor
    return _steps(engine.executor, seq, prompt, stored)


def _stored_again(model: Checkpoint, name: str, prompt: tuple[int, ...]) -> list[np.ndarray]:
    """The same without any file."""
    executor = _engine(model, name).executor
    return _steps(executor, executor.open(1200), prompt, 0)


def _steps(executor: Executor, seq: int, prompt: tuple[int, ...], at: int) -> list[np.ndarray]:
    ids = np.array(prompt)
    while at < len(ids):
        end = min((at // CHUNK + 1) * CHUNK, len(ids))
        logits = executor.prefill(seq, ids[at:end])
        at = end
    assert logits is not None
    return [logits, *(executor.decode([seq], np.array([one]))[0] for one in (4, 5, 6))]


@pytest.mark.skipif(not HAS_CORE, reason="no native core")
@pytest.mark.parametrize("kv", ["f16", "bf16", "int8"])
def test_every_type_of_cache(model: Checkpoint, kv: str, tmp_path: Path) -> None:
    engines = [_engine(model, "native", kv=kv, quant="int4") for _ in range(2)]
    prompt = _prompt(700)
    _run(engines[0], prompt)
    session.save(tmp_path / "talk", engines[0].prefixes, {})
    session.load(tmp_path / "talk", engines[1].prefixes)
    loaded, stored = engines[1].prefixes.open(np.array(prompt), 800)
    assert stored == 640
    plain = _engine(model, "native", kv=kv, quant="int4").executor
    seq = plain.open(800)
    want = _steps(plain, seq, prompt, 0)
    got = _steps(engines[1].executor, loaded, prompt, 640)
    np.testing.assert_array_equal(want, got)


@pytest.fixture(scope="module")
def saved(model: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 256 tokens of the torch executor."""
    engine = _engine(model, "torch")
    _run(engine, _prompt(300), 1)
    path = tmp_path_factory.mktemp("saved") / "talk"
    assert len(session.save(path, engine.prefixes, {"n": 1}).tokens) == 256
    return path


def test_damage_is_found_wherever_it_is(model: Checkpoint, saved: Path, tmp_path: Path) -> None:
    """One flipped bit in each part of the file, and cuts: never a wrong cache."""
    engine, whole = _engine(model, "torch"), saved.read_bytes()
    (length,) = struct.unpack_from("<Q", whole, 16)
    header = json.loads(whole[56 : 56 + length])
    data = 56 + length
    places = [0, 15, 17, 30, 55, 56, 57 + length // 2, data - 1, data, data + 1023, data + 1024]
    places += [int(one) for one in np.linspace(data, len(whole) - 1, 23)]
    assert list(header["arrays"]) == ["tokens", "keys", "values", "fine", "coarse"]
    path = tmp_path / "talk"
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"talk is (damaged|no session file)"):
            session.load(path, engine.prefixes)
    for size in (0, 5, 55, 56, 56 + length - 1, data, data + 4, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"talk is (damaged|no session file)"):
            session.load(path, engine.prefixes)
    path.write_bytes(whole + b"x")
    with pytest.raises(UserError, match="1 bytes follow"):
        session.load(path, engine.prefixes)
    assert engine.prefixes.tokens == 0
    assert engine.executor.room() == engine.executor.capacity, "a refused file kept pages"
    path.write_bytes(whole)
    assert len(session.load(path, engine.prefixes).tokens) == 256


def test_a_file_of_another_model_is_refused(model: Checkpoint, saved: Path, tmp_path: Path) -> None:
    """Other weights, another rope, another epsilon: each is another model."""
    others = {
        "weights": checkpoint(tmp_path / "a", CONFIG, seed=6),
        "rope": checkpoint(tmp_path / "b", replace(CONFIG, rope=replace(CONFIG.rope, theta=9e3))),
        "epsilon": checkpoint(tmp_path / "c", replace(CONFIG, rms_norm_eps=2e-5)),
    }
    for what, other in others.items():
        with pytest.raises(UserError, match="was saved with another model"):
            session.load(saved, _engine(other, "torch").prefixes)
        assert what
    engine = _engine(model, "torch", dtype="bfloat16")
    with pytest.raises(UserError, match="other options"):
        session.load(saved, engine.prefixes)
    with pytest.raises(UserError, match="other options"):
        session.load(saved, _engine(model, "torch", attention="dense").prefixes)


@pytest.mark.skipif(not HAS_CORE, reason="no native core")
def test_what_binds_a_file_of_the_native_executor(model: Checkpoint, tmp_path: Path) -> None:
    engine = _engine(model, "native", quant="int4")
    _run(engine, _prompt(100))
    session.save(tmp_path / "talk", engine.prefixes, {})
    for options in ({"quant": "int8"}, {"kv": "bf16"}, {"attention": "dense"}, {"head": "none"}):
        other = _engine(model, "native", **{"quant": "int4", **options})
        with pytest.raises(UserError, match="other options"):
            session.load(tmp_path / "talk", other.prefixes)
    with pytest.raises(UserError, match="native executor, this is torch"):
        session.load(tmp_path / "talk", _engine(model, "torch").prefixes)
    longer = _engine(model, "native", quant="int4", context=1400, threads=1, isa="portable")
    session.load(tmp_path / "talk", longer.prefixes)
    assert _run(longer, _prompt(100)).reused == 64


def test_too_long_for_the_cache(model: Checkpoint, saved: Path) -> None:
    engine = _engine(model, "torch", context=200)
    with pytest.raises(UserError, match=r"holds 256 tokens, the cache 200: raise --context"):
        session.load(saved, engine.prefixes)


def test_running_requests_are_not_disturbed(model: Checkpoint, saved: Path) -> None:
    engine = _engine(model, "torch", context=300, capacity=320)
    handle = engine.submit(Request(_prompt(100), SamplingConfig(max_tokens=20)))
    engine.step()
    with pytest.raises(UserError, match="leave no room for the 256 tokens"):
        session.load(saved, engine.prefixes)
    assert len(list(handle)) == 20


def test_a_short_conversation_keeps_its_notes(model: Checkpoint, tmp_path: Path) -> None:
    engine = _engine(model, "torch")
    _run(engine, _prompt(20))
    assert session.save(tmp_path / "talk", engine.prefixes, {"a": 1}).tokens == ()
    assert session.load(tmp_path / "talk", engine.prefixes).notes == {"a": 1}


def test_saving_where_nothing_can_be_written(model: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write"):
        session.save(tmp_path / "file" / "talk", _engine(model, "torch").prefixes, {})
    with pytest.raises(UserError, match="cannot read"):
        session.load(tmp_path / "absent", _engine(model, "torch").prefixes)
