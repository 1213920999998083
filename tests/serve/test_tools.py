"""Tool calls in the formats of all three model generations, whole and streamed.

The model is a parrot: it says a given text, byte by byte, after any prompt. Everything around it is
the server's own: template, engine's thread, reader, chunks.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx2
import numpy as np
import pytest

from endside.api import LLM
from endside.serve.app import build
from endside.serve.runner import Runner
from endside.tokenizer import Tokenizer, train_bpe
from tests.engine.fake import FakeExecutor

from .conftest import wait_until

TOOL = {
    "type": "function",
    "function": {
        "name": "get-weather",
        "description": "The weather of a place",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["place", "days"],
        },
    },
}
WANTED = {"place": "Köln <A>", "days": 2}
CALLS = {
    "python": '<|tool_call_start|>\n```python\nget_weather(place="Köln <A>", days=2)\n```\n'
    "<|tool_call_end|>",
    "tagged": '<tool_call>\n{"name": "get-weather", "arguments": {"place": "Köln <A>", "days": 2}}'
    "\n</tool_call>",
    "xml": '<function name="get-weather"><param name="place"><![CDATA[Köln <A>]]></param>'
    '<param name="days">2</param></function>',
}
THOUGHTS = {
    "python": "<|thought_start|>\nhm, rain?\n<|thought_end|>\n",
    "tagged": "<think>\nhm, rain?\n</think>\n\n",
    "xml": "<think>\nhm, rain?\n</think>\n\n",
}


class Parrot(FakeExecutor):
    """Says `script` after every generation prompt."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        super().__init__(vocab_size=vocab_size, context=4096, capacity=16384)
        self.script: list[int] = []
        self._start = tokenizer.id_of("<|im_start|>")
        self._head = len(tokenizer.encode("assistant\n", bos=False))
        self._end = tokenizer.id_of("<|im_end|>")

    def _append(self, seq: int, token: int) -> np.ndarray:
        super()._append(seq, token)
        history = self._tokens[seq]
        turn = len(history) - history[::-1].index(self._start) if self._start in history else 0
        at = len(history) - turn - self._head
        logits = np.zeros(self.vocab_size, np.float32)
        logits[self.script[at] if 0 <= at < len(self.script) else self._end] = 30
        return logits


class Site:
    """The server in this process, and what its parrot says."""

    def __init__(self) -> None:
        self.tokenizer = train_bpe(iter(["a word or two"] * 30), 400)
        self.parrot = Parrot(self.tokenizer, 400)
        self.url = ""

    def says(self, text: str) -> None:
        """The next answers, a byte or a character a token."""
        ids = [id for one in text for id in self.tokenizer.encode(one, bos=False)]
        assert len(ids) >= len(text), "pieces as small as they come"
        self.parrot.script = ids

    def ask(self, **more: Any) -> Any:
        body = {"messages": [{"role": "user", "content": "hi"}], "tools": [TOOL],
                "chat_template_kwargs": {"enable_thinking": None}, **more}  # fmt: skip
        return httpx2.post(self.url + "/v1/chat/completions", json=body, timeout=30)


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    import uvicorn

    made = Site()
    runner = Runner(LLM.of(made.parrot, made.tokenizer), queue=8, timeout=30)
    listening = socket.create_server(("127.0.0.1", 0))
    made.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    running = uvicorn.Server(uvicorn.Config(build(runner, model="parrot"), log_level="error"))
    thread = threading.Thread(target=running.run, args=([listening],), daemon=True)
    runner.start()
    thread.start()
    wait_until(lambda: running.started)
    yield made
    running.should_exit = True
    runner.close()
    thread.join(10)
    assert runner.join(10), "the engine's thread has not ended"


@pytest.mark.parametrize("form", CALLS)
@pytest.mark.parametrize("thinks", [False, True])
def test_call_is_told_apart_from_text(site: Site, form: str, thinks: bool) -> None:
    site.says((THOUGHTS[form] if thinks else "") + "I look.\n" + CALLS[form])
    choice = site.ask().json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    call = choice["message"]["tool_calls"][0]
    assert call["function"]["name"] == "get-weather" and call["id"]
    assert json.loads(call["function"]["arguments"]) == WANTED
    assert choice["message"]["content"].strip() == "I look."
    thought = choice["message"].get("reasoning_content")
    assert (thought or "").strip() == ("hm, rain?" if thinks else "")


@pytest.mark.parametrize("form", CALLS)
def test_calls_stream(site: Site, form: str) -> None:
    site.says("I look.\n" + CALLS[form] + "\n" + CALLS[form].replace("2", "3"))
    text, calls, reasons = "", [], []
    for line in site.ask(stream=True).text.splitlines():
        if line.startswith("data: {"):
            for choice in json.loads(line[6:])["choices"]:
                text += choice["delta"].get("content") or ""
                calls += choice["delta"].get("tool_calls") or []
                reasons.append(choice["finish_reason"])
    assert [one["index"] for one in calls] == [0, 1] and calls[0]["id"] != calls[1]["id"]
    days = [json.loads(one["function"]["arguments"])["days"] for one in calls]
    assert days == [2, 3] and text.strip() == "I look."
    assert reasons[-1] == "tool_calls" and not any(reasons[:-1])


def test_call_of_an_unknown_tool_is_no_call(site: Site) -> None:
    site.says("Well.\n" + CALLS["xml"].replace("get-weather", "format-disk"))
    choice = site.ask().json()["choices"][0]
    assert choice["finish_reason"] == "stop" and "tool_calls" not in choice["message"]


def test_tool_choice_none_leaves_the_tools_out(site: Site) -> None:
    site.says("a word")
    with_tools, without = (
        site.ask(tool_choice=one).json()["usage"]["prompt_tokens"] for one in ("auto", "none")
    )
    assert with_tools > without + 20


def test_thought_streams_apart(site: Site) -> None:
    site.says("<think>\nhm, é?\n</think>\n\nYes.")
    parts: dict[str, str] = {"reasoning_content": "", "content": ""}
    for line in site.ask(stream=True, tools=None).text.splitlines():
        if line.startswith("data: {"):
            delta = json.loads(line[6:])["choices"][0]["delta"]
            for name in parts:
                parts[name] += delta.get(name) or ""
    assert {name: text.strip() for name, text in parts.items()} == {
        "reasoning_content": "hm, é?", "content": "Yes.",
    }  # fmt: skip


def test_markup_in_an_answer_is_bytes_in_order(site: Site) -> None:
    text = "Assistant: a < b && c > d — `<x>` «é» 你好 \U0001f600 Assistant:"
    site.says(text)
    assert site.ask(tools=None).json()["choices"][0]["message"]["content"] == text
