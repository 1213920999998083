"""`endside bench MODEL`: speed at several context lengths, beside what the memory could give.

For each length N: the last 512 tokens of a prompt of N, and single tokens behind N. Decoding reads
every packed weight and the keys it sees once per token, so bytes per second over the machine's
memory bandwidth says how much of the possible is reached. `random:minicpm4-0.5b` and the other
presets need no checkpoint. `--serve` keeps the model loaded and answers commands on standard input,
the same that bench/peer_bench.cc knows, so that two engines can be measured in turn:

    depth TOKENS BASE · prefill N · decode N · memory · forget · quit
    sight N: keys that N new tokens see, counted;  expected N: from the shape;  weights: bytes
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from endside.errors import UserError
from endside.verbs import parse

if TYPE_CHECKING:
    from endside.engine.executor import Executor
    from endside.engine.measure import Bench as Measured
    from endside.model.config import ModelConfig

NEW = 512  # tokens of a timed prefill, at most
CACHE_BYTES = {"auto": 2.0, "f16": 2.0, "bf16": 2.0, "int8": 1.0}  # per element, scales aside


@dataclass(frozen=True)
class Bench:
    """Prefill and decode speed at several context lengths, beside the memory bandwidth."""

    model: Positional[str]
    """Local folder, hub name, or random:PRESET."""
    context: str = "512,4096,32768"
    """Context lengths in tokens, separated by commas."""
    executor: Literal["auto", "torch", "native"] = "auto"
    """Backend."""
    quant: Literal["none", "int8", "int4", "ternary"] = "none"
    """Bits of the blocks; none: as stored."""
    group: Literal[32, 64, 128] = 128
    """Weights per scale."""
    head: Literal["auto", "none", "int8", "int4"] = "auto"
    """Bits of the output head."""
    kv: Literal["auto", "f16", "bf16", "int8"] = "auto"
    """Numbers in the cache; auto: f16."""
    attention: Literal["auto", "dense", "sparse"] = "auto"
    """auto: what the checkpoint says."""
    isa: Literal["auto", "portable", "avx2", "avx512", "amx", "neon", "neon_i8mm"] = "auto"
    """Instruction set of the native core."""
    threads: int | None = None
    """CPU threads; default: one per core."""
    tokens: int = 16
    """Single tokens timed at each length."""
    repeats: int = 3
    """Times that every measurement is made."""
    base: int = 4096
    """Real tokens at the start of a depth; what lies behind them is copies."""
    serve: bool = False
    """Answer commands on standard input instead."""
    json: bool = False
    """Print one JSON object."""


def main(argv: list[str]) -> None:
    """Load the model once, measure every length, print the table."""
    flags = parse(Bench, argv, "bench")
    lengths = _lengths(flags)
    executor, config = _load(flags, max(lengths) + NEW)
    from endside.engine.measure import Bench as Measured

    bench = Measured(executor)
    if flags.serve:
        _serve(bench)
        return
    report = measure(bench, config, flags, lengths)
    print(json.dumps(report, indent=1) if flags.json else _table(report))


def measure(
    bench: Measured, config: ModelConfig, flags: Bench, lengths: list[int]
) -> dict[str, Any]:
    """Every length, shortest first, as plain values."""
    from endside.engine.measure import bandwidth, weight_bytes

    weights = weight_bytes(bench.executor)
    threads = flags.threads or getattr(bench.executor, "threads", 1)
    limit = bandwidth(weights or 256 << 20, threads)
    rows = [_row(bench, config, flags, length, limit) for length in lengths]
    return {
        "model": flags.model, "executor": bench.executor.name, "quant": flags.quant,
        "head": flags.head, "kv": flags.kv, "threads": threads, "weight_bytes": weights,
        "bandwidth_bytes_per_s": round(limit),
        "bandwidth_probe": f"numpy maximum over the weights' size, {threads} thread(s)",
        "rows": rows,
    }  # fmt: skip


def _row(
    bench: Measured, config: ModelConfig, flags: Bench, length: int, limit: float
) -> dict[str, Any]:
    from endside.engine.measure import cache_bytes, weight_bytes

    new = min(NEW, length)
    bench.stand(length - new, flags.base)
    bench.prefill(new)  # touches every buffer
    prefill = [new / bench.prefill(new) for _ in range(flags.repeats)]
    bench.stand(length, flags.base)
    bench.decode(2)
    decode = [flags.tokens / sum(bench.decode(flags.tokens)) for _ in range(flags.repeats)]
    sight, weights = bench.sight(), weight_bytes(bench.executor)
    row: dict[str, Any] = {
        "context": length, "tiled": length > flags.base,
        "prefill_tokens": new, "prefill_tokens_per_s": _spread(prefill),
        "decode_tokens_per_s": _spread(decode),
        "visible": sight.visible, "available": sight.available,
    }  # fmt: skip
    if weights is not None:
        moved = weights + cache_bytes(config, sight, CACHE_BYTES[flags.kv])
        rate = moved * statistics.median(decode)
        row |= {"bytes_per_token": round(moved), "bytes_per_s": round(rate),
                "share_of_bandwidth": rate / limit}  # fmt: skip
    return row


def _lengths(flags: Bench) -> list[int]:
    try:
        lengths = sorted({int(word) for word in flags.context.split(",")})
    except ValueError as error:
        raise UserError(
            f"--context is {flags.context!r}: give lengths separated by commas, as 512,4096"
        ) from error
    if lengths[0] < 1 or min(flags.tokens, flags.repeats, flags.base) < 1:
        raise UserError("--context, --tokens, --repeats and --base start at 1")
    return lengths


def _load(flags: Bench, context: int) -> tuple[Executor, ModelConfig]:
    from endside.engine.executors import Plan

    plan = Plan(
        executor=flags.executor, attention=flags.attention, quant=flags.quant, group=flags.group,
        head=flags.head, kv=flags.kv, isa=flags.isa, threads=flags.threads, context=context,
        max_batch=1,
    )  # fmt: skip
    if flags.model.startswith("random:"):
        from endside.engine.executors.native import random_executor

        if flags.executor == "torch":
            raise UserError("random:PRESET runs on the native executor alone: leave --executor out")
        native = random_executor(flags.model.removeprefix("random:"), plan)
        return native, native.config
    from endside.engine.executors import create
    from endside.formats.hf_config import read_config, with_attention
    from endside.models import open_model

    checkpoint = open_model(flags.model)
    executor = create(checkpoint, plan)
    return executor, with_attention(read_config(checkpoint), flags.attention)


def _serve(bench: Measured) -> None:
    """Commands in, one line of JSON each out, until `quit` or the end of input."""
    print(json.dumps({"ready": True, "executor": bench.executor.name}), flush=True)
    for line in sys.stdin:
        verb, *words = line.split() or [""]
        if verb == "quit":
            return
        try:
            answer = {"did": verb, **_answer(bench, verb, [int(word) for word in words])}
        except (UserError, ValueError) as error:
            answer = {"error": f"{verb}: {error}"}
        print(json.dumps(answer), flush=True)


def _answer(bench: Measured, verb: str, numbers: list[int]) -> dict[str, Any]:
    if verb == "depth" and len(numbers) == 2:
        return {"depth": numbers[0], "seconds": bench.stand(*numbers)}
    if verb == "prefill" and len(numbers) == 1:
        return {"tokens": numbers[0], "seconds": bench.prefill(numbers[0])}
    if verb == "decode" and len(numbers) == 1:
        each = bench.decode(numbers[0])
        return {"tokens": numbers[0], "seconds": sum(each), "each": each}
    if verb in ("sight", "expected") and len(numbers) == 1:
        return asdict((bench.sight if verb == "sight" else bench.expected)(numbers[0]))
    if verb in ("memory", "forget") and not numbers:
        return _memory(forget=verb == "forget")
    if verb == "weights":
        from endside.engine.measure import weight_bytes

        return {"bytes": weight_bytes(bench.executor)}
    raise ValueError("unknown command, or the wrong number of arguments")


def _memory(*, forget: bool) -> dict[str, int]:
    """Resident bytes of this process, now and at most; forget: the peak starts anew."""
    if forget:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    kib = {name: int(rest.split()[0]) for name, _, rest in (one.partition(":") for one in lines)
           if name in ("VmHWM", "VmRSS")}  # fmt: skip
    return {"peak_bytes": kib["VmHWM"] * 1024, "resident_bytes": kib["VmRSS"] * 1024}


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _table(report: dict[str, Any]) -> str:
    lines = [
        f"{report['model']}, {report['executor']} executor, {report['threads']} thread(s), "
        f"quant {report['quant']}, head {report['head']}; median [min .. max] tokens/s",
        f"memory bandwidth {report['bandwidth_bytes_per_s'] / 1e9:.1f} GB/s "
        f"({report['bandwidth_probe']})",
        f"{'context':>9}  {'prefill':>26}  {'decode':>26}  {'GB/s':>6}  {'share':>6}  sees",
    ]
    for row in report["rows"]:
        rate, share = row.get("bytes_per_s"), row.get("share_of_bandwidth")
        lines.append(
            f"{row['context']:>9,}  {_speed(row['prefill_tokens_per_s']):>26}  "
            f"{_speed(row['decode_tokens_per_s']):>26}  "
            f"{'' if rate is None else f'{rate / 1e9:.1f}':>6}  "
            f"{'' if share is None else f'{share:.0%}':>6}  "
            f"{row['visible']:,.0f} of {row['available']:,.0f}" + (" *" if row["tiled"] else "")
        )
    return "\n".join([*lines, "* depth made of copies of a shorter real prefix"])


def _speed(value: dict[str, float]) -> str:
    return f"{value['median']:.1f} [{value['min']:.1f} .. {value['max']:.1f}]"
