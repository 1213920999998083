"""`endside run --server URL` against a real server, and against what is none."""

from __future__ import annotations

import io
import json
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest

from endside.errors import UserError
from endside.verbs import remote, run

from .conftest import Running, launch

KEY = "a-key-that-is-long-enough"
PROMPT = "the quick brown"
SAMPLED = ["--seed", "3", "--temperature", "1.0", "--max-tokens", "12"]


def whole(server: Running, path: str, **body) -> dict:
    given = {"seed": 3, "temperature": 1.0, "max_tokens": 12, **body}
    return httpx2.post(server.url + path, json=given, timeout=60).json()


def chat(server: Running, text: str = PROMPT, **body) -> str:
    messages = [{"role": "user", "content": text}]
    answer = whole(server, "/v1/chat/completions", messages=messages, **body)
    return answer["choices"][0]["message"]["content"]


@pytest.mark.parametrize("words", [[PROMPT], ["tiny", PROMPT]])
def test_answer_is_that_of_the_server(server: Running, capsys, words: list[str]) -> None:
    run.main(["--server", server.url, *words, *SAMPLED])
    assert capsys.readouterr().out == chat(server) + "\n"


def test_address_may_end_in_v1_and_lack_the_scheme(server: Running, capsys) -> None:
    run.main(["--server", server.url.removeprefix("http://") + "/v1/", PROMPT, *SAMPLED])
    assert capsys.readouterr().out == chat(server) + "\n"


def test_json_holds_the_usage(server: Running, capsys) -> None:
    run.main(["--server", server.url, PROMPT, *SAMPLED, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["text"] == chat(server) and found["finish_reason"] == "length"
    assert found["usage"]["completion_tokens"] == 12 and found["usage"]["prompt_tokens"] > 5
    assert found["model"] == "tiny" and found["timings"]["total_s"] > 0


def test_raw_continues_the_text(server: Running, capsys) -> None:
    run.main(["--server", server.url, PROMPT, *SAMPLED, "--raw", "--stats"])
    shown = capsys.readouterr()
    text = whole(server, "/v1/completions", prompt=PROMPT)["choices"][0]["text"]
    assert shown.out == text + "\n"
    assert "answer 12 tokens" in shown.err and "ended by length" in shown.err


def test_every_flag_reaches_the_server(server: Running, capsys, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"type": "object", "properties": {"a": {"const": 7}},
                                  "required": ["a"], "additionalProperties": False}))  # fmt: skip
    run.main(["--server", server.url, PROMPT, "--json-schema", str(schema), "--max-tokens", "60"])
    assert json.loads(capsys.readouterr().out) == {"a": 7}
    run.main(["--server", server.url, PROMPT, "--raw", "--json-schema", str(schema)])
    assert json.loads(capsys.readouterr().out) == {"a": 7}
    run.main(["--server", server.url, PROMPT, "--regex", "ab(cd){3}", "--max-tokens", "60"])
    assert capsys.readouterr().out == "abcdcdcd\n"
    run.main(["--server", server.url, PROMPT, "--regex", "abcdcd", "--stop", "dc"])
    assert capsys.readouterr().out == "abc\n"
    more = ["--system", "be brief", "--top-k", "3", "--min-p", "0.01", "--presence-penalty", "1"]
    run.main(["--server", server.url, PROMPT, *SAMPLED, *more])
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": PROMPT}]
    same = whole(server, "/v1/chat/completions", messages=messages, top_k=3, min_p=0.01,
                 presence_penalty=1.0)  # fmt: skip
    assert capsys.readouterr().out == same["choices"][0]["message"]["content"] + "\n"


def test_thought_goes_to_stderr(server: Running, capsys) -> None:
    """The template opens the thought, the budget closes it, the regular expression answers."""
    flags = ["--think", "--thinking-budget", "5", "--regex", "yes", "--max-tokens", "40"]
    run.main(["--server", server.url, PROMPT, *flags, "--seed", "3", "--temperature", "1"])
    shown = capsys.readouterr()
    thought = whole(
        server, "/v1/chat/completions", messages=[{"role": "user", "content": PROMPT}],
        chat_template_kwargs={"enable_thinking": True}, thinking_budget=5, regex="yes",
        max_tokens=40,
    )["choices"][0]["message"]  # fmt: skip
    assert shown.out == "yes\n" and thought["content"] == "yes"
    assert thought["reasoning_content"] and thought["reasoning_content"] in shown.err


def test_chat_remembers_its_turns(server: Running, capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", type("Terminal", (io.StringIO,), {"isatty": lambda _: True})())
    lines = iter([PROMPT, "and then", "/exit"])
    monkeypatch.setattr("builtins.input", lambda _prompt: next(lines))
    run.main(["--server", server.url, *SAMPLED])
    first = chat(server)
    history = [
        {"role": "user", "content": PROMPT},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "and then"},
    ]
    second = whole(server, "/v1/chat/completions", messages=history)["choices"][0]["message"]
    assert capsys.readouterr().out == first + "\n" + second["content"] + "\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--quant", "int4"], "--quant: only for a model that is loaded here"),
        (["--session", "file"], "--session: only for"),
        (["other", "text"], "has no model 'other': it has tiny"),
        (["text", "--top-p", "7"], "top_p"),
        (["text", "--json-schema", "nowhere"], "cannot read --json-schema"),
        (["text", "--regex", "("], "regex"),
        (["fox " * 5000], "cache holds 2,048"),
        (["text", "--file", "x"], "both a prompt and --file"),
    ],
)
def test_what_cannot_be_is_one_message(server: Running, words: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        run.main(["--server", server.url, *words])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "address", ["ftp://x", "http://", "http://x:notaport", "http://x:99999999"]
)
def test_wrong_address(address: str) -> None:
    with pytest.raises(UserError, match="--server"):
        run.main(["--server", address, "text"])


def test_no_server_says_how_to_start_one() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(UserError, match="endside serve MODEL"):
        run.main(["--server", f"http://127.0.0.1:{port}", "text"])


def test_key_is_read_from_the_environment(model: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    (tmp_path / "keys").write_text(KEY)
    running = launch(model, "--api-key-file", str(tmp_path / "keys"))
    try:
        monkeypatch.delenv(remote.KEY, raising=False)
        with pytest.raises(UserError, match=f"variable {remote.KEY}"):
            run.main(["--server", running.url, "text"])
        monkeypatch.setenv(remote.KEY, KEY)
        run.main(["--server", running.url, PROMPT, "--max-tokens", "3"])
        assert capsys.readouterr().out
    finally:
        assert running.stop() == 0


def speak(answer: Callable[[str], bytes]) -> str:
    """A server that answers what it likes, for one test; its address."""
    listening = socket.create_server(("127.0.0.1", 0))

    def work() -> None:
        for _ in range(3):
            line, _ = listening.accept()
            with line:
                head = line.recv(65536).decode()
                line.sendall(answer(head.split(" ")[1]))
        listening.close()

    threading.Thread(target=work, daemon=True).start()
    return f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (b'data: {"choices": [{"delta": {"content": "hal"}}]}\n\n', "went away in the middle"),
        (b'data: {"choices": [{"del', "went away in the middle"),
        (b'data: {"error": {"message": "no room left"}}\n\n', "no room left"),
    ],
)
def test_cut_answer_is_never_taken_for_a_whole_one(stream: bytes, message: str) -> None:
    head = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"
    pages = {"/v1/models": b'{"data": [{"id": "m"}]}', "/ui/info": b'{"chat": true}'}
    url = speak(lambda path: head + pages.get(path, stream))
    with pytest.raises(UserError, match=message):
        run.main(["--server", url, "text"])


def test_page_that_is_no_api(capsys) -> None:
    url = speak(lambda _path: b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n<html>")
    with pytest.raises(UserError, match="no answer of an API"):
        run.main(["--server", url, "text"])
