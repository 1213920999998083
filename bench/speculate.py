"""What drafts bring at the 0.5B shape: the real loop, with acceptance replayed from a trace.

    python bench/speculate.py [--rounds 4] [--quant none,int8,int4] [--threads N]
    python bench/speculate.py --record MODEL DRAFT TOKENS     make the trace anew

Random weights have nothing to say that could be guessed, and no trained 0.5B model is at hand. So
the model, its draft head and every pass are real (native executor, random weights, far larger than
the cache), and only two things are replayed from a trace: the shape of the tree that the draft
grew, and which path of it the model took. The trace is recorded with a small trained model and its
trained EAGLE head (--record): the model continues held-out text, and at every token the head's tree
of 31 nodes, the likeliest first, is set against what the model then wrote. Trees of n nodes are the
first n of these, so the size may be chosen here, by the engine's own `AutoSize`, for this machine.

    trained draft   plain, the draft (int4), and the draft with its output head cut to a quarter of
                    the vocabulary (FR-Spec); greedy and sampled; limit: 1.6 x plain with FR-Spec,
                    greedy; the output head timed by itself, limit: three quarters less for
                    the one row that every pass asks for
    prompt lookup   an editing task: the prompt holds a file of this repository, the answer is the
                    file with some names changed. The answer is scripted, what is looked up and
                    verified is real; limit: 2 x plain

The limits are for weights as stored. The fewer bits, the earlier a pass is bound by arithmetic and
not by reading weights, and the more a row costs (SpecMQuant's finding): int8 and int4 are reported
beside. Kinds take turns within a round; ratios are of the same round. Prints tables, writes
bench/results/speculate.json, and exits with 1 where a limit is missed. Needs the published
tokenizer for the editing task ($ENDSIDE_TEST_DATA, else ../shared/data). --record also measures the
small model itself, with what really was accepted; it lies in the cache, so no limit is set.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from replay import NODES, Clock, Replayed, ReplayedHead, ReplayedHeads, Trace

from endside.checkpoint import Checkpoint
from endside.data.pack import open_packed
from endside.engine.draft import Drafts
from endside.engine.drafts import running
from endside.engine.drafts.eagle import Heads
from endside.engine.drafts.head import Rows
from endside.engine.drafts.lookup import Lookup
from endside.engine.drafts.native_head import NativeHead
from endside.engine.engine import Engine
from endside.engine.executor import Executor
from endside.engine.executors import Plan, create
from endside.engine.executors.native import random_executor
from endside.engine.request import Handle, Request, SamplingConfig
from endside.engine.sampler import generator, sample
from endside.engine.treesize import AutoSize, measure
from endside.formats import draft_head
from endside.formats.draft_head import LAYER, DraftHead
from endside.model.config import ModelConfig
from endside.native.draft import Team
from endside.tokenizer import Tokenizer

HERE = Path(__file__).resolve().parent
TRACE = HERE / "results" / "speculate_trace.npz"
TEXTS, ANSWER, PROMPT = 12, 128, 64  # texts recorded, their tokens, and those given
DEPTH = 6
CALL_ROWS, CALLS = (1, 4, 10), 15  # of an output head that is timed by itself
SHARE = 0.25  # of the vocabulary in the cut head
KINDS = ("full", "frspec")
TEMPERATURES = (0.0, 0.7)
JUDGED = "none"  # weights that the limits are for
LIMITS = {"trained draft": 1.6, "prompt lookup": 2.0, "FR-Spec, of the output head": 0.75}
EDITS = {
    "endside/engine/stops.py": {"StopStrings": "EndMarks", "push": "feed", "matched": "found"},
    "endside/engine/drafts/lookup.py": {"LookupDrafter": "Finder", "_agreement": "_common"},
    "endside/errors.py": {"UserError": "InputError"},
}


def head_of(kind: str, base: ModelConfig, executor: Any) -> ReplayedHead:
    """An EAGLE-2 head with noise for weights, for the model that `executor` runs."""
    noise, width = np.random.default_rng(1), base.hidden_size
    q, kv = (n * base.head_dim for n in (base.num_attention_heads, base.num_key_value_heads))
    inner = base.intermediate_size
    sizes = {
        "self_attn.q_proj": (q, width), "self_attn.k_proj": (kv, width),
        "self_attn.v_proj": (kv, width), "self_attn.o_proj": (width, q),
        "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }  # fmt: skip
    tensors = {f"{LAYER}{name}.weight": size for name, size in sizes.items()}
    tensors |= {"fc.weight": (width, 2 * width)}
    made = {
        name: noise.standard_normal(size, np.float32) / np.float32(size[-1] ** 0.5)
        for name, size in tensors.items()
    }
    ones = ["input_layernorm", "post_attention_layernorm"]
    for name in [
        *(f"{LAYER}{one}.weight" for one in ones),
        "input_norm1.weight",
        "input_norm2.weight",
    ]:
        made[name] = np.ones(width, np.float32)
    ids = np.arange(int(SHARE * base.vocab_size)) if kind == "frspec" else None
    head = ReplayedHead(
        DraftHead("eagle2", base, made, ids), base, embed=executor.embed_rows,
        rows=executor.head_rows, context=executor.context, bits="int4",
        team=Team(executor.model),
    )  # fmt: skip
    head.core.set_timing(True)
    return head


def answer(engine: Engine, prompt: np.ndarray, tokens: int) -> tuple[Handle, float]:
    """A finished answer, and its tokens per second after the first."""
    drafts = engine.drafts
    engine.executor.feature_layers = drafts.feature_layers if drafts else ()
    config = SamplingConfig(max_tokens=tokens, temperature=0.0)
    handle = engine.submit(Request(tuple(prompt.tolist()), config))
    while not handle.done:
        engine.step()
    assert handle.error is None, str(handle.error)
    return handle, (tokens - 1) / (handle.times.finished - handle.times.first)


def trained(executor: Any, costs: dict[int, float], temperature: float, rounds: int) -> dict:
    """Plain, full and FR-Spec in turn, each on the same text of the trace."""
    traces = load_traces(temperature)
    prompt = np.random.default_rng(3).integers(300, 5000, PROMPT)
    config = executor.config
    heads = {kind: ReplayedHeads(head_of(kind, config, executor), traces[kind]) for kind in KINDS}
    sizes = {kind: AutoSize(costs) for kind in KINDS}
    engines = {"plain": Replayed(executor, prefix_cache=False)}
    engines["plain"].script = lambda sequence, tree: [1000]
    for kind in KINDS:
        engines[kind] = Replayed(executor, prefix_cache=False, drafts=heads[kind], size=sizes[kind])
        engines[kind].script = heads[kind].script
    speeds: dict[str, list[float]] = {kind: [] for kind in engines}
    passes = dict.fromkeys(KINDS, 0)
    for number in range(rounds + 1):
        for kind, engine in engines.items():
            if kind in heads:
                heads[kind].text = number % TEXTS
            handle, speed = answer(engine, prompt, ANSWER)
            if number == 0:  # warms up, and teaches the size what is accepted
                continue
            speeds[kind].append(speed)
            if kind in passes:
                passes[kind] += handle.runs
    row: dict[str, Any] = {"temperature": temperature, "plain": spread(speeds["plain"])}
    for kind in KINDS:
        head = heads[kind].head
        assert isinstance(head, ReplayedHead)
        ratios = [a / b for a, b in zip(speeds[kind], speeds["plain"], strict=True)]
        row[kind] = {
            "tokens_per_s": spread(speeds[kind]),
            "ratio": spread(ratios),
            "tokens_per_pass": rounds * ANSWER / passes[kind],
            "nodes": sizes[kind].best(1),
            "accepted": {nodes: traces[kind].accepted(nodes) for nodes in (2, 3, 7, 15, 31)},
        }
    for kind, engine in engines.items():
        head = heads[kind].head if kind in heads else None
        clock = Clock(engine, head)
        handle, _ = answer(engine, prompt, ANSWER)
        row.setdefault("ms_per_pass", {})[kind] = clock.stop(handle.runs)
    return row


def head_cost(executor: Any) -> dict[str, Any]:
    """Seconds of the output head and of choosing from it, whole and cut, by the rows of a call.

    They take turns, and the model's own pass comes before each: weights come from memory.
    """
    heads = {kind: head_of(kind, executor.config, executor) for kind in KINDS}
    noise = np.random.default_rng(4)
    seq = executor.open(CALLS * len(KINDS) * len(CALL_ROWS) + 1)
    found: dict[str, Any] = {}
    for rows in CALL_ROWS:
        hidden = noise.standard_normal((rows, executor.config.hidden_size), np.float32)
        pairs = Rows.text(np.arange(rows), hidden, 0, 0)
        spent: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for _ in range(CALLS):
            for kind, head in heads.items():
                executor.decode([seq], np.array([1]))
                head.core.set_timing(True)
                NativeHead.run(head, pairs, head.window(), guesses=rows, width=10)
                took = head.core.timing()
                spent[kind].append(took["out"] + took["choose"])
        middle = {kind: statistics.median(one) for kind, one in spent.items()}
        saved = 1 - middle["frspec"] / middle["full"]
        found[str(rows)] = {"seconds": middle, "saved": saved}
    executor.close(seq)
    return found


def spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def editing(executor: Any, costs: dict[int, float], rounds: int) -> dict:
    """Plain and prompt lookup in turn on every file."""
    data = Path(os.environ.get("ENDSIDE_TEST_DATA") or HERE.parent.parent / "shared" / "data")
    tokenizer = Tokenizer.load(data / "minicpm4-8b", whole=False)
    engines = {
        "plain": Replayed(executor, prefix_cache=False),
        "lookup": Replayed(executor, prefix_cache=False, drafts=Lookup(), size=AutoSize(costs)),
    }
    ratios, tasks, tokens, passes = [], {}, 0, 0
    for number, (file, changes) in enumerate(EDITS.items()):
        text = (HERE.parent / file).read_text(encoding="utf-8")
        edited = text
        for old, new in changes.items():
            edited = edited.replace(old, new)
        asked = ", ".join(f"{old} to {new}" for old, new in changes.items())
        prompt = np.array(tokenizer.encode(f"{text}\nRename {asked} and give me the whole file.\n"))
        script = tokenizer.encode(edited)
        for _ in range(rounds + (number == 0)):
            speeds = {}
            for kind, engine in engines.items():
                engine.script = lambda sequence, tree, script=script: script[
                    (at := len(sequence.handle.token_ids)) : at + 1 + len(tree or ())
                ]
                handle, speeds[kind] = answer(engine, prompt, len(script))
                if kind == "lookup":
                    tokens, passes = tokens + len(script), passes + handle.runs
            ratios.append(speeds["lookup"] / speeds["plain"])
        tasks[file] = {
            "prompt": len(prompt),
            "answer": len(script),
            "ratio": spread(ratios[-rounds:]),
        }
    kept = ratios[1:]  # the first warmed up
    return {"ratio": spread(kept), "tokens_per_pass": tokens / passes, "files": tasks}


def record(model: Path, draft: Path, tokens: Path, out: Path) -> None:
    """Traces of a trained model and its head on held-out text, and how fast both really are."""
    plan = Plan(executor="native", max_batch=1)
    executor: Any = create(Checkpoint.open(model), plan)
    packed = open_packed(tokens)
    weights = draft_head.read(Checkpoint.open(draft), executor.vocab_size)
    train = np.concatenate(packed.tokens("train"))
    counted = np.argsort(-np.bincount(train, minlength=executor.vocab_size), kind="stable")
    cut = counted[: int(SHARE * executor.vocab_size)]
    heads = {
        kind: Heads(
            running(
                replace(weights, ids=cut if kind == "frspec" else None), executor, plan,
                "int4" if weights.bits == "int4" else "float",
            )
        )
        for kind in KINDS
    }  # fmt: skip
    heldout = np.concatenate(packed.tokens("heldout"))
    starts = np.linspace(0, len(heldout) - PROMPT, TEXTS).astype(int)
    prompts = [heldout[at : at + PROMPT].astype(np.int64) for at in starts]
    arrays = {}
    for temperature in TEMPERATURES:
        executor.feature_layers = heads["full"].feature_layers
        written = [
            write(executor, prompt, temperature, seed) for seed, prompt in enumerate(prompts)
        ]
        for kind in KINDS:
            parts = [follow(heads[kind], *one) for one in written]
            arrays[f"{kind} {temperature} parents"] = np.stack([one[0] for one in parts])
            arrays[f"{kind} {temperature} paths"] = np.stack([one[1] for one in parts])
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out, **arrays)
    report = {"demo": itself(executor, heads["frspec"], prompts)}
    print(json.dumps(report, indent=1))
    (out.parent / "speculate_demo.json").write_text(json.dumps(report, indent=1) + "\n")


def write(
    executor: Executor, prompt: np.ndarray, temperature: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The model continues a prompt -> the text (S,) and the features of its tokens (S, F)."""
    seq = executor.open(PROMPT + ANSWER + DEPTH)
    noise, config = generator(seed), SamplingConfig(temperature=temperature)
    text = prompt.tolist()
    logits = executor.prefill(seq, prompt)
    features = [executor.features(seq)]
    for _ in range(ANSWER + DEPTH):
        assert logits is not None
        token = sample(logits, np.array(text), config, noise, prompt=PROMPT, allow=None)
        text.append(token)
        logits = executor.decode([seq], np.array([token]))[0]
        features.append(executor.features(seq))
    executor.close(seq)
    return np.array(text), np.concatenate(features)


def follow(heads: Heads, text: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The head's tree behind every token, and its path along the text."""
    parents = np.full((ANSWER, NODES), -1, np.int8)
    paths = np.full((ANSWER, DEPTH), -1, np.int8)
    drafter = heads.start(Request((0,)))
    stored = 0
    for at in range(ANSWER):
        known = PROMPT + 1 + at
        drafter.accepted(text[stored : known - 1], features[stored : known - 1])
        stored = known - 1
        tree = drafter.propose(text[:known], NODES)
        parents[at, : len(tree)] = tree.parents
        node = -1
        for depth, token in enumerate(text[known : known + DEPTH].tolist()):
            found = np.flatnonzero((tree.parents == node) & (tree.tokens == token))
            if not len(found):
                break
            node = paths[at, depth] = found[0]
    return parents, paths


def itself(executor: Executor, drafts: Drafts, prompts: list[np.ndarray]) -> dict:
    """The small model's own speed, plain and with its draft and what is really accepted."""
    costs = measure(executor)
    assert costs is not None, "nothing runs, so there is room"
    engines = {
        "plain": Engine(executor, prefix_cache=False),
        "frspec": Engine(executor, prefix_cache=False, drafts=drafts, size=AutoSize(costs)),
    }
    speeds: dict[str, list[float]] = {kind: [] for kind in engines}
    tokens = passes = 0
    for prompt in prompts:
        for kind, engine in engines.items():
            handle, speed = answer(engine, prompt, ANSWER)
            speeds[kind].append(speed)
            if kind == "frspec":
                tokens, passes = tokens + ANSWER, passes + handle.runs
    ratios = [a / b for a, b in zip(speeds["frspec"], speeds["plain"], strict=True)]
    return {
        "plain_tokens_per_s": spread(speeds["plain"]),
        "ratio": spread(ratios),
        "tokens_per_pass": tokens / passes,
        "cost_of_rows": {rows: cost / costs[1] for rows, cost in costs.items()},
    }


def load_traces(temperature: float) -> dict[str, Trace]:
    with np.load(TRACE, allow_pickle=False) as file:
        return {
            kind: Trace(*(file[f"{kind} {temperature} {one}"] for one in ("parents", "paths")))
            for kind in KINDS
        }


def main() -> int:
    """Measure, print, write; 1 where a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--quant", default="none,int8,int4")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--record", nargs=3, type=Path, metavar=("MODEL", "DRAFT", "TOKENS"))
    parser.add_argument("--out", type=Path, default=HERE / "results" / "speculate.json")
    flags = parser.parse_args()
    if flags.record:
        model, draft, tokens = flags.record
        record(model, draft, tokens, TRACE)
        return 0
    report: dict[str, Any] = {"machine": platform.processor() or platform.machine()}
    report |= {"rounds": flags.rounds, "weights": {}}
    for quant in flags.quant.split(","):
        report["weights"][quant] = one = weights(quant, flags.rounds, flags.threads)
        print(table_of(quant, one), flush=True)
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    flags.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    judged = report["weights"].get(JUDGED, {}).get("limits", {})
    return int(any(ratio < limit for ratio, limit in judged.values()))


def weights(quant: str, rounds: int, threads: int | None) -> dict[str, Any]:
    """Everything for one kind of weights."""
    plan = Plan(quant=quant, context=8192, threads=threads, max_batch=1)  # type: ignore[arg-type]
    executor = random_executor("minicpm4-0.5b", plan)
    costs = measure(executor)
    assert costs is not None, "nothing runs, so there is room"
    report: dict[str, Any] = {
        "threads": executor.threads,
        "pass_s": costs[1],
        "cost_of_rows": {rows: cost / costs[1] for rows, cost in costs.items()},
        "trained draft": [trained(executor, costs, one, rounds) for one in TEMPERATURES],
        "output head": head_cost(executor),
        "prompt lookup": editing(executor, costs, max(1, rounds // 4)),
    }
    report["saved"] = report["output head"]["1"]["saved"]
    ratios = {
        "trained draft": report["trained draft"][0]["frspec"]["ratio"]["median"],
        "prompt lookup": report["prompt lookup"]["ratio"]["median"],
        "FR-Spec, of the output head": report.pop("saved"),
    }
    return report | {"limits": {name: [ratios[name], limit] for name, limit in LIMITS.items()}}


def passes_of(spent: dict[str, dict[str, float]]) -> list[str]:
    """Where the milliseconds of a pass go, by kind."""
    parts = list(dict.fromkeys(part for one in spent.values() for part in one))
    lines = []
    for kind, one in spent.items():
        shown = ", ".join(f"{part} {one[part]:.2f}" for part in parts if part in one)
        lines.append(f"  ms a pass, {kind}: {sum(one.values()):.2f} = {shown}")
    return lines


def table_of(quant: str, report: dict[str, Any]) -> str:
    """One kind of weights as people read it."""
    show = lambda one: f"{one['median']:.2f} ({one['min']:.2f} to {one['max']:.2f})"
    price = ", ".join(f"{rows}: {cost:.2f}" for rows, cost in report["cost_of_rows"].items())
    pace = f"{report['pass_s'] * 1e3:.1f} ms a pass with {report['threads']} thread(s)"
    lines = [
        f"0.5B shape, weights {quant}, {pace}; its price by rows: {price}",
        f"{'':<26}{'x plain':>22}{'tokens a pass':>15}{'nodes':>7}",
    ]
    for row in report["trained draft"]:
        for kind in KINDS:
            one = row[kind]
            lines.append(
                f"{kind + ', temperature ' + str(row['temperature']):<26}{show(one['ratio']):>22}"
                f"{one['tokens_per_pass']:>15.2f}{one['nodes']:>7}"
            )
        before, after = (row[kind]["accepted"] for kind in KINDS)
        lost = ", ".join(f"{n} nodes {before[n]:.2f} -> {after[n]:.2f}" for n in before)
        lines += passes_of(row["ms_per_pass"])
        lines.append(f"  FR-Spec, tokens a pass at {lost}")
    for rows, one in report["output head"].items():
        ms = " -> ".join(f"{1e3 * one['seconds'][kind]:.2f}" for kind in KINDS)
        lines.append(f"  FR-Spec, output head for {rows} rows: {ms} ms, -{one['saved']:.1%}")
    edit = report["prompt lookup"]
    lines.append(
        f"{'prompt lookup, editing':<26}{show(edit['ratio']):>22}{edit['tokens_per_pass']:>15.2f}"
    )
    for name, (ratio, limit) in report["limits"].items():
        lines.append(f"{name}: {ratio:.3g}, limit {limit}: {'met' if ratio >= limit else 'MISSED'}")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
