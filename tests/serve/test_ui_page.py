"""The page in a real browser, against a server whose answers are written here."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: set CHROMIUM to its path")

ANSWER = "Here is **bold**, a formula $x^2$ and code:\n\n```python\nprint(1)\n```\n\nThe end."


class Server:
    """The page on a free port. `asked` holds the bodies it was sent; `pause` slows the stream."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.pause = 0.0
        self.failure: int | None = None
        self.left = 0  # streams whose client went away

    def app(self) -> Any:
        import asyncio

        from endside.serve.ui import mount

        app = FastAPI()
        info = {"model": "demo", "context": 1000, "thinks": True, "sampling": {"temperature": 0.8}}
        mount(app, lambda: info)

        async def events(body: dict[str, Any]) -> Any:
            pieces = [{"reasoning_content": one} for one in ("I think ", "about it.")]
            if not body["chat_template_kwargs"]["enable_thinking"]:
                pieces = []
            pieces += [{"content": one} for one in ANSWER.split(" ") for one in (one, " ")][:-1]
            try:
                for piece in pieces:
                    yield _event({"choices": [{"delta": piece, "finish_reason": None}]})
                    await asyncio.sleep(self.pause)
                yield _event({"choices": [{"delta": {}, "finish_reason": "stop"}]})
                usage = {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150}
                yield _event({"choices": [], "usage": usage})
                yield "data: [DONE]\n\n"
            except asyncio.CancelledError:
                self.left += 1
                raise

        @app.post("/v1/chat/completions")
        async def complete(request: Request):
            body = await request.json()
            self.asked.append(body)
            if self.failure:
                error = {"message": "the cache is full: try again", "type": "server_error"}
                return JSONResponse({"error": error}, self.failure)
            return StreamingResponse(events(body), media_type="text/event-stream")

        return app


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


@pytest.fixture(scope="module")
def site() -> Iterator[tuple[Server, str]]:
    import uvicorn

    server = Server()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = uvicorn.Server(uvicorn.Config(server.app(), port=port, log_level="error"))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not running.started:
        assert time.monotonic() < deadline, "the server did not start"
        time.sleep(0.02)
    yield server, f"http://127.0.0.1:{port}"
    running.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        opened = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(site: tuple[Server, str], browser: Any, tmp_path: Path) -> Iterator[Any]:
    """A fresh browser profile on the page; script errors and foreign requests fail the test."""
    server, url = site
    server.asked.clear()
    server.pause, server.failure, server.left = 0.0, None, 0
    context = browser.new_context(viewport={"width": 1200, "height": 800}, accept_downloads=True)
    page, errors, foreign = context.new_page(), [], []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda line: errors.append(line.text) if "Policy" in line.text else None)
    page.on("request", lambda one: foreign.append(one.url) if not one.url.startswith(url) else None)
    page.set_default_timeout(8_000)
    page.goto(url)
    yield page
    shots = os.environ.get("ENDSIDE_SCREENSHOTS")
    if shots:
        name = os.environ["PYTEST_CURRENT_TEST"].split("::")[-1].split(" ")[0]
        page.screenshot(path=str(Path(shots) / f"{name}.png"))
    context.close()
    assert not errors, errors
    assert not foreign, f"the page fetched {foreign}"


def ask(page: Any, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_role("button", name="Send").click()


def finished(page: Any) -> None:
    page.get_by_text("The answer is complete.").wait_for()


def test_answer_is_streamed_rendered_and_counted(site: tuple[Server, str], page: Any) -> None:
    site[0].pause = 0.1
    ask(page, "Hello")
    page.get_by_role("button", name="Stop").wait_for()
    page.locator(".thought[open]").wait_for()  # open while it thinks
    finished(page)
    body = page.locator(".message.assistant .body")
    assert body.locator("strong").inner_text() == "bold"
    assert body.locator("math").count() == 1
    assert body.locator(".h-nb").inner_text() == "print"
    assert page.locator(".thought").get_attribute("open") is None, "the thought folds at its end"
    assert "150 / 1,000" in page.locator("#context-text").inner_text()
    assert "50 tokens" in page.locator(".numbers").last.inner_text()


def test_thought_is_there_to_open(page: Any) -> None:
    ask(page, "Hello")
    finished(page)
    page.locator(".thought summary").click()
    assert page.locator(".thought .prose").inner_text().strip() == "I think about it."


def test_no_think_switch_reaches_the_server(site: tuple[Server, str], page: Any) -> None:
    page.get_by_label("Think", exact=True).uncheck()
    ask(page, "Hello")
    finished(page)
    assert site[0].asked[0]["chat_template_kwargs"] == {"enable_thinking": False}
    assert page.locator(".thought").is_hidden()
    page.reload()
    assert not page.get_by_label("Think", exact=True).is_checked()


def test_stop_keeps_what_came_and_tells_the_server(site: tuple[Server, str], page: Any) -> None:
    site[0].pause = 0.2
    ask(page, "Hello")
    page.locator(".message.assistant .body", has_text="Here").wait_for()
    page.keyboard.press("Escape")
    page.get_by_text("Stopped.").wait_for()
    text = page.locator(".message.assistant .body").inner_text()
    assert "Here" in text and "The end" not in text
    deadline = time.monotonic() + 5
    while not site[0].left and time.monotonic() < deadline:
        page.wait_for_timeout(50)
    assert site[0].left == 1, "the server was not told that nobody listens"


def test_edit_replaces_what_followed(site: tuple[Server, str], page: Any) -> None:
    ask(page, "First")
    finished(page)
    page.get_by_role("button", name="Edit").click()
    assert page.get_by_label("Message", exact=True).input_value() == "First"
    ask(page, "Second")
    finished(page)
    assert [one["content"] for one in site[0].asked[-1]["messages"]] == ["Second"]
    assert page.locator(".message").count() == 2


def test_regenerate_asks_the_same_again(site: tuple[Server, str], page: Any) -> None:
    ask(page, "First")
    finished(page)
    page.get_by_role("button", name="Regenerate").click()
    finished(page)
    page.wait_for_function("document.querySelectorAll('.message').length === 2")
    assert [one["messages"] for one in site[0].asked] == [
        [{"role": "user", "content": "First"}]
    ] * 2


def test_conversation_survives_reload_and_can_be_deleted(page: Any) -> None:
    ask(page, "Remember me")
    finished(page)
    page.reload()
    page.locator(".message.assistant strong", has_text="bold").wait_for()
    page.get_by_role("button", name="Delete Remember me").click()
    page.get_by_text("Ask something.").wait_for()
    page.reload()
    page.get_by_text("Ask something.").wait_for()


def test_earlier_turns_and_system_prompt_are_sent(site: tuple[Server, str], page: Any) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.25")
    page.get_by_role("button", name="Done").click()
    ask(page, "One")
    finished(page)
    ask(page, "Two")
    page.wait_for_function("document.querySelectorAll('.message').length === 4")
    finished(page)
    sent = site[0].asked[-1]
    assert [one["role"] for one in sent["messages"]] == ["system", "user", "assistant", "user"]
    assert sent["temperature"] == 0.25
    assert "I think" not in json.dumps(sent["messages"]), "thoughts are not sent back"


def test_dropped_file_goes_into_the_context(site: tuple[Server, str], page: Any) -> None:
    page.locator("#pick").set_input_files(
        [
            {"name": "notes.txt", "mimeType": "text/plain", "buffer": "grün".encode()},
            {"name": "image.png", "mimeType": "image/png", "buffer": b"\x89PNG\x00\xff"},
        ]
    )
    page.get_by_text("image.png is not a text file").wait_for()
    ask(page, "What is in it?")
    finished(page)
    content = site[0].asked[0]["messages"][0]["content"]
    assert "notes.txt" in content and "grün" in content and content.endswith("What is in it?")


def test_failure_says_why_and_can_be_repeated(site: tuple[Server, str], page: Any) -> None:
    site[0].failure = 503
    ask(page, "Hello")
    page.locator(".problem", has_text="the cache is full: try again").wait_for()
    site[0].failure = None
    page.get_by_role("button", name="Regenerate").click()
    finished(page)
    assert page.locator(".problem:visible").count() == 0


def test_user_text_is_never_html(page: Any) -> None:
    ask(page, "<img src=x onerror=alert(1)><b>bold</b>")
    finished(page)
    shown = page.locator(".message.user .body")
    assert shown.inner_text() == "<img src=x onerror=alert(1)><b>bold</b>"
    assert shown.locator("*").count() == 0


def test_phone_has_a_drawer_and_no_sideways_scroll(page: Any) -> None:
    page.set_viewport_size({"width": 360, "height": 640})
    ask(page, "A" * 400)
    finished(page)
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= 360, f"the page is {wide} pixels wide"
    page.get_by_role("button", name="Open the list").click()
    page.get_by_role("button", name="New conversation", exact=True).click()
    page.get_by_text("Ask something.").wait_for()
    for name in ("Send", "Add text files"):
        box = page.get_by_role("button", name=name).bounding_box()
        assert box and box["height"] >= 32, f"{name} is too small for a finger: {box}"


def test_keyboard_alone_is_enough(page: Any) -> None:
    page.get_by_label("Message", exact=True).focus()
    page.keyboard.type("Hello")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("there")
    page.keyboard.press("Enter")
    finished(page)
    assert page.locator(".message.user .body").inner_text() == "Hello\nthere"


def test_every_control_has_a_name(page: Any) -> None:
    ask(page, "Hello")
    finished(page)
    page.get_by_role("button", name="Settings").click()
    unnamed = page.evaluate(
        """[...document.querySelectorAll('button, input:not([hidden]), textarea, meter')]
        .filter(e => !(e.getAttribute('aria-label') || e.textContent.trim() || e.labels?.length))
        .map(e => e.outerHTML)"""
    )
    assert unnamed == []


def test_colours_follow_the_choice(page: Any) -> None:
    back = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(back)
    page.get_by_role("button", name="Colours").click()
    page.get_by_role("button", name="Colours: light").click()
    assert page.evaluate(back) != light
    page.reload()
    assert page.evaluate(back) != light, "the choice was forgotten"


def test_policy_forbids_foreign_and_inline_code(site: tuple[Server, str], page: Any) -> None:
    answer = page.request.get(site[1])
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy
    for path in (
        "/ui/static/..%2f__init__.py",
        "/ui/static/markdown.py",
        "/ui/static/../markdown.py",
    ):
        assert page.request.get(site[1] + path).status == 404
