"""The recipe: configuration, switches, branches, and every way a user can be wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from endside.config import dump
from endside.data.document import Document
from endside.data.pack import byte_encoder, pack
from endside.data.source import DataConfig, open_data
from endside.errors import UserError
from endside.log import read_metrics
from endside.model.presets import preset
from endside.tokenizer import Tokenizer, train_bpe
from endside.train import pretrain
from endside.train.plot import loss_curves, names, series, smooth, tokens_at
from endside.train.pretrain import PretrainConfig
from endside.train.schedule import ScheduleConfig

TINY = Path(__file__).resolve().parents[2] / "runs" / "tiny.toml"


def last(run, key: str = "loss") -> float:
    return [r[key] for r in read_metrics(run.path / "metrics.jsonl") if key in r][-1]


def test_a_preset_with_changes(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('steps = 300\n[model]\npreset = "tiny-sparse"\n[data]\nshards = "x"\n')
    overrides = ["model.hidden_size=64", "model.sparse.topk=5", "model.rope.theta=5e5"]
    cfg = pretrain.read_config(path, overrides)
    expected = preset("tiny-sparse")
    assert cfg.model == replace(
        expected, hidden_size=64, sparse=replace(expected.sparse, topk=5),
        rope=replace(expected.rope, theta=5e5),
    )  # fmt: skip
    resolved = tmp_path / "resolved.toml"
    resolved.write_text(dump(cfg))
    assert pretrain.read_config(resolved) == cfg


def test_the_example_configuration_is_valid_and_short() -> None:
    cfg = pretrain.read_config(TINY)
    assert cfg.model == preset("tiny")
    assert len(TINY.read_text().split("\n")) <= 30


def test_from_file_packs_trains_and_resumes(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_text("one two three four " * 400)
    config = tmp_path / "mine.toml"
    config.write_text(TINY.read_text())
    overrides = [
        f"data.shards={tmp_path}/shards", f"data.corpus={text}", "steps=8", "schedule.warmup=2",
        "schedule.decay=2", "seq_len=32", "batch=2",
    ]  # fmt: skip
    exported = []

    def export(model: torch.nn.Module, folder: Path) -> None:
        assert not model.training
        exported.append(folder)

    run = pretrain.from_file(config, overrides, export=export)
    assert run == tmp_path / "mine"
    assert exported == [tmp_path / "mine" / "model"]
    before = (run / "metrics.jsonl").read_text()
    assert pretrain.from_file(config, overrides) == run
    assert (run / "metrics.jsonl").read_text() == before


def test_another_configuration_does_not_resume(cfg: PretrainConfig, open_run) -> None:
    run = open_run()
    pretrain.main(replace(cfg, steps=10), run)
    with pytest.raises(UserError, match=r"steps is 20 but the run in .* was started with 10"):
        pretrain.main(cfg, run)
    with pytest.raises(UserError, match=r"optim\.beta2 is 0\.9 but"):
        pretrain.main(replace(cfg, steps=10, optim=replace(cfg.optim, beta2=0.9)), run)
    pretrain.main(replace(cfg, steps=10, threads=None), run)
    assert run.stored(PretrainConfig).threads == 1


def test_threads_are_recorded_used_and_put_back(cfg: PretrainConfig, open_run) -> None:
    outside = torch.get_num_threads()
    used = []

    def export(*_: object) -> None:
        used.append(torch.are_deterministic_algorithms_enabled())

    inside = []
    with pretrain.deterministic(replace(cfg, threads=outside + 1)):
        inside.append((torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()))
    assert inside == [(outside + 1, True)]
    assert torch.get_num_threads() == outside
    run = open_run()
    pretrain.main(replace(cfg, steps=10, threads=None), run, export=export)
    assert run.stored(PretrainConfig).threads == outside
    assert used == [False]


def test_one_line_switches_to_sparse_attention(cfg: PretrainConfig, open_run) -> None:
    # 400 tokens of one document: past dense_len 256, past the budget of (4 + 2) blocks of 64.
    model = replace(preset("tiny-sparse"), vocab_size=320)
    long = replace(
        cfg, model=model, seq_len=448, batch=1, accumulate=1, steps=3, eval_rows=1,
        schedule=ScheduleConfig(warmup=1),
        data=DataConfig(str(Path(cfg.data.shards).parent / "long")),
    )  # fmt: skip
    text = " ".join(str(i * i) for i in range(3000))
    if not Path(long.data.shards).exists():
        pack([Document("long", text, "test")], Path(long.data.shards), byte_encoder())
    dense, sparse = open_run("dense"), open_run("sparse")
    one = pretrain.main(long, dense)
    other = pretrain.main(replace(long, attention="sparse"), sparse)
    assert one.config.sparse is None
    assert other.config.sparse == model.sparse
    assert one.state_dict().keys() == other.state_dict().keys()
    assert last(dense) != last(sparse)
    assert last(dense) == pytest.approx(last(sparse), abs=0.5)


def test_a_stable_checkpoint_is_annealed_in_a_run_of_its_own(cfg: PretrainConfig, open_run) -> None:
    stable = open_run("stable", keep=9)
    pretrain.main(replace(cfg, schedule=ScheduleConfig(warmup=4)), stable)
    before = {f: f.read_bytes() for f in stable.path.rglob("*") if f.is_file()}
    origin = stable.path / "checkpoints" / "step_15"
    branch = replace(cfg, steps=1, decay_from=str(origin), schedule=ScheduleConfig(4, 6))
    run = open_run("branch")
    pretrain.main(branch, run)
    records = read_metrics(run.path / "metrics.jsonl")
    rates = [r["learning_rate"] for r in records if "loss" in r]
    assert [r["step"] for r in records if "loss" in r] == list(range(16, 22))
    assert rates == pytest.approx([0.01 * 0.1 ** (i / 6) for i in range(1, 7)])
    assert run.stored(PretrainConfig).steps == 21
    assert {f: f.read_bytes() for f in stable.path.rglob("*") if f.is_file()} == before
    # The branch is the run that would have decayed there: same data, same weights, same losses.
    direct = open_run("direct")
    pretrain.main(replace(cfg, steps=21, schedule=ScheduleConfig(4, 6)), direct)
    assert last(run) == last(direct)
    assert last(run, "heldout_loss") == last(direct, "heldout_loss")
    pretrain.main(branch, run)
    assert read_metrics(run.path / "metrics.jsonl") == records
    decayed = str(run.path / "checkpoints" / "step_20")
    with pytest.raises(UserError, match="written in the decay phase"):
        pretrain.main(replace(branch, decay_from=decayed), open_run("third"))


def test_a_branch_may_read_other_data(cfg: PretrainConfig, open_run, quiet, tmp_path: Path) -> None:
    stable = open_run("stable")
    pretrain.main(replace(cfg, schedule=ScheduleConfig(warmup=4)), stable)
    better = [Document(f"b{i}", f"{i} is {i * i}. " * 9, "test") for i in range(40)]
    pack(better, tmp_path / "better", byte_encoder())
    run = open_run("branch")
    origin = str(stable.path / "checkpoints" / "step_20")
    data = DataConfig(str(tmp_path / "better"))
    pretrain.main(replace(cfg, data=data, decay_from=origin, schedule=ScheduleConfig(4, 3)), run)
    assert "read other data" in quiet.text()
    assert run.latest().state["data"]["consumed"] == 3 * cfg.batch * cfg.accumulate


def test_another_model_cannot_continue(cfg: PretrainConfig, open_run) -> None:
    stable = open_run("stable")
    pretrain.main(replace(cfg, schedule=ScheduleConfig(warmup=4)), stable)
    origin = str(stable.path / "checkpoints" / "step_20")
    wider = replace(cfg, model=replace(cfg.model, intermediate_size=99), decay_from=origin)
    with pytest.raises(UserError, match=r"is of another model: layers\.0\.mlp\.down_proj\.weight"):
        pretrain.main(wider, open_run("branch"))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"seq_len": 513}, "seq_len 513 is longer than model.max_position_embeddings 512"),
        ({"attention": "sparse"}, r"has no \[model\.sparse\]"),
        ({"schedule": ScheduleConfig(15, 6)}, "is more than steps 20"),
        ({"decay_from": "x", "schedule": ScheduleConfig(1, 0)}, "decay_from needs schedule.decay"),
        ({"eval_every": -1}, "must be at least 0"),
    ],
)
def test_configurations_that_contradict_themselves(
    cfg: PretrainConfig, change: dict, part: str
) -> None:
    with pytest.raises(UserError, match=part):
        replace(cfg, **change)


def test_inputs_that_do_not_fit(cfg: PretrainConfig, open_run, tmp_path: Path) -> None:
    small = replace(cfg, model=replace(cfg.model, vocab_size=256))
    with pytest.raises(UserError, match="vocabulary of 257, the model has 256"):
        pretrain.main(small, open_run())
    with pytest.raises(UserError, match="no token shards in"):
        pretrain.main(replace(cfg, data=DataConfig(str(tmp_path / "none"))), open_run("b"))
    with pytest.raises(UserError, match=r"manifest\.json is missing"):
        pretrain.main(replace(cfg, decay_from=str(tmp_path)), open_run("c"))
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="finds no CUDA device"):
            pretrain.main(replace(cfg, device="cuda"), open_run("d"))
    assert not (tmp_path / "run" / "config.toml").exists()


def test_speed_is_measured_without_a_run(cfg: PretrainConfig, tmp_path: Path) -> None:
    assert pretrain.measure_speed(cfg, seconds=0.1) > 100
    assert list(tmp_path.iterdir()) == []


def test_the_plot_draws_what_was_recorded(cfg: PretrainConfig, open_run, tmp_path: Path) -> None:
    run = open_run()
    pretrain.main(replace(cfg, eval_every=5), run)
    loss_curves([run.path], tmp_path / "new" / "loss.png")
    one = (tmp_path / "new" / "loss.png").read_bytes()
    assert one.startswith(b"\x89PNG")
    loss_curves([run.path, run.path], tmp_path / "two.png")
    assert (tmp_path / "two.png").read_bytes() != one
    records = read_metrics(run.path / "metrics.jsonl")
    assert series(records, "heldout_loss")[0] == [5, 10, 15, 20]
    assert tokens_at(records, [20]) == [records[-2]["tokens"]]
    assert names([tmp_path / "a" / "run", tmp_path / "b" / "run"]) == ["a/run", "b/run"]
    assert names([tmp_path, tmp_path / "b"]) == [tmp_path.name, f"{tmp_path.name}/b"]
    assert names([run.path]) == ["run"]
    assert smooth([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    assert smooth([0.0, 1.0])[-1] == pytest.approx(0.05 / (1 - 0.95**2))
    with pytest.raises(UserError, match="no metrics in"):
        loss_curves([tmp_path], tmp_path / "x.png")
    with pytest.raises(UserError, match="cannot write the plot"):
        loss_curves([run.path], tmp_path / "two.png" / "x.png")


def test_a_tokenizer_packs_the_corpus_and_must_be_the_one_of_the_shards(
    cfg: PretrainConfig, tmp_path: Path
) -> None:
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_text("one two three four " * 200)
    for name, words in (
        ("one", (text / "a.txt").read_text()),
        ("other", "quite other words " * 50),
    ):
        (tmp_path / name).mkdir()
        train_bpe([words], 300).save(tmp_path / name)
    data = DataConfig(str(tmp_path / "s"), corpus=str(text), tokenizer=str(tmp_path / "one"))
    packed = open_data(data, cfg.model.vocab_size)
    tokenizer = Tokenizer.load(tmp_path / "one")
    ids = [int(token) for split in ("train", "heldout") for token in packed.tokens(split)[0]]
    assert ids[0] == tokenizer.bos_id
    assert ids[-1] == tokenizer.eos_ids[0]
    assert tokenizer.decode(ids[1:-1]) == (text / "a.txt").read_text()
    other = replace(data, tokenizer=str(tmp_path / "other"))
    with pytest.raises(UserError, match="packed with another tokenizer than"):
        open_data(other, cfg.model.vocab_size)
