"""Batches made ahead are the same batches, and the state is that of what was taken."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from endside.data.loader import TokenBatch
from endside.data.prefetch import Prefetch
from endside.errors import UserError


class Counting:
    """A reader of batches 0, 1, 2, ... that notes who asks; it fails at `broken`."""

    def __init__(self, broken: int = -1) -> None:
        self.at, self.broken = 0, broken
        self.threads: set[str] = set()

    def __next__(self) -> TokenBatch:
        if self.at == self.broken:
            raise UserError("the shard is damaged")
        self.threads.add(threading.current_thread().name)
        tokens = torch.tensor([[self.at]])
        self.at += 1
        return TokenBatch(tokens, torch.zeros_like(tokens))

    def state(self) -> dict[str, int]:
        return {"at": self.at}

    def restore(self, state: dict[str, int]) -> None:
        self.at = state["at"]

    def fits(self, state: dict[str, int]) -> bool:
        return "at" in state


def test_batches_come_in_order_and_the_state_is_of_what_was_taken() -> None:
    inner = Counting()
    with Prefetch(inner, depth=3) as ahead:
        assert ahead.state() == {"at": 0}
        for number in range(20):
            assert next(ahead).tokens.item() == number
            assert ahead.state() == {"at": number + 1}
        deadline = time.monotonic() + 5
        while inner.at < 23 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert inner.at == 23, "three lie ready, and no more"
        ahead.restore({"at": 7})
        assert ahead.state() == {"at": 7}
        assert [next(ahead).tokens.item() for _ in range(3)] == [7, 8, 9]
        assert ahead.fits({"at": 1}) and not ahead.fits({})
    assert threading.main_thread().name not in inner.threads


def test_an_error_is_raised_where_its_batch_was_due() -> None:
    with Prefetch(Counting(broken=2)) as ahead:
        assert [next(ahead).tokens.item() for _ in range(2)] == [0, 1]
        with pytest.raises(UserError, match="damaged"):
            next(ahead)


def test_nothing_runs_on_after_the_end() -> None:
    with Prefetch(Counting()) as ahead:
        next(ahead)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("reader")]
