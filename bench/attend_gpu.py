"""How fast is InfLLM v2 attention on a GPU, against dense flash attention in the same run?

Hq 32, Hkv 2, D 128, bf16, 131,072 tokens per step (4 x 32K, 2 x 64K, 1 x 128K), budgets of 4,096
and 6,144 tokens, forward and backward, with the selection of blocks timed on its own. Queries and
keys are random, so neighbouring tokens agree on almost no block: the worst case for kernels that
share them. "smooth" queries, a slow random walk, show the other end.

All contenders run in turn within each round; a figure is the median of the rounds with its
extremes. Shares of peak count the multiplications of attended pairs only, against a matrix product
measured in the same run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from endside.ops.infllm import attend_stats
from endside.ops.infllm import triton as fast
from endside.ops.infllm.config import SparseConfig
from endside.ops.infllm.triton.autograd import SparseAttention, choose
from endside.ops.infllm.triton.compress import compress
from endside.ops.infllm.triton.layout import Sequences, batch_table, heads_of

TOKENS = 131072
LENGTHS = (32768, 65536, 131072)
KV, GROUP, WIDTH = 2, 16, 128
# Forward + backward over FlashAttention at 4,096 visible tokens: README of the reference kernels.
PUBLISHED = {32768: 1.57, 65536: 2.76, 131072: 4.61}


@dataclass
class Contender:
    """Something to time: makes an output, which may be differentiated."""

    name: str
    forward: Callable[[], Tensor]
    inputs: tuple[Tensor, ...] = ()
    ms: dict[str, list[float]] = field(default_factory=dict)

    def run(self) -> None:
        """Time one forward and, where inputs are given, one backward."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        events[0].record()
        out = self.forward()
        events[1].record()
        if self.inputs:
            torch.autograd.grad(out, self.inputs, torch.ones_like(out))
        events[2].record()
        torch.cuda.synchronize()
        self.ms.setdefault("forward", []).append(events[0].elapsed_time(events[1]))
        if self.inputs:
            self.ms.setdefault("backward", []).append(events[1].elapsed_time(events[2]))
            self.ms.setdefault("both", []).append(events[0].elapsed_time(events[2]))

    def median(self, phase: str) -> float:
        """Median milliseconds of a phase."""
        return statistics.median(self.ms[phase])

    def summary(self) -> dict[str, list[float]]:
        """min, median, max of each phase."""
        return {p: [min(t), statistics.median(t), max(t)] for p, t in self.ms.items()}


def matrix_peak(size: int = 8192) -> float:
    """bf16 TFLOP/s of a large matrix product: median of ten."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = Contender("matmul", lambda: a @ b)
    for _ in range(13):
        product.run()
    return 2 * size**3 / statistics.median(product.ms["forward"][3:]) / 1e9


def dense_peers(q: Tensor, k: Tensor, v: Tensor) -> list[Contender]:
    """Every dense flash attention this machine has, checked by a small call first."""
    heads = tuple(x.transpose(1, 2) for x in (q, k, v))

    def through(backend: SDPBackend) -> Callable[..., Tensor]:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=True, enable_gqa=True
                )

        return call

    peers: list[tuple[str, Callable[..., Tensor], tuple[Tensor, ...]]] = [
        (f"sdpa flash, torch {torch.__version__}", through(SDPBackend.FLASH_ATTENTION), heads),
        (
            f"sdpa cuDNN {torch.backends.cudnn.version()}",
            through(SDPBackend.CUDNN_ATTENTION),
            heads,
        ),
        *_flash_packages(q, k, v),
    ]
    ready = [peer for one in peers if (peer := _if_it_runs(*one)) is not None]
    if not any("flash," in peer.name for peer in ready):
        repeated = [x.repeat_interleave(GROUP, 1).detach().requires_grad_() for x in heads[1:]]
        name, call, _ = peers[0]
        peer = _if_it_runs(f"{name}, keys repeated", call, (heads[0], *repeated))
        ready += [] if peer is None else [peer]
    return ready


def _if_it_runs(
    name: str, call: Callable[..., Tensor], inputs: tuple[Tensor, ...]
) -> Contender | None:
    """The contender, if its forward and backward run here on a piece of the inputs."""
    tokens = 2 if inputs[0].shape[1] == KV * GROUP else 1  # axis: heads come first in sdpa's layout
    try:
        piece = [x[:1].narrow(tokens, 0, 256) for x in inputs]
        torch.autograd.grad(call(*piece).sum(), inputs)
    except (RuntimeError, TypeError) as error:
        print(f"  {name}: not available here ({str(error).splitlines()[0][:80]})")
        return None
    return Contender(name, lambda: call(*inputs), inputs)


def _flash_packages(q: Tensor, k: Tensor, v: Tensor) -> list[tuple[str, Any, tuple[Tensor, ...]]]:
    """FlashAttention 3 and 2, where installed."""
    found: list[tuple[str, Any, tuple[Tensor, ...]]] = []
    for module in ("flash_attn_interface", "flash_attn"):
        try:
            package = __import__(module)
        except ImportError:
            continue
        call = package.flash_attn_func
        version = getattr(package, "__version__", "")

        def attend(q: Tensor, k: Tensor, v: Tensor, call: Any = call) -> Tensor:
            out = call(q, k, v, causal=True)
            return out[0] if isinstance(out, tuple) else out

        found.append((f"{module} {version}", attend, (q, k, v)))
    return found


def random_walk(q: Tensor) -> Tensor:
    """Queries (B, T, H, D) that change slowly from token to token."""
    walk = q.float()
    keep = 0.999
    # A first-order filter in steps of 1024 tokens: neighbours correlate by `keep`.
    powers = keep ** torch.arange(1024, device=q.device, dtype=torch.float32)
    kernel = torch.tril(powers[:, None] / powers[None, :]) * (1 - keep**2) ** 0.5
    parts = walk.unflatten(1, (-1, 1024))
    return torch.einsum("ts,bnshd->bnthd", kernel, parts).flatten(1, 2).to(q.dtype) * 1.5


def ours(q: Tensor, k: Tensor, v: Tensor, sparse: SparseConfig, name: str) -> list[Contender]:
    """The selection alone, and attention alone on blocks chosen once."""
    rows, length = q.shape[:2]
    heads = heads_of(q, k, sparse, length)
    counts = torch.full((rows,), length, dtype=torch.int32, device="cuda")
    scales = (length, length // sparse.kernel_stride, length // sparse.coarse_stride)
    sequences = Sequences(batch_table(q, counts, scales, sparse), length, length)

    def selection() -> Tensor:
        with torch.no_grad():
            k1 = compress(k, sequences, sparse.kernel_stride, 4)
            k2 = compress(k, sequences, sparse.coarse_stride, 5)
            found = choose(q, (k1, k2), sequences, heads=heads, coarse=sparse.lse == "coarse")
        assert found is not None, "nothing is sparse at this length"
        return found

    indices = selection()

    def attention() -> Tensor:
        return SparseAttention.apply(q, k, v, indices, sequences, heads)

    return [Contender(f"{name} selection", selection), Contender(name, attention, (q, k, v))]


def prefill(length: int, rounds: int, peak: float) -> dict[str, Any]:
    """One length: all contenders interleaved, and what the ratios come to."""
    rows = TOKENS // length
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(heads: int) -> Tensor:
        size = (rows, length, heads, WIDTH)
        x = torch.randn(size, generator=generator, device="cuda", dtype=torch.bfloat16)
        return x.requires_grad_()

    q, k, v = draw(KV * GROUP), draw(KV), draw(KV)
    smooth = random_walk(q.detach()).requires_grad_()
    contenders = dense_peers(q, k, v)
    peers = len(contenders)
    budgets = {4096: SparseConfig(topk=32, dense_len=-1), 6144: SparseConfig(dense_len=-1)}
    for budget, sparse in budgets.items():
        contenders += ours(q, k, v, sparse, f"sparse {budget}")
    contenders += ours(smooth, k, v, budgets[4096], "sparse 4096 smooth")
    for turn in range(rounds + 1):
        for contender in contenders:
            contender.run()
            if turn == 0:
                contender.ms.clear()
    result: dict[str, Any] = {"length": length, "rows": rows}
    result["ms"] = {c.name: c.summary() for c in contenders}
    result["ratios"] = _ratios(contenders, peers, length, budgets)
    result["share_of_peak"] = _shares(contenders, peers, length, budgets, peak)
    return result


def _budget_of(name: str, budgets: dict[int, SparseConfig]) -> SparseConfig | None:
    return next((c for b, c in budgets.items() if name.startswith(f"sparse {b}")), None)


def _ratios(
    contenders: list[Contender], peers: int, length: int, budgets: dict[int, SparseConfig]
) -> list[dict[str, Any]]:
    """Speed over each dense peer, forward + backward, attention alone and with the selection."""
    table = []
    by_name = {c.name: c for c in contenders}
    for peer in contenders[:peers]:
        for one in contenders[peers:]:
            if one.name.endswith("selection"):
                continue
            dense, alone = peer.median("both"), one.median("both")
            choosing = by_name[f"{one.name} selection"].median("forward")
            sparse = _budget_of(one.name, budgets)
            assert sparse is not None, f"no budget for {one.name}"
            row = {
                "over": peer.name,
                "contender": one.name,
                "attention": dense / alone,
                "with_selection": dense / (alone + choosing),
                "operation_limit": 1 / attend_stats_last(length, sparse),
            }
            if sparse.budget == 4096:
                row["published"] = PUBLISHED[length]
                row["attention_over_published"] = dense / alone / PUBLISHED[length]
            table.append(row)
    return table


def attend_stats_last(length: int, sparse: SparseConfig) -> float:
    """Visible over available tokens of a whole prefill of `length`."""
    return attend_stats(length, length, sparse).ratio


def _shares(
    contenders: list[Contender],
    peers: int,
    length: int,
    budgets: dict[int, SparseConfig],
    peak: float,
) -> dict[str, dict[str, float]]:
    """TFLOP/s of attended pairs over the measured peak, per contender and phase."""
    shares: dict[str, dict[str, float]] = {}
    pairs = TOKENS * (length + 1) / 2 * KV * GROUP
    for index, one in enumerate(contenders):
        sparse = _budget_of(one.name, budgets)
        if one.name.endswith("selection"):
            continue
        part = 1.0 if index < peers or sparse is None else attend_stats_last(length, sparse)
        work = (
            4 * WIDTH * pairs * part / 1e9
        )  # GFLOP of the forward; the backward has 2.5 times that
        shares[one.name] = {
            "forward": work / one.median("forward") / peak,
            "backward": 2.5 * work / one.median("backward") / peak,
        }
    return shares


def decode(length: int, rows: int, rounds: int) -> dict[str, Any]:
    """One captured decode step, selection included, against dense attention."""
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(tokens: int, heads: int) -> Tensor:
        size = (rows, tokens, heads, WIDTH)
        return torch.randn(size, generator=generator, device="cuda", dtype=torch.bfloat16)

    sparse = SparseConfig()
    q, k, v = draw(1, KV * GROUP), draw(length, KV), draw(length, KV)
    summaries = (
        draw(sparse.fine_count(length), KV),
        draw(sparse.coarse_count(length), KV),
    )
    lengths = torch.full((rows,), length, dtype=torch.int32, device="cuda")
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))

    def dense() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(
                query, key, value, enable_gqa=True
            )

    def step() -> Tensor:
        return fast.attend(q, k, v, sparse=sparse, summaries=summaries, lengths=lengths)

    contenders = [
        _captured("sdpa flash", dense),
        _captured("sparse 6144, selection included", step),
    ]
    for _ in range(rounds):
        for contender in contenders:
            contender.run()
    us = {c.name: [1000 * x for x in c.summary()["forward"]] for c in contenders}
    return {"length": length, "rows": rows, "us": us}


def _captured(name: str, call: Callable[[], Tensor], repeats: int = 10) -> Contender:
    """A contender that replays `call`; its times are those of one call."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        out = call()

    class Replay(Contender):
        def run(self) -> None:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(repeats):
                graph.replay()
            end.record()
            torch.cuda.synchronize()
            self.ms.setdefault("forward", []).append(start.elapsed_time(end) / repeats)

    return Replay(name, lambda: out)


def measure(deadline: float, rounds: int = 5) -> dict[str, Any]:
    """Everything that fits before `deadline` (time.monotonic seconds); the rest is skipped."""
    peak = matrix_peak()
    print(f"bf16 matrix product: {peak:.0f} TFLOP/s")
    result: dict[str, Any] = {
        "matrix_peak_tflops": peak,
        "prefill": [],
        "decode": [],
        "skipped": [],
    }
    jobs: list[tuple[str, str, Callable[[], dict[str, Any]]]] = []
    for length in LENGTHS:
        jobs.append(("prefill", f"prefill {length}", lambda n=length: prefill(n, rounds, peak)))
    for length in (32768, 131072):
        for rows in (1, 8):
            call = lambda n=length, r=rows: decode(n, r, 20)
            jobs.append(("decode", f"decode {length} x {rows}", call))
    slowest = 45.0
    for kind, name, call in jobs:
        if time.monotonic() + slowest > deadline:
            print(f"{name}: skipped, the time is up")
            result["skipped"].append(name)
            continue
        start = time.monotonic()
        row = call()
        torch.cuda.empty_cache()
        slowest = max(slowest, 2 * (time.monotonic() - start)) if kind == "prefill" else 10.0
        result[kind].append(row)
        _print_row(name, row)
    return result


def _print_row(name: str, row: dict[str, Any]) -> None:
    print(f"\n{name}  (rows: {row['rows']})")
    for contender, times in row.get("us", {}).items():
        print(f"  {contender:36} {times[1]:9.1f} us  ({times[0]:.1f} .. {times[2]:.1f})")
    for contender, phases in row.get("ms", {}).items():
        text = "  ".join(
            f"{p} {t[1]:8.2f} ms ({t[0]:.2f} .. {t[2]:.2f})" for p, t in phases.items()
        )
        print(f"  {contender:36} {text}")
    for contender, share in row.get("share_of_peak", {}).items():
        text = "  ".join(f"{phase} {part:.2f}" for phase, part in share.items())
        print(f"  {contender:36} share of peak: {text}")
    for ratio in row.get("ratios", []):
        published = f"  published {ratio['published']}" if "published" in ratio else ""
        print(
            f"  {ratio['contender']:22} over {ratio['over']:28} {ratio['attention']:.2f}x alone, "
            f"{ratio['with_selection']:.2f}x with selection, "
            f"limit {ratio['operation_limit']:.1f}x{published}"
        )
