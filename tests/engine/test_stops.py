"""Stop strings: the same answer for every way of cutting the text into tokens."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as st

from endside.engine.stops import StopStrings


def _run(stops: tuple[str, ...], pieces: list[bytes]) -> tuple[bytes, bool]:
    follow = StopStrings(stops)
    shown = b""
    for piece in pieces:
        shown += follow.push(piece)
        if follow.matched:
            return shown, True
    return shown + follow.flush(), False


def _expected(stops: tuple[str, ...], text: bytes) -> tuple[bytes, bool]:
    """Byte by byte: the first moment at which the text ends with a stop string."""
    for end in range(1, len(text) + 1):
        hits = [stop.encode() for stop in stops if text[:end].endswith(stop.encode())]
        if hits:
            return text[: end - max(len(hit) for hit in hits)], True
    return text, False


words = st.text(alphabet="abé", min_size=1, max_size=4)


@given(
    stops=st.lists(words, min_size=1, max_size=3).map(tuple),
    text=st.text(alphabet="abé", max_size=24),
    cuts=st.lists(st.integers(0, 40), max_size=8),
)
@example(stops=("abé", "b"), text="aabé", cuts=[])
@example(stops=("b", "ab"), text="éab", cuts=[2])
def test_borders_do_not_matter(stops: tuple[str, ...], text: str, cuts: list[int]) -> None:
    data = text.encode()
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    pieces = [data[a:b] for a, b in pairwise(edges)]
    assert _run(stops, pieces) == _expected(stops, data)


def test_withholds_only_what_may_become_a_stop() -> None:
    follow = StopStrings(("END", "NDX"))
    assert follow.push(b"aE") == b"a"
    assert follow.held == 1
    assert follow.push(b"N") == b""
    assert follow.held == 2
    assert follow.push(b"o") == b"ENo"
    assert follow.held == 0
    assert follow.push(b"xND") == b"x"
    assert follow.push(b"X...") == b""
    assert follow.matched


def test_without_stops_everything_passes() -> None:
    follow = StopStrings()
    assert follow.push(b"\xff\x00text") == b"\xff\x00text"
    assert follow.held == 0
    assert not follow.matched
