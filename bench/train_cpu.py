"""Our training step against the plain baseline: `transformers` Trainer on the same model and batch.

    python bench/train_cpu.py [--quick] [--rounds 4] [--threads 2] [--dtypes bfloat16,float32]
                              [--switch] [--isa avx512]

One Llama shape of 32 M parameters, the same start in both, the same packed batches: rows of 512
tokens that hold several documents, which must not see each other (the Trainer is told by their
positions, and its model then builds the mask of blocks itself). Weights and moments float32;
bfloat16 means autocast in both. Clipping at norm 1, fused AdamW, no logging inside the steps.

The Trainer runs once from start to end, in a process of its own as its users run it: our loop sets
a switch of the allocator (`train/pages.py`) that holds for the whole process. `--switch` sets it in
the Trainer's process too, and says so in the result. Between its rounds of a few steps a callback
waits while ours run, through the product's own loop, so both are measured in turn all the way. A
step is timed from the end of the one before. The first step of either in a round is not counted.

Beside each row stands what its matrix products take alone: PyTorch's, which the Trainer's step is
made of, and in float32 on a processor with matrix tiles our own (`ops/linear/tiles.py`).

`--isa` gives our passes and products an older instruction set, as on a processor without tiles
(PyTorch's own choices stay); it goes into the result.

Before any figure counts, the first losses of both must agree to 1e-3 (1e-2 in bfloat16): the same
model, packing and batch. Needs the packages `transformers` and `accelerate`; without them it says
so and ends. Writes bench/results/train_cpu.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.attend_cpu import machine
from endside.config import build
from endside.data.loader import TokenBatch
from endside.log import Progress
from endside.model.config import ModelConfig
from endside.model.flops import parameters
from endside.model.transformer import Transformer
from endside.ops import passes
from endside.ops.linear import tiles
from endside.train.loop import loop
from endside.train.losses import LossConfig, model_batch, next_token
from endside.train.optim import OptimConfig
from endside.train.pages import keep_pages
from endside.train.pretrain import DataConfig, PretrainConfig
from endside.train.run_folder import RunFolder
from endside.train.schedule import ScheduleConfig

ROOT = Path(__file__).resolve().parent.parent
Dtype = Literal["float32", "bfloat16"]
SHAPE = ModelConfig(
    vocab_size=16384, hidden_size=512, num_hidden_layers=8, num_attention_heads=8,
    num_key_value_heads=4, head_dim=64, intermediate_size=1408, max_position_embeddings=2048,
    tie_word_embeddings=True, initializer_range=0.02,
)  # fmt: skip
RATE, TARGET = 1e-4, 1.3
SIDES = ("ours_s", "trainer_s")
CLOSE = {"float32": 1e-3, "bfloat16": 1e-2}  # of the first loss


@dataclass(frozen=True)
class Task:
    """What is trained, and how often."""

    shape: ModelConfig = SHAPE
    rows: int = 2
    length: int = 512  # tokens a row predicts
    document: int = 150  # tokens, on average; 0: one document a row
    rounds: int = 4
    steps: int = 2  # counted per round and side


class Packed:
    """Random tokens in documents of random length: batch i depends on i alone."""

    def __init__(self, task: Task) -> None:
        self.task, self.number = task, 0

    def __next__(self) -> TokenBatch:
        self.number += 1
        return self.at(self.number - 1)

    def at(self, number: int) -> TokenBatch:
        """Batch `number`."""
        make = torch.Generator().manual_seed(number)
        size = (self.task.rows, self.task.length + 1)
        tokens = torch.randint(self.task.shape.vocab_size, size, generator=make)
        begins = torch.zeros(size, dtype=torch.int64)
        if self.task.document:
            begins = (torch.rand(size, generator=make) < 1 / self.task.document).long()
        begins[:, 0] = 0
        return TokenBatch(tokens, begins.cumsum(1))

    def state(self) -> dict[str, Any]:
        """Where the next batch comes from."""
        return {"number": self.number}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.number = state["number"]

    def fits(self, state: dict[str, Any]) -> bool:
        """Any state is one of these batches."""
        return "number" in state


class Unsaved(RunFolder):
    """A run that keeps no checkpoint, and notes when each step ended."""

    def __init__(self, path: Path, ends: list[float], losses: list[float]) -> None:
        super().__init__(path, progress=Progress(open(os.devnull, "w")))  # noqa: SIM115
        self.ends, self.losses = ends, losses

    def begin(self, start: int) -> None:
        """Listen to the records."""
        super().begin(start)
        write = self.metrics.append

        def append(step: int, values: dict[str, Any]) -> None:
            self.ends.append(time.perf_counter())
            self.losses.append(values["loss"])
            write(step, values)

        self.metrics.append = append

    def save(self, *_: Any, **__: Any) -> None:
        """Nothing: checkpoints are not what is timed."""


@dataclass
class Side:
    """What one side needed, seconds a step."""

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def add(self, ends: list[float]) -> None:
        """The steps of one round from their ends; the first is not counted."""
        self.seconds += [later - one for one, later in pairwise(ends)]


def config(task: Task, dtype: Dtype, steps: int) -> PretrainConfig:
    """Our side, as a run would be configured."""
    return PretrainConfig(
        model=task.shape, data=DataConfig(shards="none"), steps=steps, batch=task.rows,
        seq_len=task.length, precision=dtype, checkpoint_seconds=0.0,
        schedule=ScheduleConfig(warmup=0), loss=LossConfig(),
        optim=OptimConfig(learning_rate=RATE, weight_decay=0.0),
    )  # fmt: skip


def ours(task: Task, model: Transformer, dtype: Dtype, side: Side) -> None:
    """One round through the product's loop."""
    ends: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        run = Unsaved(Path(scratch) / "run", ends, side.losses)
        with run:
            cfg = config(task, dtype, task.steps + 1)
            loop(model, Packed(task), next_token(cfg.loss), cfg, run)
    side.add(ends)


def inputs(batch: TokenBatch) -> dict[str, torch.Tensor]:
    """The batch for a model of transformers, which shifts the labels itself."""
    packed = model_batch(batch)
    labels = batch.tokens[:, :-1].clone()
    own = batch.documents[:, :-1]
    labels[:, 1:][own[:, 1:] != own[:, :-1]] = -100
    # its last label is lost to the shift: give both sides the same targets
    return {"input_ids": packed.tokens, "position_ids": packed.positions, "labels": labels}


def peer(task: Task, model: Transformer) -> Any:
    """LlamaForCausalLM of the same shape with the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = task.shape
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocab_size, hidden_size=shape.hidden_size,
            num_hidden_layers=shape.num_hidden_layers,
            num_attention_heads=shape.num_attention_heads,
            num_key_value_heads=shape.num_key_value_heads, head_dim=shape.head_dim,
            intermediate_size=shape.intermediate_size, rms_norm_eps=shape.rms_norm_eps,
            max_position_embeddings=shape.max_position_embeddings,
            tie_word_embeddings=True, attn_implementation="sdpa", use_cache=False,
            bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip
    weights = {f"model.{name}": value.clone() for name, value in model.state_dict().items()}
    missing, unknown = llama.load_state_dict(weights, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unknown, f"{missing} {unknown}"
    return llama


def trainer(task: Task, llama: Any, dtype: Dtype, between: Any, scratch: str) -> Any:
    """A Trainer that calls `between` around its steps."""
    from transformers import Trainer, TrainingArguments

    class Rows(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
            packed = Packed(task)
            while True:
                batch = inputs(next(packed))
                for row in range(task.rows):
                    yield {name: value[row] for name, value in batch.items()}

    arguments = TrainingArguments(
        output_dir=scratch, max_steps=task.rounds * (task.steps + 1),
        per_device_train_batch_size=task.rows, learning_rate=RATE, weight_decay=0.0,
        lr_scheduler_type="constant", max_grad_norm=1.0, adam_beta2=0.95,
        optim="adamw_torch_fused", bf16=dtype == "bfloat16", use_cpu=True, save_strategy="no",
        logging_strategy="no", report_to=[], disable_tqdm=True, dataloader_num_workers=0,
    )  # fmt: skip
    return Trainer(llama, arguments, train_dataset=Rows(), callbacks=[between])


def serve_trainer(task: Task, dtype: Dtype, switch: bool) -> None:
    """The Trainer's process: its first loss, then the ends of each round, a line on stdout each.

    After every round it waits for a line on stdin.
    """
    from transformers import TrainerCallback

    if switch:
        keep_pages()
    lines, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no answer

    def say(what: Any) -> None:
        print(json.dumps(what), file=lines, flush=True)
        sys.stdin.readline()

    class Between(TrainerCallback):
        """Times the steps, and waits while the other side has its turn."""

        ends: list[float] = []  # noqa: RUF012 (one object, one run)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(time.perf_counter())
            if len(self.ends) == task.steps + 1:
                say(self.ends)
                self.ends = []

    llama = peer(task, start(task))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        first = llama(**inputs(Packed(task).at(0))).loss.item()
    with tempfile.TemporaryDirectory() as scratch:
        made = trainer(task, llama, dtype, Between(), scratch)
        say(first)
        made.train()


def start(task: Task) -> Transformer:
    """The weights that both begin with."""
    model = Transformer(task.shape)
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def compare(task: Task, dtype: Dtype, switch: bool = False) -> tuple[Side, Side]:
    """(ours, theirs), measured in turn, each in its own process."""
    mine, theirs, model = Side(), Side(), start(task)
    asked = {"task": asdict(task), "dtype": dtype, "switch": switch}
    command = [sys.executable, __file__, "--trainer", json.dumps(asked)]
    command += ["--threads", str(torch.get_num_threads())]
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True
        ) as child,
    ):
        try:
            for number in range(task.rounds + 1):
                line = child.stdout.readline()
                if not line:
                    said.seek(0)
                    raise RuntimeError(f"the Trainer's process ended: {said.read()[-2000:]}")
                if number:
                    theirs.add(json.loads(line))
                    ours(task, model, dtype, mine)
                else:
                    theirs.losses.append(json.loads(line))
                child.stdin.write("go\n")
                child.stdin.flush()
        finally:
            child.terminate()
    return mine, theirs


def expected_loss(task: Task, dtype: Dtype) -> float:
    """Our first loss on the targets the baseline has: its shift loses the last of a row."""
    model = start(task)
    batch = Packed(task).at(0)
    shorter = TokenBatch(batch.tokens[:, :-1], batch.documents[:, :-1])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        return next_token(LossConfig())(model, shorter).loss.item()


def products_alone(
    task: Task, dtype: Dtype, repeats: int = 5, multiply: Callable[..., Any] = torch.mm
) -> float:
    """Seconds that the matrix products of one step take, into memory that is there already.

    Three for each projection and the head; those of attention are left out.
    """
    shape, tokens = task.shape, task.rows * task.length
    width, keys = shape.hidden_size, shape.num_key_value_heads * shape.head_dim
    query, inner = shape.num_attention_heads * shape.head_dim, shape.intermediate_size
    layer = [(width, query), (width, keys), (width, keys), (query, width)]
    layer += [(width, inner), (width, inner), (inner, width)]
    found = {}
    for inputs, outputs in {*layer, (width, shape.vocab_size)}:
        sizes = ((tokens, inputs), (outputs, inputs), (tokens, outputs))
        x, weight, y = (torch.full(size, 0.5, dtype=getattr(torch, dtype)) for size in sizes)
        times = []
        for _ in range(repeats):
            begun = time.perf_counter()
            multiply(x, weight.t(), out=y)
            multiply(y, weight, out=x)
            multiply(y.t(), x, out=weight)
            times.append(time.perf_counter() - begun)
        found[inputs, outputs] = min(times)
    head = found[width, shape.vocab_size]
    return shape.num_hidden_layers * sum(found[one] for one in layer) + head


def own_products_alone(task: Task, dtype: Dtype) -> float | None:
    """The same where our step makes them itself; None where it asks PyTorch."""
    if dtype != "float32" or not passes.has_tiles():
        return None
    return products_alone(task, dtype, multiply=tiles.multiply)


def row(task: Task, dtype: Dtype, switch: bool = False) -> dict[str, Any]:
    """One line of the result."""
    mine, theirs = compare(task, dtype, switch)
    apart = abs(expected_loss(task, dtype) - theirs.losses[0])
    assert apart <= CLOSE[dtype], f"the first losses differ by {apart}: not the same task"
    medians = [statistics.median(side.seconds) for side in (mine, theirs)]
    # the ratio of each pair of rounds, for its spread
    pairs = [
        statistics.median(theirs.seconds[i : i + task.steps])
        / statistics.median(mine.seconds[i : i + task.steps])
        for i in range(0, len(mine.seconds), task.steps)
    ]
    tokens = task.rows * task.length
    return {
        "dtype": dtype, "document": task.document, "trainer_has_switch": switch,
        "first_losses_apart": apart,
        "ours_s": mine.seconds, "trainer_s": theirs.seconds,
        "ours_tokens_per_s": tokens / medians[0], "trainer_tokens_per_s": tokens / medians[1],
        "ratio": medians[1] / medians[0], "ratio_of_rounds": [min(pairs), max(pairs)],
        "products_alone_s": products_alone(task, dtype),
        "own_products_alone_s": own_products_alone(task, dtype),
    }  # fmt: skip


def line(found: dict[str, Any]) -> str:
    """A printed row."""
    text = "packed documents" if found["document"] else "one text a row"
    low, high = found["ratio_of_rounds"]
    own = found["own_products_alone_s"] or found["products_alone_s"]
    alone = (own, found["products_alone_s"])
    shares = [part / statistics.median(found[s]) for part, s in zip(alone, SIDES, strict=True)]
    return (
        f"{found['dtype']:<9} {text:<17} {found['ours_tokens_per_s']:>9.0f} "
        f"{found['trainer_tokens_per_s']:>9.0f} {found['ratio']:>6.2f} [{low:.2f} .. {high:.2f}]"
        f"   {alone[0]:.3f} and {alone[1]:.3f} s: {shares[0]:.0%} of ours, {shares[1]:.0%} of its"
    )


def main() -> int:
    """Measure, print, write; the exit code says only whether it ran."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=Task.rounds)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--quick", action="store_true", help="one round, bfloat16, packed only")
    parser.add_argument("--switch", action="store_true", help="the Trainer keeps pages as we do")
    parser.add_argument("--isa", default="auto", help="instruction set of our passes")
    parser.add_argument("--trainer", help=argparse.SUPPRESS)  # the other process
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/train_cpu.json")
    flags = parser.parse_args()
    missing = [name for name in ("transformers", "accelerate") if find_spec(name) is None]
    if missing:
        print(f"train_cpu: nothing to compare with, install {' and '.join(missing)}")
        return 0
    torch.set_num_threads(flags.threads)
    passes.ISA = flags.isa
    if flags.trainer:
        asked = json.loads(flags.trainer)
        task = build(Task, asked.pop("task"), source="--trainer")
        serve_trainer(task, **asked)
        return 0
    dtypes = ["bfloat16"] if flags.quick else flags.dtypes.split(",")
    rounds = 1 if flags.quick else flags.rounds
    count = parameters(SHAPE).total
    print(f"{count / 1e6:.0f} M parameters, {Task.rows} x {Task.length} tokens a step")
    print("dtype     batch                 ours   Trainer  ratio  (tokens/s; by rounds)   products")
    rows = []
    for dtype in dtypes:
        for document in (Task.document,) if flags.quick else (Task.document, 0):
            rows.append(row(Task(rounds=rounds, document=document), dtype, flags.switch))
            print(line(rows[-1]), flush=True)
    least = min(found["ratio"] for found in rows)
    said = "reached" if least >= TARGET else "missed"
    print(f"target {TARGET} in every row: {said} ({least:.2f} at least)")
    import transformers

    report = {
        "machine": machine(), "isa": flags.isa, "transformers": transformers.__version__,
        "parameters": count, "shape": asdict(SHAPE), "rows": rows,
    }  # fmt: skip
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    flags.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(least < TARGET)


if __name__ == "__main__":
    sys.exit(main())
