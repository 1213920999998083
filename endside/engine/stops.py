"""Stop strings, found in the bytes of the answer wherever the token borders fall.

A stop string may end in the middle of a token and may start several tokens earlier, so text is
searched as bytes and a tail that could still grow into a stop string is withheld:

    released = everything before the longest suffix that is a proper prefix of a stop string

Which stop wins must not depend on how the text was cut into tokens: the one that is complete first
(smallest end), and of those the one that starts first. The stop itself is never shown.
"""

from __future__ import annotations


class StopStrings:
    """Follows one answer. Empty `stops` releases every byte at once."""

    def __init__(self, stops: tuple[str, ...] = ()) -> None:
        assert all(stops), "an empty stop string would end every answer: SamplingConfig refuses it"
        self._stops = tuple(stop.encode("utf-8") for stop in stops)
        self._longest = max((len(stop) for stop in self._stops), default=0)
        self._held = b""
        self.matched = False

    @property
    def held(self) -> int:
        """Bytes of the tail that are withheld because a stop string could still be completing."""
        return len(self._held)

    def push(self, data: bytes) -> bytes:
        """Add the bytes of one token; returns those that may be shown. Sets `matched` at a stop."""
        assert not self.matched, "the answer has already ended at a stop string"
        text = self._held + data
        starts = [(stop, text.find(stop)) for stop in self._stops]
        found = [(start + len(stop), start) for stop, start in starts if start >= 0]
        if found:
            self.matched = True
            self._held = b""
            return text[: min(found)[1]]
        keep = self._open_tail(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> bytes:
        """The answer ended for another reason: give out what was withheld."""
        tail, self._held = self._held, b""
        return tail

    def _open_tail(self, text: bytes) -> int:
        for size in range(min(len(text), self._longest - 1), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stops):
                return size
        return 0
