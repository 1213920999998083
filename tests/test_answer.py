"""Answers read piece by piece: the same events however they are cut."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from endside import chat
from endside.answer import Content, Dropped, Event, Reader, Reasoning, ToolCall

WEATHER = {
    "name": "get-weather",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "from": {"type": "string"},
            "tags": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["city"],
    },
}
TOOLS = [{"type": "function", "function": WEATHER}, {"name": "now"}]
PYTHON = "<|tool_call_start|>\n```python\n{}\n```\n<|tool_call_end|>"
XML = '<function name="get-weather"><param name="city">{}</param></function>'


def read(pieces: list[str], **options: object) -> list[Event]:
    """Events of the whole answer, text of one kind joined."""
    number = itertools.count()
    options = {"tools": TOOLS, **options}
    reader = Reader(new_id=lambda: f"call_{next(number)}", **options)  # type: ignore[arg-type]
    told = [event for piece in pieces for event in reader.push(piece)] + reader.finish()
    assert reader.finish() == []
    joined: list[Event] = []
    for event in told:
        last = joined[-1] if joined else None
        if isinstance(event, Reasoning | Content) and type(last) is type(event):
            joined[-1] = type(event)(last.text + event.text)
        else:
            joined.append(event)
    return joined


def call(number: int, name: str, **arguments: object) -> ToolCall:
    return ToolCall(f"call_{number}", name, json.dumps(arguments, ensure_ascii=False))


ANSWERS: list[tuple[str, list[Event]]] = [
    ("Just text. ", [Content("Just text. ")]),
    ("  indented\n", [Content("  indented\n")]),
    ("", []),
    ("<think>\nhm </thi no\n</think>\n\nSure. ", [Reasoning("hm </thi no"), Content("Sure. ")]),
    ("<|thought_start|>\na\n<|thought_end|>\nb", [Reasoning("a"), Content("b")]),
    ("<think>\n\n</think>\n\nAt once", [Content("At once")]),
    ("<think>never ends\n", [Reasoning("never ends")]),
    ("<think", [Content("<think")]),
    ("a <think>b</think>", [Content("a <think>b</think>")]),
    (
        "<think>\nx\n</think>\n" + PYTHON.format('get-weather(city="Paris", days=3)') + "\nDone.",
        [Reasoning("x"), call(0, "get-weather", city="Paris", days=3), Content("Done.")],
    ),
    (
        "Two:\n" + PYTHON.format("now()\nget_weather(\"Rome - from = x\", from='a')"),
        [
            Content("Two:"),
            call(0, "now"),
            call(1, "get-weather", city="Rome - from = x", **{"from": "a"}),
        ],
    ),
    (
        f"Two: {XML.format('Bern')}\n{XML.format('Ulm &amp; co')} ok",
        [
            Content("Two:"),
            call(0, "get-weather", city="Bern"),
            call(1, "get-weather", city="Ulm & co"),
            Content(" ok"),
        ],
    ),
    (
        XML.format("<![CDATA[a</param></function>\n]]&amp;]]>"),
        [call(0, "get-weather", city="a</param></function>\n]]&amp;")],
    ),
    (
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>\n<tool_call>'
        + XML.format("Ulm")
        + "</tool_call>",
        [call(0, "now"), call(1, "get-weather", city="Ulm")],
    ),
    ("x <b> < y <|tool <function> z", [Content("x <b> < y <|tool <function> z")]),
    # the end of the answer may end a call that its fence has ended
    ("<|tool_call_start|>\n```python\nnow()\n```", [call(0, "now")]),
]


@pytest.mark.parametrize(("text", "events"), ANSWERS)
def test_answers(text: str, events: list[Event]) -> None:
    assert read([text]) == events


@pytest.mark.parametrize(("text", "events"), ANSWERS)
def test_every_cut_gives_the_same(text: str, events: list[Event]) -> None:
    assert read([*text]) == events
    for at in range(len(text)):
        assert read([text[:at], text[at:]]) == events, repr(text[:at])


FAILED = [
    (PYTHON.format("get-weather(days=3)"), "needs the argument city"),
    (PYTHON.format('get-weather(city="a", year=3)'), "no argument year"),
    (PYTHON.format("nothing(a=1)"), "no tool nothing"),
    (PYTHON.format("now(" + "[" * 500 + ")"), "no Python"),
    (PYTHON.format("x = now()"), "more than calls"),
    (PYTHON.format("now"), "more than calls"),
    (PYTHON.format("get-weather(city=open('x'))"), "no literal"),
    (PYTHON.format("get-weather(city={[]: 1})"), "key"),
    (PYTHON.format("get-weather(city=b'x')"), "no literal"),
    (PYTHON.format("get-weather(city='\\ud800')"), "no JSON"),
    (PYTHON.format("get-weather(city=1e999)"), "no JSON"),
    (PYTHON.format("get-weather(**{'city': 1})"), "without names"),
    (PYTHON.format("get-weather('a', city='b')"), "city twice"),
    (PYTHON.format(""), "more than calls"),
    ("<|tool_call_start|>\n```python\nnow(", "no end"),
    ('<function name="get-weather"><param name="days">3</param></function>', "needs"),
    ('<function name="now"><param name="x">3</function>', "no parameter"),
    ('<function name="now">text</function>', "no parameter"),
    ('<function name="now"><param name="x"', "no end"),
    ("<function name=now></function>", "function name"),
    (XML.format("a").replace("</func", '<param name="city">b</param></func'), "city twice"),
    (XML.format("<![CDATA[ never ends"), "no end"),
    ("<tool_call>{}</tool_call>", "name and arguments"),
    ("<tool_call>{</tool_call>", "no JSON"),
    ("<tool_call>" + "[" * 100_000 + "</tool_call>", "no JSON"),
]


@pytest.mark.parametrize(("text", "reason"), FAILED, ids=range(len(FAILED)))
def test_what_is_no_call_stays_content(text: str, reason: str) -> None:
    """Nothing is lost, the reason is told, and the answer goes on."""
    events = read([f"Before \n{text}"])
    dropped = [one for one in events if isinstance(one, Dropped)]
    assert len(dropped) == 1
    assert reason in dropped[0].reason
    assert not [one for one in events if isinstance(one, ToolCall)]
    assert "".join(one.text for one in events if isinstance(one, Content)) == f"Before \n{text}"
    if not reason.startswith("no end") and "<![" not in text:
        assert read([*text, "\n", PYTHON.format("now()")])[-1] == call(0, "now")


def test_types_follow_the_schema() -> None:
    tool = {
        "name": "f",
        "parameters": {
            "properties": {
                "s": {"type": "string"},
                "i": {"type": "integer"},
                "n": {"type": ["number", "null"]},
                "l": {"type": "array"},
                "m": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "e": {"enum": ["1", "2"]},
                "x": {},
            }
        },
    }
    values = {"s": "12", "i": " 12 ", "n": "null", "l": "('a', True)", "m": "3", "e": "1", "x": "0"}
    params = "".join(f'<param name="{name}">{one}</param>' for name, one in values.items())
    events = read([f'<function name="f">{params}</function>'], tools=[tool])
    assert isinstance(events[0], ToolCall)
    made = json.loads(events[0].arguments)
    assert made == {"s": "12", "i": 12, "n": None, "l": ["a", True], "m": "3", "e": "1", "x": 0}
    odd = read(['<function name="f"><param name="i">a few</param></function>'], tools=[tool])
    assert odd == [ToolCall("call_0", "f", '{"i": "a few"}')]


def test_without_tools_every_name_passes() -> None:
    text = PYTHON.format('web-search(query-text="a", class="b", top=-1.5, ok=true, no=[None])')
    made = {"query-text": "a", "class": "b", "top": -1.5, "ok": True, "no": [None]}
    assert read([text], tools=None) == [call(0, "web-search", **made)]
    assert read([XML.format("5")], tools=None) == [call(0, "get-weather", city=5)]
    assert read([PYTHON.format("a.b.c()")], tools=None) == [call(0, "a.b.c")]
    unnamed = read([PYTHON.format("f(1)")], tools=None)
    assert isinstance(unnamed[0], Dropped)


def test_calls_can_be_left_alone() -> None:
    text = '{"a": "<function name=\\"now\\"></function>"} '
    assert read([text], read_calls=False) == [Content(text)]


def test_an_opened_thought() -> None:
    for text in ("a\n</think>\n\nb", "<think>\na</think>b", "\n a </think>\nb"):
        assert read([text], opened=True) == [Reasoning("a"), Content("b")]
        assert chat.split_reasoning(text, opened=True) == ("a", "b")
    assert read(["a <"], opened=True) == [Reasoning("a <")]


def test_text_is_told_as_soon_as_it_is_sure() -> None:
    reader = Reader(tools=TOOLS)
    assert reader.push("Sure, a") == [Content("Sure, a")]
    assert reader.push("\n<func") == []
    assert reader.push("tional> b") == [Content("\n<functional> b")]
    assert reader.push(XML.format("Ulm")[:-1]) == []
    (made,) = reader.push(">")
    assert isinstance(made, ToolCall)
    assert reader.push("<think>x ") == [Content("<think>x")]


def test_ids_are_unique() -> None:
    made = [Reader().push(XML.format("x") * 2) for _ in range(3)]
    assert len({one.id for events in made for one in events if isinstance(one, ToolCall)}) == 6


MARKUP = [
    "<think>", "</think>", "<|tool_call_start|>", "<|tool_call_end|>", "```python\n", "\n```",
    "now()", "get-weather(city='x')", "<function name=", '"now">', "</function>", "<![CDATA[",
    "]]>", '<param name="x">', "</param>", "<tool_call>", "</tool_call>", "<", " ", "\n", "a", "é",
    '{"name": "now", "arguments": {}}', "<|thought_start|>", "<|thought_end|>", "'", '"', "(",
]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(MARKUP), max_size=14).map("".join),
    st.lists(st.integers(0, 80), max_size=6),
    st.booleans(),
)
def test_any_markup_cut_anywhere(text: str, cuts: list[int], opened: bool) -> None:
    """The same events, no exception, and no text but white space and markers lost."""
    borders = sorted({0, *(min(one, len(text)) for one in cuts), len(text)})
    pieces = [text[a:b] for a, b in itertools.pairwise(borders)]
    whole = read([text], opened=opened)
    assert read(pieces, opened=opened) == whole
    assert read([*text], opened=opened) == whole
    if not any(isinstance(one, ToolCall | Reasoning) for one in whole) and "think" not in text:
        told = "".join(one.text for one in whole if isinstance(one, Content))
        assert opened or "thought" in text or told == text
