"""The engine's thread, and how the event loop talks to it.

The engine is stepped by one thread as long as anything runs. Requests are handed to it through its
own queue (any thread may add), a job is told after every step that there is something new, and a
cancelled one is dropped by the next step. Nothing is shared beyond that.

More requests than `queue` beside those that run are refused with the time until a place is likely
free, measured from how long answers took lately. After `close` nothing is taken, what runs ends.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque

from endside.api import LLM
from endside.engine.request import Handle
from endside.serve.errors import ApiError
from endside.serve.log import event
from endside.serve.metrics import Metrics
from endside.stream import Piece, Stream

RECENT = 32  # answers whose time is remembered


class Job:
    """One running answer, read by one coroutine."""

    def __init__(self, stream: Stream, *, timeout: float | None) -> None:
        self.stream = stream
        self.handle: Handle = stream.start()
        self.deadline = time.monotonic() + timeout if timeout else None
        self.late = False
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()

    def tell(self) -> None:
        """From the engine's thread: there is something new."""
        self._loop.call_soon_threadsafe(self._news.set)

    async def pieces(self) -> list[Piece]:
        """What came since the last time, waiting for at least something; [] at the end."""
        while True:
            self._news.clear()
            done = self.handle.done  # asked first: what came before the end is there then
            found = self.stream.ready()
            if found or done:
                self._check()
                return found
            await self._news.wait()

    def _check(self) -> None:
        if self.handle.error is not None:
            raise self.handle.error
        if self.late:
            raise ApiError(
                504, "the answer took longer than this server allows: ask for fewer tokens, or "
                "start it with a larger --timeout", code="timeout",
            )  # fmt: skip


class Runner:
    """Steps the engine of `llm` in a thread of its own."""

    def __init__(self, llm: LLM, *, queue: int, timeout: float | None) -> None:
        self.llm = llm
        self.engine = llm.engine
        self.metrics = Metrics(self.engine)
        self.queue = queue
        self.timeout = timeout
        self.closing = False
        self.failure: str | None = None
        self._jobs: list[Job] = []
        self._lock = threading.Condition()
        self._spent: deque[float] = deque(maxlen=RECENT)
        self._thread = threading.Thread(target=self._work, name="endside-engine", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def check(self, more: int = 1) -> None:
        """Raises ApiError 503 or 429 unless `more` answers may be asked for now."""
        if self.failure is not None:
            raise ApiError(503, f"the engine has stopped ({self.failure}): restart the server")
        if self.closing:
            raise ApiError(503, "the server is shutting down: ask again later", retry_after=30)
        room = self.engine.scheduler.max_batch + self.queue
        if len(self._jobs) + more > room:
            raise ApiError(
                429, f"{len(self._jobs)} answers run or wait and {self.queue} may wait: try again "
                "later, or start the server with a larger --queue", retry_after=self._soon(),
            )  # fmt: skip

    def submit(self, stream: Stream) -> Job:
        """Run an answer, from the event loop. Raises ApiError when there is no place."""
        self.check()
        job = Job(stream, timeout=self.timeout)
        with self._lock:
            self._jobs.append(job)
            self._lock.notify()
        return job

    def cancel(self, job: Job) -> None:
        """Nobody reads the answer any more."""
        job.handle.cancel()
        with self._lock:
            self._lock.notify()

    def close(self) -> None:
        """Take nothing more; the thread ends when the last answer has."""
        with self._lock:
            self.closing = True
            self._lock.notify()

    def cut(self) -> None:
        """End what still runs."""
        for job in list(self._jobs):
            self.cancel(job)

    def join(self, seconds: float) -> bool:
        """Wait for the thread; whether it has ended."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _soon(self) -> int:
        spent = sorted(self._spent)
        half = spent[len(spent) // 2] if spent else 1.0
        waiting = max(1, len(self._jobs) - self.engine.scheduler.max_batch)
        return max(1, min(600, round(half * waiting / self.engine.scheduler.max_batch)))

    def _work(self) -> None:
        while True:
            with self._lock:
                while not self._jobs and self.engine.idle and not self.closing:
                    self._lock.wait()
                if self.closing and not self._jobs and self.engine.idle:
                    return
            try:
                self.engine.step()
            except BaseException as error:  # whoever waits must hear of it before the thread ends
                self._fail(error)
                raise
            self._spread()

    def _spread(self) -> None:
        """Tell everyone what is new, end what is late, forget what has ended."""
        now = time.monotonic()
        for job in list(self._jobs):
            if job.deadline is not None and now > job.deadline and not job.handle.done:
                job.late = True
                job.handle.cancel()
            if job.handle.done:
                self._forget(job)
            job.tell()

    def _forget(self, job: Job) -> None:
        with self._lock:
            self._jobs.remove(job)
        times = job.handle.times
        self._spent.append(times.finished - times.submitted)
        self.metrics.finished(job.handle)

    def _fail(self, error: BaseException) -> None:
        self.failure = f"{type(error).__name__}: {error}"
        event("engine failure", error=self.failure)
        for job in list(self._jobs):
            job.handle.fail(ApiError(500, f"the engine failed: {self.failure}"))
            self._forget(job)
            job.tell()
