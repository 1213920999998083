"""What a run will take: bytes on each device and seconds per step, from its configuration alone.

    weights, gradients    4 bytes a parameter; Adam's moments 8 more (`train.optim`, fused)
    activations           what autograd keeps, tensor by tensor (`_block_bytes`)
    logits                12 bytes each at the worst moment, of as many as exist at once
                          (`ops.head_loss`), and the head's gradient, which is made beside them
    copies                bfloat16 weights that autocast keeps until the end of the step
    gathered              fsdp: what is outside the blocks, two blocks and the gradient of one

The peak is the worse of two moments: logits, with all activations and the moments behind them; and
the end of the backward pass, with all gradients. Time is work over the rate of large products, plus
what norms, gates, residuals and the optimiser move through memory, plus messages: fsdp hides its
own behind work, sums of tensor parallelism and of replicas come on top.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from endside.model.config import ModelConfig
from endside.model.flops import parameters, training_flops
from endside.ops.head_loss.fused import LARGE
from endside.train.parallel import ParallelConfig

# How often a saved value passes through memory in all: written, read again forward and backward,
# and its gradient written and read.
PASSES = 5
OPTIMIZER_BYTES = 28  # a parameter's step reads four float32 values and writes three
RESERVE = 0.08  # share of a device's memory lost to the runtime, the context and fragments


@dataclass(frozen=True)
class Work:
    """What the forecast reads of a run."""

    model: ModelConfig
    batch: int  # rows of all processes together, before accumulation
    seq_len: int
    accumulate: int = 1
    bf16: bool = False
    recompute: bool = False  # activation checkpointing: a block's input is kept alone
    chunk: int = 0  # tokens whose logits exist at once; 0: all
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


@dataclass(frozen=True)
class Device:
    """What one of `count` devices has and does."""

    count: int
    memory: float  # bytes
    flops: float  # per second, of large matrix products in the run's precision
    memory_rate: float  # bytes per second, to and from its own memory
    link_rate: float  # bytes per second, to and from other devices


@dataclass(frozen=True)
class Bytes:
    """One device's memory, by what lies in it; `peak` is the most at one moment."""

    weights: float
    moments: float
    gradients: float
    copies: float
    gathered: float
    activations: float
    logits: float
    accumulating: bool

    @property
    def peak(self) -> float:
        """The worse of the moment of the logits and the end of the backward pass."""
        standing = self.weights + self.moments + self.copies + self.gathered
        early = self.gradients if self.accumulating else 0.0
        return standing + max(early + self.activations + self.logits, self.gradients)


@dataclass(frozen=True)
class Seconds:
    """One optimiser step, by what it waits for."""

    products: float
    memory: float
    hidden: float  # messages that run beside the work
    exposed: float  # messages that the work waits for

    @property
    def step(self) -> float:
        """The whole step."""
        return max(self.products + self.memory, self.hidden) + self.exposed


def data_size(work: Work, devices: int) -> int:
    """Processes that see different rows."""
    return devices // work.parallel.tensor


def memory(work: Work, devices: int) -> Bytes:
    """Bytes on each of `devices` devices."""
    split, data = work.parallel.tensor, data_size(work, devices)
    fsdp = work.parallel.shard == "fsdp" and data > 1
    blocks, outside = _weights(work, split)
    held = (blocks + outside) / (data if fsdp else 1)
    one = blocks / work.model.num_hidden_layers
    width = 2 if work.bf16 else 4
    gathered = (outside * 8 + one * (2 * width + 4 + width)) if fsdp else 0.0
    tokens = work.batch / data * work.seq_len
    kept = _kept_bytes(work, split)
    logits = min(tokens, work.chunk or tokens) * work.model.vocab_size
    if not work.chunk:
        logits = min(logits, LARGE)
    return Bytes(
        weights=4 * held,
        moments=8 * held,
        gradients=4 * held,
        copies=2 * (blocks + outside) if work.bf16 and not fsdp else 0.0,
        gathered=gathered,
        activations=tokens * kept,
        logits=12 * logits + 4 * work.model.vocab_size * work.model.hidden_size,
        accumulating=work.accumulate > 1,
    )


def _weights(work: Work, split: int) -> tuple[float, float]:
    """Parameters of the blocks and of the rest, on a device that holds 1 / split of projections."""
    counted = parameters(work.model)
    projections = (counted.attention + counted.feed_forward) / split
    norms = 2 * work.model.num_hidden_layers * work.model.hidden_size
    outside = counted.embedding + counted.head + counted.mtp + work.model.hidden_size
    return projections + norms, outside


def _block_bytes(work: Work, split: int) -> float:
    """Bytes a block keeps per token: around its norms, then inside attention and feed-forward."""
    model = work.model
    width, query = model.hidden_size, model.num_attention_heads * model.head_dim
    keys = 2 * model.num_key_value_heads * model.head_dim
    inside = 2 * query + keys + 3 * model.intermediate_size
    # Each norm keeps its input; its output, cast once in bfloat16, serves all projections.
    each = 2 if work.bf16 else 4
    return 8 * width + each * (2 * width + inside / split)


def _kept_bytes(work: Work, split: int) -> float:
    """Bytes kept per token: by all blocks, the last norm, and the loss (its input's gradient)."""
    each = _block_bytes(work, split)
    layers = work.model.num_hidden_layers + work.model.mtp_layers
    last = (4 + (2 if work.bf16 else 4)) * work.model.hidden_size
    if work.recompute:
        return layers * 4 * work.model.hidden_size + each + last
    return layers * each + last


def time(work: Work, device: Device) -> Seconds:
    """Seconds of one optimiser step."""
    split, data = work.parallel.tensor, data_size(work, device.count)
    tokens = work.batch / data * work.seq_len * work.accumulate
    again = 4 / 3 if work.recompute else 1.0
    flops = tokens * training_flops(work.model, work.seq_len) * again / split
    blocks, outside = _weights(work, split)
    fsdp = work.parallel.shard == "fsdp" and data > 1
    held = (blocks + outside) / (data if fsdp else 1)
    kept = replace(work, recompute=False)
    moved = tokens * (_kept_bytes(kept, split) * again + 12 * work.model.vocab_size) * PASSES
    moved += OPTIMIZER_BYTES * held
    hidden, exposed = _messages(work, device.count, tokens)
    return Seconds(
        products=flops / device.flops,
        memory=moved / device.memory_rate,
        hidden=hidden / device.link_rate,
        exposed=exposed / device.link_rate,
    )


def _messages(work: Work, devices: int, tokens: float) -> tuple[float, float]:
    """Bytes a device sends in a step: beside the work, and while it waits."""
    split, data = work.parallel.tensor, data_size(work, devices)
    blocks, outside = _weights(work, split)
    ring = (data - 1) / data
    width = 2 if work.bf16 else 4
    hidden = exposed = 0.0
    if work.parallel.shard == "fsdp":
        # Blocks are gathered forward and backward, the rest once; gradients are summed in float32.
        gathers = 2 * width * blocks + 4 * outside
        hidden = ring * work.accumulate * (gathers + 4 * (blocks + outside))
    else:
        exposed = 2 * ring * 4 * (blocks + outside)
    # Each half of a block sums its output forward and the gradient of its input backward.
    sums = (6 if work.recompute else 4) * work.model.num_hidden_layers
    each = tokens * work.model.hidden_size * width
    exposed += sums * each * 2 * (split - 1) / split
    return hidden, exposed


def fits(work: Work, device: Device) -> bool:
    """Whether the peak leaves the reserve free."""
    return memory(work, device.count).peak <= device.memory * (1 - RESERVE)


def remedy(work: Work, device: Device) -> tuple[list[str], Work, Device] | None:
    """Changes, cheapest first and added up, until the run fits; None where none is enough."""
    changes: list[str] = []
    for text, changed, larger in _steps(work, device):
        changes.append(text)
        if fits(changed, larger):
            return changes, changed, larger
    return None


def _steps(work: Work, device: Device) -> Iterator[tuple[str, Work, Device]]:
    """Ever smaller runs of the same meaning, then more devices."""
    if work.parallel.shard != "fsdp" and data_size(work, device.count) > 1:
        work = replace(work, parallel=replace(work.parallel, shard="fsdp"))
        yield "parallel.shard = fsdp", work, device
    if not work.chunk and work.seq_len > 1024:
        work = replace(work, chunk=1024)
        yield "loss.chunk = 1024", work, device
    while work.batch % 2 == 0 and work.batch // 2 >= data_size(work, device.count):
        work = replace(work, batch=work.batch // 2, accumulate=work.accumulate * 2)
        yield f"batch = {work.batch}, accumulate = {work.accumulate}", work, device
    if not work.recompute:
        work = replace(work, recompute=True)
        yield "checkpoint_activations = true", work, device
    if work.parallel.shard != "fsdp":
        work = replace(work, parallel=replace(work.parallel, shard="fsdp"))
    rows = work.batch * work.accumulate
    for count in (2 * device.count * 2**power for power in range(12)):
        batch = max(work.batch, data_size(work, count))
        work = replace(work, batch=batch, accumulate=max(1, rows // batch))
        text = f"batch = {batch}, accumulate = {work.accumulate}"
        yield (
            f"{count} devices with parallel.shard = fsdp, {text}",
            work,
            replace(device, count=count),
        )
