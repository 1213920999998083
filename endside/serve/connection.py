"""One connection of a client, with an end to waiting for its header lines.

uvicorn waits for a request's header as long as the client likes, so a few hundred connections that
send a byte now and then (slowloris) hold file descriptors and memory for nothing. Here a header
that is not complete `HEADERS` seconds after it began, or after the connection was opened, closes
the connection, and so does the rest of a body that was answered already (refused: too large, too
slow). Between requests of a kept connection uvicorn's own keep-alive limit counts; a body that is
still wanted has its own limit (endside.serve.limits).
"""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADERS = 10.0  # seconds


class Connection(H11Protocol):
    """uvicorn's protocol; `_late` is the timer of a header that has not come."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The first header is waited for from here on."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """A complete header ends the wait; a first piece of the next one begins another."""
        super().data_received(data)
        state = self.conn.their_state
        unwanted = state is h11.SEND_BODY and self.cycle.response_complete
        if (state is h11.IDLE or unwanted) and not self.transport.is_closing():
            self._wait()
        else:
            self._settle()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more."""
        self._settle()
        super().connection_lost(exc)

    def _wait(self) -> None:
        # A running timer goes on: a byte now and then does not buy more time.
        if self._late is None:
            self._late = self.loop.call_later(HEADERS, self._close)

    def _settle(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _close(self) -> None:
        self._late = None
        if not self.transport.is_closing():
            self.transport.close()
