"""Batches made ahead of their use, on a thread of their own.

Reading, cutting and numbering documents then happens while the device computes. Each batch travels
with the state that the reader had behind it, so what `state` gives is the position of what was
taken, not of what lies ready, and an error of the reader is raised where its batch was due. One
thread makes them in order: nothing about the stream depends on timing.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from endside.data.loader import TokenBatch


class Reader(Protocol):
    """An endless source of batches whose position can be saved."""

    def __next__(self) -> TokenBatch: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: dict[str, Any]) -> None: ...
    def fits(self, state: dict[str, Any]) -> bool: ...


class Prefetch:
    """`reader`, up to `depth` batches ahead; use it in `with`, or close it."""

    def __init__(self, reader: Reader, depth: int = 2) -> None:
        assert depth > 0, "nothing can be made ahead of its use at depth 0"
        self._reader, self._depth = reader, depth
        self._state = reader.state()
        self._ready: deque[Future[tuple[TokenBatch, dict[str, Any]]]] = deque()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reader")

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Prefetch:
        return self

    def __next__(self) -> TokenBatch:
        while len(self._ready) < self._depth:
            self._ready.append(self._thread.submit(self._make))
        batch, self._state = self._ready.popleft().result()
        self._ready.append(self._thread.submit(self._make))
        return batch

    def _make(self) -> tuple[TokenBatch, dict[str, Any]]:
        return next(self._reader), self._reader.state()

    def state(self) -> dict[str, Any]:
        """The position behind the last batch that was taken."""
        return self._state

    def fits(self, state: dict[str, Any]) -> bool:
        """Whether the reader could continue from `state`."""
        return self._reader.fits(state)

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken; what lay ready is dropped."""
        self._drop()
        self._reader.restore(state)
        self._state = self._reader.state()

    def close(self) -> None:
        """Stop; no batch can be taken afterwards."""
        self._drop()
        self._thread.shutdown()

    def _drop(self) -> None:
        for future in self._ready:
            future.cancel()
        # What runs already cannot be cancelled: the reader must stand still before it is moved.
        self._thread.submit(lambda: None).result()
        self._ready.clear()
