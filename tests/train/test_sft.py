"""Fine-tuning: what is learned, what is not, resume, starts, and the folder that comes out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from endside import chat
from endside.api import LLM
from endside.chatml import CHATML
from endside.config import dump
from endside.data.conversation_rows import best_fit, stack
from endside.data.conversations import Example
from endside.errors import UserError
from endside.formats import hf
from endside.log import read_metrics
from endside.model.presets import preset
from endside.model.transformer import Transformer
from endside.ops.cross_entropy.reference import cross_entropy
from endside.tokenizer import Tokenizer
from endside.train import pretrain, sft
from endside.train.lora import LoraConfig
from endside.train.losses import LossConfig, next_token
from endside.train.pretrain import PretrainConfig
from endside.train.sft import SftConfig
from endside.train.spikes import SpikeConfig
from endside.verbs import sft as verb
from tests.train.conftest import dies_at, records
from tests.train.processes import Nursery
from tests.train.sums import small, write_start, write_sums

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "sft.json"


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_start(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="session")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sums(tmp_path_factory.mktemp("sums") / "sums.jsonl")


@pytest.fixture
def tuned(start: Path, sums: Path) -> SftConfig:
    return small(start, sums)


def train(cfg: SftConfig, run: Any) -> list[dict[str, float]]:
    """Train, and return the records but for how fast each step was."""
    sft.main(cfg, run)
    return records(run.path)


def test_twenty_losses_are_the_golden_ones_and_fall(tuned: SftConfig, open_run: Any) -> None:
    found = train(replace(tuned, eval_every=10), open_run())
    losses = [record["loss"] for record in found if "loss" in record]
    assert losses == pytest.approx(json.loads(GOLDEN.read_text())["loss"], abs=2e-5)
    held = [r for r in found if "heldout_loss" in r]
    assert held[-1]["heldout_loss"] < losses[0] - 1
    assert held[-1]["heldout_think"] != held[-1]["heldout_no_think"]


def examples(model_vocab: int, count: int = 9) -> list[Example]:
    draw = np.random.RandomState(4)
    made = []
    for _ in range(count):
        length = draw.randint(3, 30)
        mask = draw.randint(0, 2, length)
        mask[0], mask[-1] = 0, 1
        ids = draw.randint(0, model_vocab, length)
        made.append(Example(ids.astype(np.int32), mask.astype(np.uint8), "plain", 0))
    return made


@pytest.mark.parametrize("shape", ["tiny", "tiny-sparse"])
def test_packed_equals_separate(shape: str) -> None:
    config = preset(shape)
    if config.sparse is not None:
        # Small enough that a query of these lengths sees less than half of the keys.
        few = replace(config.sparse, kernel_size=4, kernel_stride=2, block_size=8, topk=2,
                      init_blocks=1, window_size=8, dense_len=0)  # fmt: skip
        config = replace(config, sparse=few)
    model = Transformer(config).double()
    model.init_weights(torch.Generator().manual_seed(1))
    made = examples(config.vocab_size)
    if config.sparse is not None:
        long = np.arange(120) % config.vocab_size
        made += [Example(long.astype(np.int32), (long > 0).astype(np.uint8), "plain", 0)] * 2
        from endside.ops.infllm import attend_stats

        assert attend_stats(120, 120, config.sparse).ratio < 0.5
    loss_fn = next_token(LossConfig())
    width = 128 if config.sparse is not None else 40
    rows = best_fit([len(one) for one in made], width)
    assert len(rows) < len(made)
    packed = loss_fn(model, stack([[made[item] for item in row] for row in rows], width - 1))
    packed.total.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    total = targets = 0.0
    for one in made:
        alone = loss_fn(model, stack([[one]], len(one) - 1))
        alone.total.backward()
        total, targets = total + alone.total.item(), targets + int(alone.targets)
    assert packed.targets == targets == sum(int(one.mask[1:].sum()) for one in made)
    assert packed.total.item() == pytest.approx(total, rel=1e-6)
    for name, parameter in model.named_parameters():
        bound = 1e-5 * float(parameter.grad.abs().max())
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=bound)


def test_the_gradient_of_the_masked_loss_is_the_slope_of_its_formula() -> None:
    """Central differences in float64 of -sum log softmax at the marked tokens, written out."""
    made, width = examples(320, 3), 48
    batch = stack([made], 89)
    draw = torch.Generator().manual_seed(5)
    head = torch.randn(320, width, generator=draw).double() / 7
    hidden = torch.randn(1, 89, width, generator=draw).double()

    class Fixed(torch.nn.Module):
        """Hidden states that do not depend on the tokens."""

        mtp = None

        def __init__(self, states: torch.Tensor) -> None:
            super().__init__()
            self.states = states

        def forward(self, _: Any) -> torch.Tensor:
            return self.states

        def logits(self, states: torch.Tensor) -> torch.Tensor:
            return states @ head.T

        def head_loss(self, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return cross_entropy(self.logits(states), targets)

    def formula(states: torch.Tensor) -> float:
        total, at = 0.0, 0
        for one in made:
            for place in range(1, len(one)):
                if one.mask[place]:
                    scores = head @ states[0, at + place - 1]
                    total += float(scores.logsumexp(0) - scores[one.ids[place]])
            at += len(one)
        return total

    states = hidden.clone().requires_grad_(True)
    loss = next_token(LossConfig())(Fixed(states), batch)
    loss.total.backward()
    assert 0 < int(loss.targets) < 60
    assert loss.total.item() == pytest.approx(formula(hidden), rel=1e-6)
    for _ in range(4):
        towards = torch.randn(hidden.shape, generator=draw).double()
        slope = (formula(hidden + 1e-5 * towards) - formula(hidden - 1e-5 * towards)) / 2e-5
        assert float((states.grad * towards).sum()) == pytest.approx(slope, rel=1e-5)


def test_words_of_the_user_teach_nothing(tuned: SftConfig) -> None:
    made = examples(320, 1)[0]
    model = pretrain.make_model(PretrainConfig(preset("tiny"), None, 200))  # type: ignore[arg-type]
    loss = next_token(LossConfig())(model, stack([[made]], 60))
    assert int(loss.targets) == int(made.mask[1:].sum()) < len(made) - 1


def test_a_run_that_stopped_goes_on_to_the_same_weights(
    tuned: SftConfig, open_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = open_run("whole")
    found = train(tuned, whole)
    torn = open_run("torn")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sft, "next_token", dies_at(2 * 12))
        train(tuned, torn)
    assert train(tuned, torn) == found
    for name in ("model", "optimizer"):
        place = Path("checkpoints") / "step_20" / f"{name}.safetensors"
        files = [run.path / place for run in (whole, torn)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_other_conversations_do_not_resume(
    tuned: SftConfig, sums: Path, open_run: Any, tmp_path: Path
) -> None:
    lines = sums.read_text().splitlines(keepends=True)
    mine = tmp_path / "mine.jsonl"
    mine.write_text("".join(lines))
    data = replace(tuned.data, sources={str(mine): 1.0})
    cfg = replace(tuned, steps=5, data=data, schedule=replace(tuned.schedule, warmup=1, decay=1))
    run = open_run()
    sft.main(cfg, run)
    mine.write_text("".join(lines[:-3]))
    with pytest.raises(UserError, match="the checkpoint read data with data"):
        sft.main(cfg, run)


def test_the_folder_chats(tuned: SftConfig, open_run: Any) -> None:
    run = open_run()
    trained = sft.main(tuned, run)
    folder = run.path / "model"
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.chat_template == CHATML
    settings = json.loads((folder / "generation_config.json").read_text())
    assert tokenizer.id_of("<|im_end|>") in settings["eos_token_id"]
    llm = LLM(folder, executor="torch")
    asked = [{"role": "user", "content": "what is 1 plus 2?"}]
    made = llm.chat(asked, think=False, max_tokens=8)
    assert made.usage.completion_tokens >= 1
    prompt = chat.render(tokenizer, asked, think=False)
    with torch.no_grad():
        from endside.model.batch import Batch

        states = trained(Batch(torch.tensor([prompt])))
    assert int(trained.logits(states)[0, -1].argmax()) == made.token_ids[0]


def test_the_average_is_what_is_written(tuned: SftConfig, open_run: Any) -> None:
    run = open_run()
    cfg = replace(tuned, ema=0.9, export="ema", steps=6, checkpoint_activations=True,
                  schedule=replace(tuned.schedule, warmup=1, decay=0))  # fmt: skip
    model = sft.main(cfg, run)
    saved = run.latest()
    name = "layers.0.mlp.up_proj.weight"
    assert torch.equal(model.state_dict()[name], saved.tensors("ema")[name])
    assert not torch.equal(model.state_dict()[name], saved.tensors("model")[name])


def test_starts(
    tuned: SftConfig, cfg: PretrainConfig, start: Path, open_run: Any, tmp_path: Path
) -> None:
    run = open_run("pre")
    before = pretrain.main(replace(cfg, steps=10), run)
    place = run.path / "checkpoints" / "step_10"
    opened = sft.open_start(str(place)).model
    for one, other in zip(opened.parameters(), before.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(UserError, match="has no tokenizer: name its folder"):
        sft.main(replace(tuned, start=str(place)), open_run("a"))
    again = replace(tuned, start=str(place), tokenizer=str(start), steps=2,
                    schedule=replace(tuned.schedule, warmup=1, decay=1))  # fmt: skip
    tuned_run = open_run("b")
    sft.main(again, tuned_run)
    assert (tuned_run.path / "model" / "config.json").is_file()
    followed = sft.open_start(str(tuned_run.path))
    assert followed.folder == tuned_run.path / "model"
    with pytest.raises(UserError, match="is no checkpoint of pre-training: start from the folder"):
        sft.open_start(str(tuned_run.path / "checkpoints" / "step_2"))


@pytest.mark.parametrize(
    ("rank", "shard"),
    [
        (0, "fsdp"),
        (3, "replicate"),
        pytest.param(0, "replicate", marks=pytest.mark.slow),
        pytest.param(3, "fsdp", marks=pytest.mark.slow),
    ],
)
def test_two_processes_are_as_one(tuned: SftConfig, tmp_path: Path, rank: int, shard: str) -> None:
    """All weights or adapters, copied to each process or split over both."""
    path = tmp_path / "mine.toml"
    path.write_text(dump(replace(tuned, steps=8, schedule=replace(tuned.schedule, decay=2))))
    nursery = Nursery(tmp_path)

    def run(size: int, *more: str) -> tuple[list[float], dict[str, torch.Tensor]]:
        folder = tmp_path / f"{size}{''.join(more)}"
        codes = nursery.run(size, ["sft", str(path), f"run={folder}", *more])
        assert codes == [0] * size, nursery.log(codes.index(max(codes)))
        found = [
            record[key] for record in read_metrics(folder / "metrics.jsonl")
            for key in ("loss", "gradient_norm", "heldout_loss") if key in record
        ]  # fmt: skip
        return found, hf.load(folder / "model").state_dict()

    try:
        losses, weights = run(1, f"lora.rank={rank}")
        assert losses[0] > losses[-3] + 0.05, "nothing was learnt, so nothing is compared"
        others, same = run(2, f"lora.rank={rank}", f"parallel.shard={shard}")
        assert others == pytest.approx(losses, rel=0, abs=1e-5)
        torch.testing.assert_close(same, weights, rtol=0, atol=1e-3)
    finally:
        nursery.close()


def test_the_verb_runs_a_file_and_prints_the_model(
    tuned: SftConfig, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(dump(tuned))
    verb.main([str(path), "steps=3", "schedule.warmup=1", "schedule.decay=0"])
    captured = capsys.readouterr()
    assert captured.out.strip() == str(tmp_path / "mine" / "model")
    for part in ("conversations", "think examples", "no_think examples", "tokens are learned",
                 "filled: an epoch is"):  # fmt: skip
        assert part in captured.err


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"seq_len": 1000}, "seq_len 1000 is longer than the model's max_position_embeddings 512"),
        ({"template": "/nowhere.jinja"}, "cannot read template /nowhere.jinja"),
        ({"start": "/nowhere"}, "nowhere"),
    ],
)
def test_inputs_that_do_not_fit(
    tuned: SftConfig, open_run: Callable[..., Any], change: dict[str, Any], part: str
) -> None:
    run = open_run()
    with pytest.raises(UserError, match=part):
        sft.main(replace(tuned, **change), run)
    assert not (run.path / "config.toml").exists()


def test_configurations_that_contradict_themselves(tuned: SftConfig) -> None:
    for change, part in (
        ({"steps": 0}, "steps is 0"),
        ({"eval_every": -1}, "at least 0"),
        ({"export": "ema"}, 'export is "ema" but none is kept'),
        ({"ema": 1.0}, "ema is 1.0"),
        ({"spikes": SpikeConfig(on_spike="rewind")}, "does not depend on the clock"),
        ({"precision": "fp8", "lora": LoraConfig(rank=2)}, "use one of them"),
    ):
        with pytest.raises(UserError, match=part):
            replace(tuned, **change)
