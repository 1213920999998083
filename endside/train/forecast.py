"""What a run will take: bytes on each device and seconds per step, from its configuration alone.

    weights, gradients    4 bytes a parameter; Adam's moments 8 more (`train.optim`, fused)
    activations           what autograd keeps, tensor by tensor (`_block_bytes`)
    logits                12 bytes each at the worst moment, of as many as exist at once
                          (`ops.head_loss`), and the head's gradient, which is made beside them
    copies                bfloat16 weights that autocast keeps until the end of the step
    gathered              fsdp: what is outside the blocks, two blocks and the gradient of one
    working               gradients of what one block keeps, while the backward pass is in it

The peak is the worst of three moments: logits, with all activations and the moments behind them;
the start of the backward pass, in the last block; its end, with all gradients. Holes between blocks
of memory are not counted: `RESERVE` is what they, and the runtime, may take.

The time of a step is a sum, each part over a rate of its own, because one does not run beside the
other:

    products     6 operations a weight and token, 8 where a forward pass is done again
    attention    7 products of queries and visible keys, rows taken as one text each
    memory       what is kept passes four times (written, read, its gradient written and read), in
                 PyTorch's chain of operations twice that; logits; 40 bytes a parameter of norm,
                 clipping and optimizer, and the casts of bfloat16; all at the rate of one pass

Messages come on top where the work waits for them (sums of tensor parallelism and of replicas) and
count only if they are longer than the work where it does not (fsdp). What an operation costs before
it does anything is left out, so models of a few thousand weights are slower than the forecast.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from endside.model.config import ModelConfig
from endside.model.flops import attention_flops, parameters
from endside.ops.head_loss.fused import LARGE
from endside.train.parallel import ParallelConfig

# How often a kept value passes through memory: in the core's passes, and in PyTorch's chain
CORE_PASSES, CHAIN_PASSES = 4, 8
CORE_LOGIT = 3  # passes over each logit in its own type, the core's
CHAIN_LOGIT = 28  # bytes more where softmax is PyTorch's chain in float32
OPTIMIZER_BYTES = 40  # a parameter: norm and clipping 12, AdamW reads four values and writes three
CAST_BYTES = 12  # a weight's copy in bfloat16 and its gradient's way back, each batch
# Share of memory lost to the runtime and to holes: on a GPU, and in a process on a CPU, with which
# freed blocks stay (bench/plan_check.py).
RESERVE, RESERVE_CPU = 0.08, 0.5


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
    flops: float  # per second, of the model's matrix products in the run's precision
    attention: float  # operations per second of attention, forward and backward
    memory_rate: float  # bytes per second, to and from its own memory
    link_rate: float  # bytes per second, to and from other devices
    core: bool = False  # whether what lies between products is done by the native core
    reserve: float = RESERVE  # share of the memory that is left free


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
    working: float
    block: float  # what one block keeps: of a recomputed one, until the backward pass is through it
    accumulating: bool

    @property
    def peak(self) -> float:
        """The worst of the logits' moment, and start and end of the backward pass."""
        standing = self.weights + self.moments + self.copies + self.gathered
        early = self.gradients if self.accumulating else 0.0
        begun = early + self.activations + max(self.logits, self.working)
        return standing + max(begun, self.gradients + self.block + self.working)


@dataclass(frozen=True)
class Seconds:
    """One optimiser step, by what it waits for."""

    products: float
    attention: float
    memory: float
    hidden: float  # messages that run beside the work
    exposed: float  # messages that the work waits for

    @property
    def step(self) -> float:
        """The whole step."""
        return max(self.products + self.attention + self.memory, self.hidden) + self.exposed


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
        working=tokens * _inside_bytes(work, split),
        block=tokens * _block_bytes(work, split),
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
    width = model.hidden_size
    # Each norm keeps its input; its output, cast once in bfloat16, serves all projections.
    each = 2 if work.bf16 else 4
    return 8 * width + each * 2 * width + _inside_bytes(work, split)


def _inside_bytes(work: Work, split: int) -> float:
    """Bytes per token between a block's projections: in attention and in feed-forward."""
    model = work.model
    heads = 2 * (model.num_attention_heads + model.num_key_value_heads) * model.head_dim
    return (2 if work.bf16 else 4) * (heads + 3 * model.intermediate_size) / split


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
    again = (2 + 5 + 2 * work.recompute) / 7  # products of attention
    hidden, exposed = _messages(work, device.count, tokens)
    return Seconds(
        products=tokens * _product_operations(work, split) / device.flops,
        attention=tokens * attention_operations(work.model, work.seq_len) * again / split
        / device.attention,
        memory=_moved(work, device, tokens) / device.memory_rate,
        hidden=hidden / device.link_rate,
        exposed=exposed / device.link_rate,
    )  # fmt: skip


def attention_operations(model: ModelConfig, length: int) -> float:
    """Of all layers, for a trained token in rows of `length`: two products forward, five back."""
    return 7 / 2 * attention_flops(model, max(1, length // 2))


def _product_operations(work: Work, split: int) -> float:
    """Of projections and head, for a trained token, on a device that holds 1 / split."""
    counted = parameters(work.model)
    blocks = (counted.attention + counted.feed_forward) / split + counted.mtp
    head = (1 + work.model.mtp_layers) * work.model.vocab_size * work.model.hidden_size
    return (8 if work.recompute else 6) * blocks + (8 if work.chunk else 6) * head


def _moved(work: Work, device: Device, tokens: float) -> float:
    """Bytes that pass through a device's memory between the products of a step."""
    split, data = work.parallel.tensor, data_size(work, device.count)
    blocks, outside = _weights(work, split)
    fsdp = work.parallel.shard == "fsdp" and data > 1
    held = (blocks + outside) / (data if fsdp else 1)
    kept = _kept_bytes(replace(work, recompute=False), split) * (1.25 if work.recompute else 1)
    passes = CORE_PASSES if device.core else CHAIN_PASSES
    width = 2 if work.bf16 else 4
    logit = CORE_LOGIT * width
    if work.chunk or not device.core:
        logit = 2 * width + CHAIN_LOGIT
    logits = (1 + work.model.mtp_layers) * work.model.vocab_size * logit
    casts = CAST_BYTES * (blocks + outside) * work.accumulate if work.bf16 else 0.0
    return tokens * (passes * kept + logits) + OPTIMIZER_BYTES * held + casts


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
    return memory(work, device.count).peak <= device.memory * (1 - device.reserve)


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
