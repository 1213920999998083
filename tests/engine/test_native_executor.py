"""The native executor against the torch one and against itself: any cut, any company, same bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from endside import native
from endside.checkpoint import Checkpoint, write_folder
from endside.engine.engine import Engine
from endside.engine.executor import Executor, Full
from endside.engine.executors import Plan, create
from endside.engine.executors.native import NativeExecutor, random_executor
from endside.engine.request import Request, SamplingConfig
from endside.errors import UserError
from endside.formats.hf_config import config_to_hf, hf_name, json_bytes
from endside.ops.infllm.config import SparseConfig
from endside.quant.pack import Scheme, round_to_nearest, to_arrays
from endside.shards import TensorSource
from tests.engine.tiny import HAS_CORE, VOCAB, awkward, checkpoint, tokens

pytestmark = pytest.mark.skipif(not HAS_CORE, reason="no native core here")

LOOSE = ("amx",)  # its attention multiplies bf16 terms


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return checkpoint(tmp_path_factory.mktemp("native"), awkward("tiny"))


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    # three blocks of 64: from 400 tokens on, less than half of them are seen
    sizes = SparseConfig(window_size=64, topk=2, dense_len=128)
    config = awkward("tiny-sparse", tie_word_embeddings=True, sparse=sizes)
    return checkpoint(tmp_path_factory.mktemp("native"), config)


def _native(model: Checkpoint, **plan: object) -> NativeExecutor:
    made = create(model, Plan(executor="native", **{"context": 540, "threads": 2, **plan}))
    assert isinstance(made, NativeExecutor)
    return made


def _all(executor: Executor, ids: np.ndarray) -> np.ndarray:
    """Logits (T, V) of a fresh sequence."""
    seq = executor.open(len(ids))
    logits = executor.prefill(seq, ids, logits="all")
    executor.close(seq)
    assert logits is not None
    return logits


@pytest.mark.parametrize("which", ["dense", "sparse"])
def test_float_weights_equal_the_torch_executor(which: str, request: pytest.FixtureRequest) -> None:
    """Logits within what half-precision keys cost, and the same greedy text."""
    model = request.getfixturevalue(which)
    native, torch = (
        _native(model, context=1300),
        create(model, Plan(executor="torch", context=1300)),
    )
    ids = tokens(1200 if which == "sparse" else 450)
    seen = [native.attention(length)[1] / length for length in range(1, len(ids) + 1)]
    assert (np.mean(seen) < 0.5) == (which == "sparse")
    got, want = _all(native, ids), _all(torch, ids)
    scale = np.abs(want).max()
    assert np.abs(got - want).max() < 1e-3 * scale
    assert native.attention(len(ids)) == torch.attention(len(ids))
    texts = []
    for executor in (native, torch):
        handle = Engine(executor).submit(
            Request(tuple(tokens(270, seed=1)), SamplingConfig(max_tokens=40))
        )
        texts.append([token.id for token in handle])
    assert texts[0] == texts[1]


@pytest.mark.parametrize(("quant", "least"), [("int8", 0.97), ("int4", 0.6), ("ternary", 0.3)])
def test_low_bits_stay_near_the_float_model(dense: Checkpoint, quant: str, least: float) -> None:
    """Correlation of all logits; random weights are the hardest case for few bits."""
    ids = tokens(100)
    got = _all(_native(dense, quant=quant, group=32), ids).ravel()
    want = _all(_native(dense), ids).ravel()
    assert np.corrcoef(got, want)[0, 1] > least
    assert np.abs(got - want).max() > 0, "fewer bits must change something"


@pytest.mark.parametrize("quant", ["none", "int4"])
def test_any_cut_gives_the_same_bits(sparse: Checkpoint, quant: str) -> None:
    executor = _native(sparse, quant=quant)
    ids = tokens(530)
    whole = _all(executor, ids)
    assert executor.attention(530)[1] / 530 < 0.5
    seq = executor.open(530)
    rows = [executor.prefill(seq, ids[a:b], logits="all") for a, b in ((0, 1), (1, 64), (64, 129))]
    assert executor.prefill(seq, ids[129:458], logits="none") is None
    rows.append(executor.prefill(seq, ids[458:461], logits="last")[None])
    rows += [executor.decode([seq], ids[at : at + 1]) for at in range(461, 530)]
    assert executor.length(seq) == 530
    wanted = np.concatenate([whole[:129], whole[460:]])
    np.testing.assert_array_equal(np.concatenate(rows), wanted)


def test_a_prompt_longer_than_one_call(sparse: Checkpoint) -> None:
    executor = _native(sparse, context=1200)
    ids = tokens(1100)
    whole = _all(executor, ids)
    seq = executor.open(1200)
    np.testing.assert_array_equal(executor.prefill(seq, ids), whole[-1])
    assert executor.attention(1100)[1] / 1100 < 0.5, "attention must be sparse here"


@pytest.mark.parametrize("threads", [1, 3])
def test_company_and_threads_change_no_bit(sparse: Checkpoint, threads: int) -> None:
    executor = _native(sparse, quant="int4", threads=threads)
    lengths = (460, 3, 66, 401)
    seqs = [executor.open(470) for _ in lengths]
    for seq, length in zip(seqs, lengths, strict=True):
        executor.prefill(seq, tokens(length, seed=length), logits="none")
    together = executor.decode(seqs[::-1], np.array([5, 6, 7, 9]))[::-1]
    single = _native(sparse, quant="int4", threads=2)
    for row, (length, token) in enumerate(zip(lengths, (9, 7, 6, 5), strict=True)):
        alone = _all(single, np.append(tokens(length, seed=length), token))[-1]
        np.testing.assert_array_equal(together[row], alone)


@pytest.mark.parametrize("isa", [i for i in native.available_isas() if i not in LOOSE])
def test_every_instruction_set_gives_the_same_text(sparse: Checkpoint, isa: str) -> None:
    fast, plain = (_native(sparse, quant="int4", isa=name) for name in (isa, "portable"))
    ids = tokens(280)
    np.testing.assert_allclose(_all(fast, ids), _all(plain, ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("isa", [i for i in native.available_isas() if i in LOOSE])
def test_tiles_choose_the_same_tokens(sparse: Checkpoint, isa: str) -> None:
    """Attention is off by 2^-17 there, so now and then an activation is rounded to the other side,
    which costs what rounding costs: the bound of test_whole_model, and the same token wherever the
    two best are further apart than twice the error."""
    fast, plain = (_native(sparse, quant="int4", isa=name) for name in (isa, "portable"))
    ids = tokens(280)
    got, want = _all(fast, ids), _all(plain, ids)
    error = np.abs(got - want).max()
    best = np.sort(want, axis=-1)
    decided = best[:, -1] - best[:, -2] > 2 * error
    assert 0 < error < 0.1
    assert decided.mean() > 0.9
    np.testing.assert_array_equal(got[decided].argmax(-1), want[decided].argmax(-1))


PARENTS = np.array([-1, 0, 0, 1, -1, 4, 3])
DRAFT = np.array([40, 41, 42, 43, 44, 45, 46])


def _path(row: int) -> list[int]:
    rows: list[int] = []
    while row >= 0:
        rows.insert(0, row)
        row = int(PARENTS[row])
    return rows


@pytest.mark.parametrize("kv", ["f16", "bf16", "int8"])
def test_every_row_of_a_tree_equals_plain_decoding(sparse: Checkpoint, kv: str) -> None:
    executor = _native(sparse, quant="int4", kv=kv)
    prompt = tokens(511)
    seq = executor.open(540)
    executor.prefill(seq, prompt, logits="none")
    logits = executor.verify(seq, DRAFT, PARENTS)
    assert executor.length(seq) == 511 + 7
    for row in range(7):
        plain = _all(executor, np.concatenate([prompt, DRAFT[_path(row)]]))[-1]
        np.testing.assert_array_equal(logits[row], plain, err_msg=f"row {row}")


@pytest.mark.parametrize("interrupted", [False, True])
def test_an_accepted_path_is_as_if_it_had_been_decoded(
    sparse: Checkpoint, interrupted: bool
) -> None:
    """Also when another sequence ran between the verdict and its acceptance."""
    executor = _native(sparse, quant="int4")
    prompt, rows = tokens(511), [0, 1, 3]
    seq, other = executor.open(540), executor.open(20)
    executor.prefill(seq, prompt, logits="none")
    executor.verify(seq, DRAFT, PARENTS)
    if interrupted:
        executor.prefill(other, tokens(9))
    executor.accept(seq, rows)
    assert executor.length(seq) == 514
    after = executor.decode([seq], np.array([50]))[0]
    plain = _all(executor, np.concatenate([prompt, DRAFT[rows], [50]]))[-1]
    np.testing.assert_array_equal(after, plain)


def test_a_draft_is_trimmed_as_a_whole_or_in_part(dense: Checkpoint) -> None:
    executor = _native(dense)
    prompt = tokens(60)
    seq = executor.open(80)
    executor.prefill(seq, prompt, logits="none")
    for kept in (0, 2):
        executor.verify(seq, DRAFT[:4], np.arange(4) - 1)
        executor.trim(seq, 60 + kept)
        assert executor.length(seq) == 60 + kept
    after = executor.decode([seq], np.array([50]))[0]
    plain = _all(executor, np.concatenate([prompt, DRAFT[:2], [50]]))[-1]
    np.testing.assert_array_equal(after, plain)


def test_a_bad_draft_is_refused(dense: Checkpoint) -> None:
    executor = _native(dense)
    seq = executor.open(400)
    executor.prefill(seq, tokens(5), logits="none")
    with pytest.raises(UserError, match="parent 2"):
        executor.verify(seq, DRAFT[:3], np.array([-1, 2, 0]))
    with pytest.raises(UserError, match="at most 64"):
        executor.verify(seq, tokens(65), np.arange(65) - 1)
    assert executor.length(seq) == 5


def test_forks_share_and_diverge(sparse: Checkpoint) -> None:
    """A fork, a trim back into the shared chunk, and both go on as if they were alone."""
    executor = _native(sparse, context=1400, capacity=4 * 1024, max_batch=1)
    prompt = tokens(1200)
    first = executor.open(1300)
    executor.prefill(first, prompt, logits="none")
    second = executor.fork(first, 1300)
    free = executor.sequences.room()
    executor.trim(second, 900)
    tail = tokens(170, seed=9)
    executor.prefill(second, tail, logits="none")
    assert executor.sequences.room() == free - 1024, "the shared chunk was not copied"
    alone = _native(sparse, context=1400)
    for seq, history in ((first, prompt), (second, np.concatenate([prompt[:900], tail]))):
        got = executor.decode([seq], np.array([33]))[0]
        np.testing.assert_array_equal(got, _all(alone, np.append(history, 33))[-1])


def test_a_full_pool_says_so(dense: Checkpoint) -> None:
    executor = _native(dense, context=300, capacity=2048, max_batch=1)
    assert executor.capacity == 2048
    first, _ = executor.open(300), executor.open(300)
    with pytest.raises(Full):
        executor.open(1)
    with pytest.raises(Full):
        executor.fork(first, 300)
    executor.close(first)
    executor.open(1)


def test_an_interrupt_inside_a_step_is_forgotten(
    dense: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = _native(dense)
    request = Request(tuple(tokens(70)), SamplingConfig(max_tokens=8))
    expected = [token.id for token in Engine(executor).submit(request)]
    forward, calls = executor.model.forward, iter(range(100))

    def interrupted(*arguments: object) -> np.ndarray:
        logits = forward(*arguments)
        if next(calls) == 3:
            raise KeyboardInterrupt
        return logits

    monkeypatch.setattr(executor.model, "forward", interrupted)
    handle = Engine(executor).submit(request)
    with pytest.raises(KeyboardInterrupt):
        list(handle)
    assert [token.id for token in handle] == expected


@pytest.mark.parametrize("quant", ["none", "int8", "int4", "ternary"])
def test_random_weights_need_no_checkpoint(quant: str) -> None:
    made = [
        random_executor("tiny-sparse", Plan(quant=quant, context=400), seed) for seed in (1, 1, 2)
    ]
    first, again, other = (_all(one, tokens(300) % 320) for one in made)
    assert np.isfinite(first).all() and first.std() > 1e-3
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    seen = made[0].visible(made[0].open(300), tokens(300) % 320)
    assert seen.shape == (2, 300, 2) and seen[0, :, 0].tolist()[:3] == [1, 2, 3]


@pytest.mark.parametrize(
    ("kind", "group", "symmetric", "bf16"),
    [("int4", 32, False, False), ("int8", 128, True, True), ("ternary", 64, True, False),
     ("int4", 256, True, False)],
)  # fmt: skip
def test_low_bit_checkpoints_keep_every_code(
    kind: str, group: int, symmetric: bool, bf16: bool, tmp_path: Path
) -> None:
    """What the core multiplies by is what the codes mean, exactly, padded and stacked as it is."""
    config = awkward("tiny")
    plain = checkpoint(tmp_path, config)
    meant, sources = {}, {}
    for name in plain.names():
        weight = plain.numpy(name)
        if not name.endswith("_proj.weight"):
            sources[name] = TensorSource("F32", weight.shape, lambda weight=weight: weight)
            continue
        linear = round_to_nearest(weight, kind, group, symmetric=symmetric, bf16=bf16)
        meant[name] = linear.dequantize()
        for part, array in to_arrays(name.removesuffix(".weight"), linear).items():
            stored = {"uint8": "U8", "float16": "F16", "uint16": "BF16"}[str(array.dtype)]
            sources[part] = TensorSource(stored, array.shape, lambda array=array: array)
    raw = config_to_hf(config)
    raw["quantization_config"] = Scheme(kind, group, symmetric).to_config()
    place = write_folder(tmp_path / "low", sources, {"config.json": json_bytes(raw)})
    executor = create(Checkpoint.open(place), Plan(context=64))
    assert isinstance(executor, NativeExecutor), (
        "low bits ask for the native executor by themselves"
    )
    packed = executor.pack.matrices
    attention, mlp = (f"layers.1.{one}" for one in ("self_attn", "mlp"))
    qkv = [meant[hf_name(f"{attention}.{one}_proj.weight")] for one in "qkv"]
    np.testing.assert_array_equal(packed["layers.1.qkv"].unpack(), np.concatenate(qkv))
    gate, up = (meant[hf_name(f"{mlp}.{one}_proj.weight")] for one in ("gate", "up"))
    both = packed["layers.1.gate_up"].unpack().reshape(13, 2, 8, 48)
    np.testing.assert_array_equal(both[:, 0].reshape(104, 48)[:100], gate)
    np.testing.assert_array_equal(both[:, 1].reshape(104, 48)[:100], up)
    assert not both[-1, :, 4:].any(), "the rows that fill up must be zero"
    down = packed["layers.1.down"].unpack()
    np.testing.assert_array_equal(down[:, :100], meant[hf_name(f"{mlp}.down_proj.weight")])
    # they meet activations that are zero; with zero points of their own they need not be
    assert not symmetric or not down[:, 100:].any(), "the columns that fill up must be zero"
    assert np.isfinite(_all(executor, tokens(20))).all() and executor.vocab_size == VOCAB
