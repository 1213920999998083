"""The tour: a model's whole life on this machine, no network, in a few minutes.

    text -> tokenizer -> token shards -> training -> held-out perplexity -> checkpoint -> text again
    the same model in 4 bits on the native engine: its size, speed and perplexity;
    with drafts that change no token, and held to a JSON schema (demo_answers)
    and one layer of sparse attention over a long context, beside the dense one

Every figure it prints was measured in that run. What a step made lies in the output folder and is
found again: a tour that was killed goes on where its last checkpoint stands. The number of training
steps is measured, not fixed (what fits the time budget on this machine), and stored with the run.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from endside import demo_answers
from endside.atomic import write_atomic
from endside.data import corpus
from endside.data.document import Document
from endside.data.pack import Encoder, Packed, open_packed, pack
from endside.data.source import DataConfig
from endside.errors import UserError
from endside.formats import hf
from endside.model.presets import preset
from endside.model.transformer import Transformer
from endside.tokenizer import Tokenizer, train_bpe
from endside.train import pretrain
from endside.train.optim import OptimConfig
from endside.train.plot import loss_curves
from endside.train.run_folder import RunFolder
from endside.train.schedule import ScheduleConfig

TOKENIZER_TEXT = 3_000_000  # characters the tokenizer is trained on
PROMPTS = ("The following", "Return a new", "def __init__(self")
LOW_BIT_ROWS = 24  # rows of held-out text that the low-bit model is judged on
LONG = 65536  # keys of the long-context step
BATCH, SEQ_LEN = 8, 256  # rows and tokens: the largest batch that still takes many steps


@dataclass(frozen=True)
class Demo:
    """The tour on this machine: real text, tokenizer, small model, text again."""

    corpus: Path | None = None
    """Folder or file of your own text; default: this Python's documentation and sources."""
    out: Path = Path("runs/demo")
    """Where everything it makes goes; run again with the same folder to go on."""
    minutes: float = 3.5
    """Time for training; the rest of the tour takes about one more."""
    steps: int | None = None
    """Training steps; default: as many as fit the minutes here."""
    checkpoint_seconds: float = 20.0
    """Time between checkpoints: what a kill loses at most."""
    threads: int | None = None
    """CPU threads; default: PyTorch's choice."""


def tour(flags: Demo) -> None:
    """Walk through all steps, printing one paragraph each. Raises UserError for bad input."""
    begun = time.monotonic()
    if flags.minutes <= 0 or (flags.steps is not None and flags.steps < 1):
        raise UserError(f"--minutes {flags.minutes} and --steps {flags.steps} must be positive")
    source = _remember(flags)
    tokenizer = _tokenizer(flags, source)
    packed = _shards(flags, source, tokenizer)
    model, cfg = _train(flags, tokenizer)
    _judge(model, packed, cfg)
    _generate(flags.out / "model")
    _low_bits(flags.out / "model", packed)
    _say("drafts", demo_answers.drafts(flags.out / "model", _heldout_rows(packed)[:3]))
    _say("json", demo_answers.constrained(flags.out / "model"))
    _long_context()
    _next_steps(flags, time.monotonic() - begun)


def _say(step: str, text: str) -> None:
    print(f"{step:<10} {text}", flush=True)


def _remember(flags: Demo) -> str:
    """Where the text comes from; a folder that was made from other text is refused."""
    source = str(flags.corpus.resolve()) if flags.corpus else f"python {sys.version.split()[0]}"
    note = flags.out / "tour.json"
    try:
        flags.out.mkdir(parents=True, exist_ok=True)
        before = json.loads(note.read_text())["source"] if note.exists() else source
        if before == source:
            write_atomic(note, json.dumps({"source": source}) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {flags.out}: {error}; give another --out") from error
    if before != source:
        raise UserError(f"{flags.out} was made from {before}: remove it, or give another --out")
    return source


def _documents(flags: Demo) -> Iterator[Document]:
    return corpus.read(flags.corpus) if flags.corpus else corpus.standard_library()


def _tokenizer(flags: Demo, source: str) -> Tokenizer:
    folder = flags.out / "tokenizer"
    if folder.exists():
        _say("tokenizer", f"found in {folder}")
        return Tokenizer.load(folder)
    begun = time.monotonic()
    texts = list(_up_to(_documents(flags), TOKENIZER_TEXT))
    tokenizer = train_bpe(iter(texts), preset("demo").vocab_size)
    tokenizer.save(folder)
    sample = "".join(texts)[:200_000]
    ratio = len(sample.encode()) / len(tokenizer.encode(sample, bos=False))
    _say(
        "tokenizer",
        f"{tokenizer.vocab_size} tokens from {sum(map(len, texts)) / 1e6:.1f} M characters of "
        f"{source}; {ratio:.2f} bytes per token ({time.monotonic() - begun:.1f} s)",
    )
    return tokenizer


def _up_to(documents: Iterator[Document], characters: int) -> Iterator[str]:
    """Every document's text until there is enough."""
    taken = 0
    for document in documents:
        if taken >= characters:
            return
        taken += len(document.text)
        yield document.text


def _shards(flags: Demo, source: str, tokenizer: Tokenizer) -> Packed:
    folder = flags.out / "tokens"
    begun = time.monotonic()
    if not folder.exists():
        encoder = Encoder(
            lambda text: tokenizer.encode(text, bos=False),
            vocab_size=tokenizer.vocab_size,
            eos=tokenizer.eos_ids[0],
            fingerprint=tokenizer.fingerprint,
        )
        pack(_documents(flags), folder, encoder)
    packed = open_packed(folder)
    train, held = (sum(map(len, packed.tokens(split))) for split in ("train", "heldout"))
    _say(
        "tokens",
        f"{train:,} to train on, {held:,} held out by document, from {source} "
        f"({time.monotonic() - begun:.1f} s)",
    )
    return packed


def _train(flags: Demo, tokenizer: Tokenizer) -> tuple[Transformer, pretrain.PretrainConfig]:
    run_folder = flags.out / "train"
    with RunFolder(run_folder) as run:
        cfg = run.stored(pretrain.PretrainConfig) or _plan(flags, tokenizer)
        if flags.steps is not None and flags.steps != cfg.steps:
            raise UserError(
                f"--steps is {flags.steps} but {run_folder} was started with {cfg.steps}: "
                "use that number, or give another --out"
            )
        begun = time.monotonic()
        model = pretrain.main(cfg, run, export=lambda model, _: _export(model, flags))
    spent = time.monotonic() - begun
    picture = flags.out / "loss.png"
    loss_curves([run_folder], picture)
    _say("training", f"{cfg.steps} steps done ({spent:.0f} s this time); the curve: {picture}")
    return model, cfg


def _plan(flags: Demo, tokenizer: Tokenizer) -> pretrain.PretrainConfig:
    """The run's configuration, with as many steps as fit the minutes on this machine."""
    shape = replace(
        preset("demo"), bos_token_id=tokenizer.bos_id, eos_token_ids=tuple(tokenizer.eos_ids)
    )
    steps = flags.steps or 1000
    cfg = pretrain.PretrainConfig(
        model=shape,
        data=DataConfig(shards=str(flags.out / "tokens")),
        steps=steps, batch=BATCH, seq_len=SEQ_LEN, threads=flags.threads,
        schedule=_schedule(steps), optim=OptimConfig(learning_rate=0.01),
        checkpoint_seconds=flags.checkpoint_seconds,
    )  # fmt: skip
    speed = pretrain.measure_speed(cfg)
    if flags.steps is None:
        steps = max(50, int(flags.minutes * 60 * speed / (BATCH * SEQ_LEN)))
        cfg = replace(cfg, steps=steps, schedule=_schedule(steps), eval_every=max(1, steps // 8))
    parameters = sum(p.numel() for p in Transformer(shape).parameters())
    _say(
        "model",
        f"{parameters / 1e6:.2f} M parameters; this machine trains {speed:,.0f} tokens/s, so "
        f"{steps} steps of {BATCH * SEQ_LEN} tokens",
    )
    return cfg


def _schedule(steps: int) -> ScheduleConfig:
    """WSD: a short warm-up, then constant, the last fifth decaying."""
    return ScheduleConfig(warmup=max(1, steps // 20), decay=max(1, steps // 5), floor=0.05)


def _export(model: Transformer, flags: Demo) -> None:
    """The trained model beside the run, in Hugging Face layout."""
    hf.save(model, flags.out / "model", tokenizer_files=flags.out / "tokenizer", overwrite=True)


def _judge(model: Transformer, packed: Packed, cfg: pretrain.PretrainConfig) -> None:
    """Held-out perplexity beside the unigram baseline, which knows only how frequent tokens are."""
    loss = pretrain.heldout(packed, replace(cfg, eval_rows=128))(model)["heldout_loss"]
    baseline = unigram_loss(packed)
    per_token = packed.index.text_bytes["heldout"] / sum(map(len, packed.tokens("heldout")))
    _say(
        "held out",
        f"perplexity {math.exp(loss):.1f}, unigram baseline {math.exp(baseline):.1f}; "
        f"{loss / math.log(2) / per_token:.2f} bits per byte",
    )


def unigram_loss(packed: Packed) -> float:
    """Nats per held-out token under add-one smoothed frequencies of the training tokens."""
    counts: Counter[int] = Counter()
    for shard in packed.tokens("train"):
        counts.update(shard.tolist())
    total = sum(counts.values()) + packed.index.vocab_size
    held = [token for shard in packed.tokens("heldout") for token in shard.tolist()]
    return -sum(math.log((counts[token] + 1) / total) for token in held) / len(held)


def _generate(folder: Path) -> None:
    """Load what was just written, as any user would, and continue three beginnings."""
    from endside.api import LLM

    llm = LLM(folder, executor="torch")
    for prompt in PROMPTS:
        made = llm.generate(prompt, max_tokens=40, temperature=0.7, top_p=0.9, seed=1)
        speed = made.timings.decode_tokens_per_s
        _say("generate", f"{prompt!r} -> {made.text!r} ({speed:.0f} tokens/s)")


def _low_bits(folder: Path, packed: Packed) -> None:
    """The trained model on the native engine, with its own weights and rounded to 4 bits."""
    from endside import native

    if native.load() is None:
        return _say("low bits", f"left out: {native.status()}")
    rows = _heldout_rows(packed)
    if not rows:
        return _say("low bits", f"left out: fewer than {SEQ_LEN} held-out tokens to judge on")
    (wide, wide_bytes, wide_speed), (low, low_bytes, low_speed) = (
        _engine_figures(folder, quant, rows) for quant in ("none", "int4")
    )
    _say(
        "low bits",
        f"int4, groups of 32: {low_bytes / 1e6:.1f} MB of weights instead of "
        f"{wide_bytes / 1e6:.1f}, {low_speed:.0f} tokens/s instead of {wide_speed:.0f}, held-out "
        f"perplexity {math.exp(low):.1f} instead of {math.exp(wide):.1f}",
    )


def _heldout_rows(packed: Packed) -> list[list[int]]:
    """Rows of one training length, spread evenly over the held-out tokens."""
    tokens = [token for shard in packed.tokens("heldout") for token in shard.tolist()]
    rows = min(LOW_BIT_ROWS, len(tokens) // SEQ_LEN)
    apart = len(tokens) // max(1, rows)
    return [tokens[row * apart : row * apart + SEQ_LEN] for row in range(rows)]


def _engine_figures(folder: Path, quant: str, rows: list[list[int]]) -> tuple[float, int, float]:
    """Held-out loss in nats per token, bytes of weights, tokens/s of decoding."""
    from endside.api import LLM
    from endside.engine.measure import weight_bytes

    llm = LLM(folder, executor="native", quant=quant, group=32, context=2 * SEQ_LEN)
    losses: list[float] = []
    for row in rows:
        logits = llm.logits(row)[:-1].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        right = logits[np.arange(len(row) - 1), row[1:]]
        losses.extend(np.log(np.exp(logits).sum(-1)) - right)
    made = llm.generate(PROMPTS[0], max_tokens=200, temperature=0.0)
    size = weight_bytes(llm.engine.executor)
    return statistics.fmean(losses), size or 0, made.timings.decode_tokens_per_s


def _long_context() -> None:
    """One attention layer of the 0.5B shape, one new token behind a long context: sparse, dense."""
    import torch

    from endside.ops import attention, infllm
    from endside.ops.infllm.config import SparseConfig
    from endside.ops.infllm.reference import summarise

    shape, sparse, make = preset("minicpm4-0.5b"), SparseConfig(), torch.Generator().manual_seed(0)
    heads, groups, width = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
    q = torch.randn(1, 1, heads, width, generator=make)
    k, v = (torch.randn(1, LONG, groups, width, generator=make) for _ in range(2))
    summaries = summarise(k, sparse)
    seen = infllm.attend_stats(1, LONG, sparse)
    assert seen.ratio < 0.5, f"sparsity does not act: {seen.ratio:.2f} of the keys are seen"
    seconds: dict[str, list[float]] = {"sparse": [], "dense": []}
    with torch.inference_mode():
        for _ in range(12):
            begun = time.perf_counter()
            infllm.attend(q, k, v, sparse=sparse, summaries=summaries)
            middle = time.perf_counter()
            attention.attend(q, k, v)
            seconds["sparse"].append(middle - begun)
            seconds["dense"].append(time.perf_counter() - middle)
    # the fastest of each: a busy machine stretches many small steps more than one large one
    fast, slow = (min(seconds[name]) * 1e3 for name in ("sparse", "dense"))
    _say(
        "long",
        f"{LONG:,} keys, one layer of the 0.5B shape: sparse attention sees {seen.visible:,.0f} "
        f"of them ({seen.ratio:.2f}) and takes {fast:.1f} ms a token at best, dense {slow:.1f} ms",
    )


def _next_steps(flags: Demo, seconds: float) -> None:
    model = flags.out / "model"
    command = "endside" if shutil.which("endside") else Path(sys.executable).with_name("endside")
    _say("done", f"in {seconds / 60:.1f} minutes. Try next:")
    for rest in (
        f'run {model} "The following" --temperature 0.7 --quant int4 --stats',
        f"inspect {model}",
        f"convert {model} {flags.out / 'llama'} --to llama",
        'run openbmb/MiniCPM4-0.5B "What is a phone?"   # a published model, from the hub',
    ):
        print(f"           {command} {rest}")
