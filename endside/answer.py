"""An answer read while it is written: text pieces in, thought, content and tool calls out.

    reader = Reader(opened=chat.opens_reasoning(tokenizer, prompt), tools=tools)
    for piece in stream:
        events = reader.push(piece.text)
    events = reader.finish()

The events do not depend on how the text is cut into pieces, except that a run of thought or content
comes in as many events as it takes. What may still become a marker is held back, and so is white
space that a marker may follow: it belongs to the marker.

A thought stands at the start, between the markers of `chat.OPENERS`; `opened` if the prompt ended
inside it. One that never ends is all thought: it is no answer.

Tool calls stand in the content, in any of three forms (`endside.calls`). A call is told when its
last character is there and it has passed every check, so nothing has to be taken back: no form
says earlier whether it is a call at all. One that fails stays content, and a `Dropped` says why.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from endside import calls
from endside.chat import OPENERS


@dataclass(frozen=True)
class Reasoning:
    """Thought that can be shown now."""

    text: str


@dataclass(frozen=True)
class Content:
    """Answer that can be shown now."""

    text: str


@dataclass(frozen=True)
class ToolCall:
    """A whole call; arguments is the text of a JSON object."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Dropped:
    """Why what looked like a call, and follows as content, is none."""

    reason: str


Event = Reasoning | Content | ToolCall | Dropped


@dataclass(frozen=True)
class _Form:
    """A way to write calls: from `opener` to `closer`."""

    opener: str
    closer: str
    read: calls.Read
    whole: bool = False  # `read` wants the markers as well

    def inner(self, text: str) -> str:
        """What `read` gets of a call from its opener to its end."""
        if self.whole:
            return text
        inner = text.removeprefix(self.opener)
        # The end of the answer may stand for the closer where a fence shows that nothing is cut.
        if not inner.endswith(self.closer) and not inner.rstrip().endswith("\n```"):
            raise calls.Malformed("the call has no end")
        return inner.removesuffix(self.closer)


def _read_tagged(text: str, tools: Sequence[calls.Tool] | None) -> list[calls.Call]:
    """What stands between <tool_call> tags: objects, or the functions of MiniCPM5."""
    read = calls.read_xml if text.lstrip().startswith("<function") else calls.read_json
    return read(text, tools)


FORMS = (
    _Form("<|tool_call_start|>", "<|tool_call_end|>", calls.read_python),
    _Form("<tool_call>", "</tool_call>", _read_tagged),
    _Form("<function name=", "</function>", calls.read_xml, whole=True),
)
_BY_OPENER = {one.opener: one for one in FORMS}


def _new_id() -> str:
    return f"call_{secrets.token_hex(12)}"


class Reader:
    """Reads one answer."""

    def __init__(
        self,
        *,
        opened: bool = False,
        tools: Sequence[calls.Tool] | None = None,
        read_calls: bool = True,
        new_id: Callable[[], str] = _new_id,
    ) -> None:
        """opened: the prompt ends inside a thought. tools: as given to the chat; None: any call.

        read_calls: False leaves calls in the content, as where a grammar has shaped the answer.
        """
        self._tools = tools
        self._openers = tuple(_BY_OPENER) if read_calls else ()
        self._new_id = new_id
        self._text = ""  # not told yet
        self._state = self._head
        self._opened = opened
        self._closer = next(iter(OPENERS.values()))
        self._form = FORMS[0]
        self._fresh = False  # white space here belongs to the marker before it
        self._looked = 0  # where a call's end may still begin
        self._events: list[Event] = []

    def push(self, text: str) -> list[Event]:
        """The next piece of the answer; what it settles."""
        self._text += text
        while self._state(final=False):
            pass
        return self._take()

    def finish(self) -> list[Event]:
        """The answer has ended: tell the rest."""
        while self._state(final=True):
            pass
        return self._take()

    def _take(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _tell(self, event: Event) -> None:
        """Add an event; text of one kind is joined."""
        last = self._events[-1] if self._events else None
        if isinstance(event, Reasoning | Content):
            if not event.text:
                return
            if type(last) is type(event):
                self._events[-1] = type(event)(last.text + event.text)
                return
        self._events.append(event)

    # Each state returns whether another one should look at the text that is left.

    def _head(self, *, final: bool) -> bool:
        """Before the first word: does the answer begin with a thought?"""
        head = self._text.lstrip()
        for opener, closer in OPENERS.items():
            if head.startswith(opener):
                self._text, self._closer = head[len(opener) :], closer
                self._enter(self._thought)
                return True
        if not final and any(opener.startswith(head) for opener in OPENERS):
            return False
        if self._opened:
            self._enter(self._thought)
        else:
            self._enter(self._content, fresh=False)
        return True

    def _thought(self, *, final: bool) -> bool:
        if self._fresh:
            self._text = self._text.lstrip()
            self._fresh = not self._text
        thought, closed, rest = self._text.partition(self._closer)
        if closed:
            self._tell(Reasoning(thought.rstrip()))
            self._text = rest
            self._enter(self._content)
            return True
        keep = 0 if final else _open_tail(thought, (self._closer,))
        shown = thought[: len(thought) - keep].rstrip()
        self._tell(Reasoning(shown))
        self._text = "" if final else thought[len(shown) :]
        return False

    def _content(self, *, final: bool) -> bool:
        if self._fresh:
            self._text = self._text.lstrip("\n")
            self._fresh = not self._text
        found = [(self._text.find(one), one) for one in self._openers if one in self._text]
        if found:
            at, opener = min(found)
            before = self._text[:at].rstrip()
            self._tell(Content(before))
            # The white space stays with the call: if it is none, all of it is content.
            self._text = self._text[len(before) :]
            self._form = _BY_OPENER[opener]
            self._looked = 0
            self._enter(self._call)
            return True
        keep = 0 if final else _open_tail(self._text, self._openers)
        shown = self._text[: len(self._text) - keep]
        if self._openers and not final:
            shown = shown.rstrip()
        self._tell(Content(shown))
        self._text = self._text[len(shown) :]
        return False

    def _call(self, *, final: bool) -> bool:
        form = self._form
        if not final and self._text.find(form.closer, self._looked) < 0:
            self._looked = max(0, len(self._text) - len(form.closer))
            return False
        start = self._text.index(form.opener)
        end = calls.outside_data(self._text, form.closer, start)
        if end < 0 and not final:
            return False
        whole = self._text if end < 0 else self._text[: end + len(form.closer)]
        try:
            made = form.read(form.inner(whole[start:]), self._tools)
        except calls.Malformed as error:
            self._tell(Dropped(str(error)))
            self._tell(Content(whole))
            self._enter(self._content, fresh=False)
        else:
            for one in made:
                self._tell(ToolCall(self._new_id(), one.name, one.arguments))
            self._enter(self._content)
        self._text = self._text[len(whole) :]
        return True

    def _enter(self, state: Callable[..., bool], *, fresh: bool = True) -> None:
        self._state, self._fresh = state, fresh


def _open_tail(text: str, marks: Sequence[str]) -> int:
    """Length of the longest end of the text that may become a mark."""
    longest = max(map(len, marks), default=1) - 1
    return next(
        (
            size
            for size in range(min(len(text), longest), 0, -1)
            if any(mark.startswith(text[-size:]) for mark in marks)
        ),
        0,
    )
