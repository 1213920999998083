"""The decoder in the core: right against float64, and the same bits whatever runs beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from endside import native
from endside.errors import UserError
from endside.native.model import CHUNK, Limits, Model, Sparse
from endside.native.packed import Packed
from tests.native.decoder import (
    SHAPE,
    Decoder,
    draw,
    float_kinds,
    mixed_kinds,
    model,
    one_by_one,
    request,
)

pytestmark = pytest.mark.skipif(not native.available_isas(), reason=native.status())

ISAS = native.available_isas()
LENGTH = 70  # a block and a bit
TOKENS = np.random.default_rng(5).integers(0, SHAPE.vocab, LENGTH).tolist()
MIXED = draw(SHAPE, mixed_kinds)
FLOATS = draw(SHAPE, float_kinds)


def same(got: np.ndarray, want: np.ndarray, what: str = "logits") -> None:
    assert got.shape == want.shape, f"{what}: {got.shape} against {want.shape}"
    assert got.tobytes() == want.tobytes(), f"{what} differ by {np.abs(got - want).max()}"


@pytest.mark.parametrize("isa", ISAS)
def test_float_weights_match_float64(isa: str) -> None:
    weights, plain = FLOATS
    engine, truth = model(weights, isa=isa), Decoder(SHAPE, plain)
    for position, token in enumerate(TOKENS):
        trace = np.full((SHAPE.layers + 1, 1, SHAPE.width), np.nan, np.float32)
        seen = np.zeros((SHAPE.layers, 1, SHAPE.kv_heads), np.int32)
        got = engine.forward([request([token], position)], trace=trace, visible=seen)[0]
        want = truth.step(token)
        # A key on the edge between two half-precision numbers may round the other way.
        assert np.abs(got - want).max() < 5e-4 * np.abs(want).max(), f"position {position}"
        stream = np.stack(truth.stream)
        assert np.abs(trace[:, 0] - stream).max() < 5e-4 * np.abs(stream).max()
        assert (seen == position + 1).all(), "a dense row sees all there is"


def test_quantized_weights_stay_near() -> None:
    """8-bit activations: a few per cent in a random model, all of it from rounding x."""
    weights, plain = MIXED
    engine, truth = model(weights), Decoder(SHAPE, plain)
    got = one_by_one(engine, TOKENS)
    want = np.stack([truth.step(token) for token in TOKENS])
    error = np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2))
    assert 1e-5 < error < 0.06, f"relative error {error:.4f}"


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("isa", ISAS)
def test_cut_into_calls_anyhow(isa: str, threads: int) -> None:
    weights, _ = MIXED
    want = one_by_one(model(weights, isa=isa), TOKENS)
    for size in (1, 3, 9, 64, LENGTH):
        engine = model(weights, isa=isa, threads=threads)
        got = [
            engine.forward([request(TOKENS[at : at + size], at)]) for at in range(0, LENGTH, size)
        ]
        same(np.concatenate(got), want, f"{isa}, {threads} threads, {size} rows a call")


@pytest.mark.parametrize("threads", [1, 2])
def test_neighbours_do_not_matter(threads: int) -> None:
    weights, _ = FLOATS
    alone, together = model(weights), model(weights, threads=threads)
    starts = [0, 5, 33, 63]
    tables = [[7, 1], [0, 3], [5, 9], [2, 8]]
    want = []
    for start, table in zip(starts, tables):
        for engine in (alone, together):
            if start:
                engine.forward([request(TOKENS[:start], 0, chunks=table, want="none")])
        want.append(alone.forward([request(TOKENS[start : start + 1], start, chunks=table)]))
    batch = [
        request(TOKENS[start : start + 1], start, chunks=table)
        for start, table in zip(starts, tables)
    ]
    same(together.forward(batch), np.concatenate(want))


@pytest.mark.parametrize("threads", [1, 2])
def test_only_wanted_rows(threads: int) -> None:
    weights, _ = MIXED
    engine = model(weights, threads=threads)
    everything = engine.forward([request(TOKENS, 0)])
    some = engine.forward([
        request(TOKENS[:9], 0, want="none"),
        request(TOKENS[:20], 0, chunks=[2, 3], want="last"),
        request(TOKENS[:7], 0, chunks=[4, 5], want="all"),
        request(TOKENS[:5], 0, chunks=[6, 7], want="last"),
    ])  # fmt: skip
    same(some, everything[[19, 0, 1, 2, 3, 4, 5, 6, 4]])
    assert engine.forward([request(TOKENS[:3], 0, want="none")]).shape == (0, SHAPE.vocab)
    out = np.empty((1, SHAPE.vocab), np.float32)
    assert engine.forward([request(TOKENS[:4], 0, want="last")], out=out) is out
    same(out, everything[3:4])


@pytest.mark.parametrize("threads", [1, 2])
def test_trace_of_many_rows(threads: int) -> None:
    weights, _ = MIXED
    engine = model(weights, threads=threads)
    rows = []
    for position, token in enumerate(TOKENS[:20]):
        rows.append(np.empty((SHAPE.layers + 1, 1, SHAPE.width), np.float32))
        engine.forward([request([token], position)], trace=rows[-1])
    trace = np.full((SHAPE.layers + 1, 20, SHAPE.width), np.nan, np.float32)
    engine.forward([request(TOKENS[:20], 0, want="last")], trace=trace)
    same(trace, np.concatenate(rows, axis=1), "trace")
    embed = weights.embed[TOKENS[:20]] * np.float32(SHAPE.embed_scale)
    same(trace[0], embed, "embedding")


#        0   1   2  3  4  5  6
TREE = [-1, -1, 0, 0, 2, 1, 4]
PATH = [0, 2, 4, 6]


def paths(parents: list[int]) -> list[list[int]]:
    """Rows from the root to each row."""
    found: list[list[int]] = []
    for row, parent in enumerate(parents):
        found.append([*(found[parent] if parent >= 0 else []), row])
    return found


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("cache", ["f16", "bf16", "int8"])
def test_a_tree_is_its_paths(cache: str, threads: int) -> None:
    """Row by row what plain decoding gives along the path, and after accept nothing can tell."""
    weights, _ = MIXED
    stored, draft, after = TOKENS[:61], [3, 9, 27, 4, 12, 36, 31], TOKENS[61:69]
    engine = model(weights, threads=threads, cache=cache)
    plain = model(weights, cache=cache)
    engine.forward([request(stored, 0, want="none")])
    beside = request(TOKENS[:5], 0, chunks=[2, 3], want="last")
    chain = request([5, 6], 0, chunks=[4, 5], parents=[-1, 0])
    tree = request(draft, len(stored), parents=TREE)
    got = engine.forward([beside, chain, tree])[3:]
    for row, path in enumerate(paths(TREE)):
        plain.forward([request(stored, 0, want="none")])
        want = [
            plain.forward([request([draft[at]], len(stored) + depth)])
            for depth, at in enumerate(path)
        ]
        same(got[row : row + 1], want[-1], f"row {row}")
    engine.accept(2, np.array(PATH, np.int32))
    for engine_, chunks in ((engine, [0, 1]), (plain, [6, 7])):
        if engine_ is plain:
            kept = [*stored, *(draft[at] for at in PATH)]
            plain.forward([request(kept, 0, chunks=chunks, want="none")])
    start = len(stored) + len(PATH)
    same(
        engine.forward([request(after, start)]),
        plain.forward([request(after, start, chunks=[6, 7])]),
        "after accept",
    )
    with pytest.raises(UserError, match="not a tree"):
        engine.accept(0, np.array([0], np.int32))


def test_copied_chunk_continues_alike() -> None:
    weights, _ = MIXED
    engine = model(weights)
    engine.forward([request(TOKENS[:40], 0, want="none")])
    engine.copy_chunk(0, 6)
    engine.forward([request([1, 2, 3], 40, want="none")])
    copy = engine.forward([request(TOKENS[40:50], 40, chunks=[6, 7])])
    engine.forward([request(TOKENS[:40], 0, want="none")])
    same(copy, engine.forward([request(TOKENS[40:50], 40)]))
    with pytest.raises((UserError, ValueError), match="no such chunk"):
        engine.copy_chunk(0, 12)


SPARSE = Sparse(init_blocks=1, window_blocks=2, topk=4, dense_len=300)


@pytest.mark.parametrize("threads", [1, 2])
def test_sparse_rows_do_not_see_the_calls(threads: int) -> None:
    """Over a chunk's end, with sparsity acting: rows seen in any cut are the same."""
    weights, _ = MIXED
    tokens = np.random.default_rng(1).integers(0, SHAPE.vocab, CHUNK + 70).tolist()

    def run(size: int, **options: int) -> tuple[np.ndarray, np.ndarray]:
        engine = model(weights, sparse=SPARSE, rows=600, **options)
        logits, seen = [], []
        for at in range(0, len(tokens), size):
            part = tokens[at : at + size]
            visible = np.zeros((SHAPE.layers, len(part), SHAPE.kv_heads), np.int32)
            logits.append(engine.forward([request(part, at)], visible=visible))
            seen.append(visible)
        return np.concatenate(logits), np.concatenate(seen, axis=1)

    want, seen = run(600)
    share = seen[:, 600:].mean(axis=(0, 2)) / np.arange(601, len(tokens) + 1)
    assert share.mean() < 0.5, f"sparse attention saw {share.mean():.2f} of all keys"
    for size in (77, 512):
        got, visible = run(size, threads=threads)
        same(got, want, f"{size} rows a call")
        same(visible, seen, "visible keys")


def test_kinds_of_embedding() -> None:
    weights, _ = FLOATS
    from dataclasses import replace

    plain = weights.embed
    assert isinstance(plain, np.ndarray)
    words = (plain.view(np.uint32) >> 16).astype(np.uint16)
    cases = [
        (plain.astype(np.float16), plain.astype(np.float16).astype(np.float32)),
        (words, (words.astype(np.uint32) << 16).view(np.float32)),
        (weights.head, weights.head.unpack()),
    ]
    for embed, meaning in cases:
        got = model(replace(weights, embed=embed)).forward([request(TOKENS[:5], 0)])
        same(got, model(replace(weights, embed=meaning)).forward([request(TOKENS[:5], 0)]))


def test_memory_is_what_is_taken() -> None:
    weights, _ = MIXED
    limits = Limits(rows=16, trees=8, context=4096, chunks=2000, threads=2)
    said = Model.memory(SHAPE, weights, limits=limits)
    assert set(said) == {"cache", "activations", "attention", "trees"}
    keys = SHAPE.layers * SHAPE.kv_heads * SHAPE.head_dim * 2
    halves = limits.chunks * CHUNK * keys * 2
    assert halves <= said["cache"] < 1.01 * halves, "half-precision keys and values"
    int8 = Model.memory(SHAPE, weights, limits=limits, cache="int8")
    assert said["cache"] / 2 < int8["cache"] < said["cache"] * 0.75
    before = resident()
    engine = Model(SHAPE, weights, limits=limits)
    engine.forward([request([1, 2], 0, chunks=[0])])
    assert said["cache"] > 300 << 20
    assert resident() - before < 40 << 20, "chunks that nobody uses take no memory"


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_memory_asks_for_sizes_only() -> None:
    from dataclasses import replace

    weights, _ = MIXED

    def bare(packed: Packed) -> Packed:
        return replace(packed, codes=None, scales=None, zeros=None)

    layers = [
        replace(layer, attention_norm=None, mlp_norm=None, qkv=bare(layer.qkv),
                output=bare(layer.output), gate_up=bare(layer.gate_up), down=bare(layer.down))
        for layer in weights.layers
    ]  # fmt: skip
    empty = replace(weights, embed=None, layers=layers, final_norm=None, head=bare(weights.head),
                    inverse_frequencies=None)  # fmt: skip
    assert Model.memory(SHAPE, empty) == Model.memory(SHAPE, weights)
    assert Model.steps(SHAPE, empty) == Model.steps(SHAPE, weights)
    with pytest.raises(UserError, match=r"embed|codes|norm"):
        Model(SHAPE, empty)


def test_plan_and_timing() -> None:
    weights, _ = MIXED
    engine = model(weights, sparse=SPARSE, threads=2)
    plan = "\n".join(engine.plan())
    for words in ("2 threads", "3 layers", "int8 group 32 (160 x 96)", "with zeros", "ternary2",
                  "4 blocks of 64"):  # fmt: skip
        assert words in plan, plan
    assert engine.plan() == Model.steps(SHAPE, weights, sparse=SPARSE, limits=engine.limits)
    engine.forward([request([1], 0)])
    assert set(engine.timing().values()) == {0.0}
    engine.set_timing(True)
    engine.forward([request([1], 0)])
    timing = engine.timing()
    assert all(seconds > 0 for seconds in timing.values()), timing
    assert list(timing) == ["embed", "prepare", "qkv", "rope", "attention", "output", "gate_up",
                            "down", "head"]  # fmt: skip


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (dict(tokens=[77], start=0), "token 77 of 77"),
        (dict(tokens=[-1], start=0), "token -1"),
        (dict(tokens=[1], start=2 * CHUNK), "chunks do not hold"),
        (dict(tokens=[1], start=2 * CHUNK, chunks=[0, 1, 2]), "tokens 2049 of 2048"),
        (dict(tokens=[1], start=-1), "start is negative"),
        (dict(tokens=[1], start=0, chunks=[12]), "chunk 12 of 12"),
        (dict(tokens=[], start=0), "rows 0 of 80"),
        (dict(tokens=[1] * 81, start=0), "rows 81 of 80"),
        (dict(tokens=[1] * 41, start=0, parents=range(-1, 40)), "rows of trees 41 of 40"),
        (dict(tokens=[1] * 65, start=0, parents=range(-1, 64)), "tree's path 65 of 64"),
        (dict(tokens=[1, 2], start=0, parents=[-1, 1]), "parent"),
        (dict(tokens=[1, 2], start=0, parents=[-1]), "one parent per token"),
    ],
)
def test_bad_requests_are_refused(bad: dict, words: str) -> None:
    weights, _ = MIXED
    engine = model(weights)
    with pytest.raises(UserError, match=words):
        engine.forward([request(**bad)])
    assert engine.forward([request([1], 0)]).shape == (1, SHAPE.vocab)


def test_parts_that_do_not_fit_are_refused() -> None:
    from dataclasses import replace

    weights, _ = MIXED
    with pytest.raises(UserError, match="head is 77 x 96, not 78 x 96"):
        model(replace(weights, embed=np.zeros((78, 96), np.float32)),
              shape=replace(SHAPE, vocab=78))  # fmt: skip
    with pytest.raises(UserError, match="head_dim must be a multiple of 8"):
        Model.memory(replace(SHAPE, head_dim=12), weights)
    with pytest.raises(UserError, match="at most 16 heads"):
        Model.memory(replace(SHAPE, heads=34), weights)
    with pytest.raises(UserError, match="a layer is missing"):
        model(replace(weights, layers=weights.layers[:2]))
    with pytest.raises(UserError, match="norm"):
        model(replace(weights, final_norm=np.ones(95, np.float32)))
    with pytest.raises(UserError, match="cache is 'f32'"):
        model(weights, cache="f32")
    with pytest.raises(UserError, match="not available here"):
        model(weights, isa="mmx")
