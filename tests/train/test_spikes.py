"""Trouble is noticed before the step, and a rewind is the same whatever happens around it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from endside.data.loader import Loader, LoaderConfig, TokenBatch
from endside.data.source import open_data
from endside.errors import UserError
from endside.train import pretrain
from endside.train.loop import loop
from endside.train.losses import Loss, next_token
from endside.train.pretrain import PretrainConfig
from endside.train.spikes import SpikeConfig, Spikes
from tests.train.conftest import records


def full(window: int = 4, **changes: object) -> Spikes:
    """A spikes whose window holds losses 1, 2, 1, 2 and norms 1."""
    spikes = Spikes(SpikeConfig(window=window, **changes))
    for number in range(window):
        assert spikes.look(1.0 + number % 2, 1.0, {}) == ""
    return spikes


def test_a_loss_far_above_the_window_is_a_spike() -> None:
    # mean 1.5, deviation 0.5: three deviations allow 3.0
    assert full(sigma=3.0).look(3.0, 1.0, {}) == ""
    assert full(sigma=3.0).look(3.01, 1.0, {}) == "loss 3.0100 is a spike: the last 4 allow 3.0000"
    assert full(sigma=3.0, rise=2.0).look(3.01, 1.0, {}) == "", "the rise is too small to mind"
    assert full().look(1e9, 1e9, {}) == "", "nothing is watched by default"


def test_a_norm_far_above_the_window_is_a_spike() -> None:
    assert full(norm=5.0).look(1.0, 5.0, {}) == ""
    assert "gradient norm 5.1000 is a spike" in full(norm=5.0).look(1.0, 5.1, {})


def test_rules_rest_until_the_window_is_full_and_spikes_do_not_join_it() -> None:
    spikes = Spikes(SpikeConfig(sigma=1.0, norm=2.0, window=3))
    for loss in (1.0, 100.0, 1.0):
        assert spikes.look(loss, loss, {}) == ""
    spikes = full(sigma=3.0)
    assert all(spikes.look(50.0, 1.0, {}) for _ in range(9))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_is_always_trouble(bad: float) -> None:
    assert Spikes(SpikeConfig()).look(bad, 1.0, {}) == f"loss is {bad}"
    assert Spikes(SpikeConfig()).look(1.0, bad, {}) == f"gradient norm is {bad}"
    assert Spikes(SpikeConfig()).look(1.0, 1.0, {"z_loss": bad}) == f"z_loss is {bad}"


def test_the_window_survives_a_checkpoint() -> None:
    spikes = full(sigma=3.0)
    spikes.rewinds = 2
    other = Spikes(spikes.config)
    other.restore(spikes.state())
    assert other.state() == spikes.state()
    assert other.look(3.01, 1.0, {})


@pytest.mark.parametrize("change", [{"sigma": -1.0}, {"window": 1}, {"max_rewinds": -1}])
def test_numbers_that_mean_nothing(change: dict) -> None:
    with pytest.raises(UserError, match=r"spikes\.sigma"):
        SpikeConfig(**change)


def rewinding(cfg: PretrainConfig, **changes: object) -> PretrainConfig:
    spikes = SpikeConfig(sigma=6.0, rise=1.0, window=4, on_spike="rewind")
    return replace(
        cfg, accumulate=1, steps=16, checkpoint_every=4, checkpoint_seconds=0.0,
        schedule=replace(cfg.schedule, decay=0), spikes=replace(spikes, **changes),
    )  # fmt: skip


def poison(cfg: PretrainConfig, numbers: dict[int, float], dies_at: int = 0) -> Callable:
    """next_token whose loss on the training split's batch n is multiplied by numbers[n]."""
    packed = open_data(cfg.data, cfg.model.vocab_size)
    batches = Loader(packed, LoaderConfig(cfg.batch, cfg.seq_len, cfg.seed))
    marked = {next(batches).tokens.numpy().tobytes(): n for n in range(1, 40)}
    healthy, calls = next_token(cfg.loss), []

    def loss_fn(model: torch.nn.Module, batch: TokenBatch) -> Loss:
        loss = healthy(model, batch)
        calls.append(1)
        if len(calls) == dies_at:
            raise KeyboardInterrupt
        factor = numbers.get(marked.get(batch.tokens.numpy().tobytes(), 0), 1.0)
        return replace(loss, total=loss.total * factor, loss=loss.loss * factor)

    return lambda _: loss_fn


@pytest.mark.parametrize("factor", [5.0, math.nan])
def test_a_bad_batch_is_rewound_from_and_skipped(
    cfg: PretrainConfig, open_run, quiet, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    cfg = rewinding(cfg)
    monkeypatch.setattr(pretrain, "next_token", poison(cfg, {11: factor}))
    run = open_run()
    pretrain.main(cfg, run)
    assert "at step 11: rewound to step 8 (rewind 1 of at most 3)" in quiet.text()
    marks = [r for r in records(run.path) if "rewound_from" in r]
    assert [(r["step"], r["rewound_from"]) for r in marks] == [(9, 11)]
    steps = [r["step"] for r in records(run.path) if "loss" in r]
    assert steps == list(range(1, 17)), "every step has one record"
    # 16 steps and the three batches (9, 10, 11) that were read before the rewind
    assert run.latest().state["data"]["consumed"] == 19 * cfg.batch
    assert run.latest().state["spikes"]["rewinds"] == 1
    # The same as a run that never read batches 9 to 11.
    packed = open_data(cfg.data, cfg.model.vocab_size)
    batches = Loader(packed, LoaderConfig(cfg.batch, cfg.seq_len, cfg.seed))

    class Skipping:
        read = 0

        def __next__(self) -> TokenBatch:
            self.read += 1
            if self.read == 9:
                for _ in range(3):
                    next(batches)
            return next(batches)

        state, restore, fits = batches.state, batches.restore, batches.fits

    with pretrain.deterministic(cfg):
        model, direct = pretrain.make_model(cfg), open_run("direct")
        loop(model, Skipping(), next_token(cfg.loss), cfg, direct)
    losses = [r["loss"] for r in records(run.path) if "loss" in r]
    assert losses == [r["loss"] for r in records(direct.path)]


def test_a_rewound_run_that_is_killed_ends_the_same(
    cfg: PretrainConfig, open_run, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = rewinding(cfg)
    bad = {7: 5.0, 14: math.nan}
    monkeypatch.setattr(pretrain, "next_token", poison(cfg, bad))
    whole = open_run("whole")
    pretrain.main(cfg, whole)
    assert whole.latest().state["spikes"]["rewinds"] == 2
    for dies_at in (6, 9, 13, 17):
        torn = open_run(f"torn{dies_at}")
        monkeypatch.setattr(pretrain, "next_token", poison(cfg, bad, dies_at))
        with pytest.raises(KeyboardInterrupt):
            pretrain.main(cfg, torn)
        monkeypatch.setattr(pretrain, "next_token", poison(cfg, bad))
        pretrain.main(cfg, torn)
        assert records(torn.path) == records(whole.path), f"died at call {dies_at}"


def test_rewinds_are_bounded(
    cfg: PretrainConfig, open_run, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = rewinding(cfg, max_rewinds=2)
    monkeypatch.setattr(pretrain, "next_token", poison(cfg, dict.fromkeys(range(6, 40), math.nan)))
    run = open_run()
    with pytest.raises(UserError, match=r"loss is nan at step 5 .* after 2 rewinds"):
        pretrain.main(cfg, run)
    assert run.latest().step == 4


def test_a_spike_stops_where_stopping_is_asked_for(
    cfg: PretrainConfig, open_run, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = rewinding(cfg, on_spike="stop")
    monkeypatch.setattr(pretrain, "next_token", poison(cfg, {11: 5.0}))
    run = open_run()
    with pytest.raises(UserError, match=r"is a spike: the last 4 allow .* at step 11 of .*lower"):
        pretrain.main(cfg, run)
    assert run.latest().step == 8
    calm = replace(cfg, spikes=SpikeConfig())
    monkeypatch.setattr(pretrain, "next_token", poison(cfg, {11: 5.0}))
    pretrain.main(calm, open_run("calm"))


def test_no_checkpoint_no_rewind(
    cfg: PretrainConfig, open_run, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = rewinding(cfg)
    monkeypatch.setattr(pretrain, "next_token", poison(cfg, {2: math.nan}))
    with pytest.raises(UserError, match="no checkpoint yet to rewind to"):
        pretrain.main(cfg, open_run())
    with pytest.raises(UserError, match="checkpoint_seconds = 0"):
        replace(cfg, checkpoint_seconds=60.0)
