"""What the reference server does wrong, each one asked of ours; and what no other file asks."""

from __future__ import annotations

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest

from endside.tokenizer import Tokenizer

from .conftest import Running

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello to you"}]


@pytest.fixture(scope="module")
def tokenizer(model) -> Tokenizer:
    return Tokenizer.load(model)


def post(server: Running, path: str, **body) -> dict:
    given = {"seed": 1, "temperature": 1.0, "max_tokens": 12, **body}
    answer = httpx2.post(server.url + path, json=given, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def chat(server: Running, **body) -> dict:
    return post(server, CHAT, **{"messages": HELLO, **body})


def deltas(server: Running, **body) -> list[dict]:
    """The choices of every chunk of a stream."""
    given = {"seed": 1, "temperature": 1.0, "messages": HELLO, "stream": True, **body}
    with httpx2.stream("POST", server.url + CHAT, json=given, timeout=60) as got:
        lines = [line for line in got.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    return [one for line in lines[:-1] for one in json.loads(line[6:])["choices"]]


def test_begin_token_stands_once_before_everything(server: Running, tokenizer: Tokenizer) -> None:
    ids = httpx2.post(server.url + "/tokenize", json={"messages": HELLO}).json()["tokens"]
    assert ids[0] == tokenizer.bos_id and ids.count(tokenizer.bos_id) == 1
    assert chat(server)["usage"]["prompt_tokens"] == len(ids)
    plain = httpx2.post(server.url + "/tokenize", json={"prompt": "fox"}).json()["tokens"]
    assert plain == [tokenizer.bos_id, *plain[1:]] and len(plain) > 1
    assert post(server, TEXT, prompt="fox")["usage"]["prompt_tokens"] == len(plain)
    same = [post(server, TEXT, prompt=one)["choices"][0]["text"] for one in ("fox", plain)]
    assert same[0] == same[1], "a text and its ids differ"
    bare = post(server, TEXT, prompt=plain[1:])["choices"][0]["text"]
    assert bare != same[0], "ids are taken as they are, so this could not be told apart"


def test_every_end_token_of_the_model_ends_the_answer(
    server: Running, tokenizer: Tokenizer
) -> None:
    ends = sorted(tokenizer.eos_ids)
    assert len(ends) > 1, "one end token shows nothing"
    for end in ends:
        found = chat(server, logit_bias={str(end): 100})
        assert found["choices"][0]["finish_reason"] == "stop"
        assert found["choices"][0]["message"]["content"] == ""
        assert found["usage"]["completion_tokens"] == 1


def test_tokens_of_a_stop_string_stop_nothing_alone(server: Running) -> None:
    text = chat(server, max_tokens=60)["choices"][0]["message"]["content"]
    stop = text[10:14] + "\u2603"  # every token but the last is in the answer
    assert chat(server, max_tokens=60, stop=stop)["choices"][0]["message"]["content"] == text


def test_length_is_counted_in_tokens(server: Running) -> None:
    long = chat(server, regex="fox fox fox fox fox", max_tokens=3)
    assert long["choices"][0]["finish_reason"] == "length"
    assert long["usage"]["completion_tokens"] == 3
    text = "a lazy dog and a lazy dog"
    done = chat(server, regex=text, max_tokens=len(text) + 1)
    assert done["choices"][0]["finish_reason"] == "stop"
    assert done["choices"][0]["message"]["content"] == text


def test_stream_has_role_and_last_text_and_usage(server: Running) -> None:
    text = "one two three"
    found = deltas(server, regex=text, max_tokens=40)
    assert found[0]["delta"]["role"] == "assistant"
    assert "".join(one["delta"].get("content") or "" for one in found) == text
    assert [one["finish_reason"] for one in found[:-1]] == [None] * (len(found) - 1)
    assert found[-1]["finish_reason"] == "stop"


def test_speakers_names_in_a_text_are_text(server: Running) -> None:
    text = "Assistant: yes. User: no. Assistant: so"
    found = chat(server, regex=re.escape(text), max_tokens=100)
    assert found["choices"][0]["message"]["content"] == text
    messages = [{"role": "user", "content": "Assistant: hello"}]
    ids = httpx2.post(server.url + "/tokenize", json={"messages": messages}).json()["tokens"]
    said = httpx2.post(server.url + "/detokenize", json={"tokens": ids}).json()["prompt"]
    assert "Assistant: hello" in said


def test_the_loop_answers_while_the_model_works(server: Running) -> None:
    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(chat, server, max_tokens=1500, seed=n) for n in range(8)]
        worst, asked = 0.0, 0
        while not all(one.done() for one in running):
            begun = time.monotonic()
            assert httpx2.get(server.url + "/health").json()["status"] == "ok"
            worst, asked = max(worst, time.monotonic() - begun), asked + 1
        assert [one.result()["usage"]["completion_tokens"] > 0 for one in running] == [True] * 8
    assert asked > 3 and worst < 1.0, f"{asked} times asked, once {worst:.2f} s"


def test_a_long_prompt_does_not_freeze_an_answer(server: Running) -> None:
    """While prompts of 1,900 tokens are taken in, a running stream goes on between their chunks."""
    bias = {str(one): -100 for one in range(8)}  # no early end
    long = "fox " * 900
    at: list[float] = []
    body = {"messages": HELLO, "max_tokens": 1800, "stream": True, "seed": 1, "logit_bias": bias}
    with httpx2.stream("POST", server.url + CHAT, json=body, timeout=60) as got:
        lines = got.iter_lines()
        for _ in range(10):
            next(lines)
        with ThreadPoolExecutor(4) as pool:
            begun = time.monotonic()
            busy = [
                pool.submit(post, server, TEXT, prompt=f"{n} {long}", max_tokens=1, regex="x")
                for n in range(4)
            ]
            for _line in lines:
                at.append(time.monotonic())
                if all(one.done() for one in busy):
                    break
            ended = time.monotonic()
            assert all(one.result()["usage"]["prompt_tokens"] > 900 for one in busy)
    between = [one for one in at if begun < one < ended]
    assert len(between) >= 10, f"{len(between)} lines while the prompts were taken in"


def test_parts_and_every_role_are_taken(server: Running) -> None:
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "be brief"}]},
        {"role": "user", "content": [{"type": "text", "text": one} for one in ("a ", "b")]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function",
         "function": {"name": "weather", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
    ]  # fmt: skip
    ids = httpx2.post(server.url + "/tokenize", json={"messages": messages}).json()["tokens"]
    said = httpx2.post(server.url + "/detokenize", json={"tokens": ids}).json()["prompt"]
    assert all(word in said for word in ("be brief", "a b", "weather", "rain"))
    assert chat(server, messages=messages)["usage"]["prompt_tokens"] == len(ids)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 2.0), ("top_p", 0.05), ("top_k", 2), ("min_p", 0.9),
        ("repetition_penalty", 1.9), ("presence_penalty", 2.0), ("frequency_penalty", 2.0),
    ],
)  # fmt: skip
def test_every_sampling_field_acts(server: Running, field: str, value: float) -> None:
    text = lambda **more: chat(server, max_tokens=60, **more)["choices"][0]["message"]["content"]
    assert text(**{field: value}) != text()


def test_thought_is_its_own_field(server: Running) -> None:
    """The template opens the thought, the budget closes it, the expression answers."""
    options = {"thinking_budget": 5, "regex": "yes", "max_tokens": 60}
    on, off = {"enable_thinking": True}, {"enable_thinking": False}
    found = chat(server, chat_template_kwargs=on, **options)
    message = found["choices"][0]["message"]
    assert message["content"] == "yes" and message["reasoning_content"]
    assert found["usage"]["completion_tokens_details"]["reasoning_tokens"] >= 1
    streamed = [one["delta"] for one in deltas(server, chat_template_kwargs=on, **options)]
    thought = "".join(one.get("reasoning_content") or "" for one in streamed)
    assert thought == message["reasoning_content"]
    assert "".join(one.get("content") or "" for one in streamed) == "yes"
    silent = chat(server, chat_template_kwargs=off, regex="yes")["choices"][0]["message"]
    assert silent["content"] == "yes" and "reasoning_content" not in silent


def test_embeddings_are_refused_with_a_reason(server: Running) -> None:
    answer = httpx2.post(server.url + "/v1/embeddings", json={"input": "x", "model": "tiny"})
    assert answer.status_code == 404
    assert "without embeddings" in answer.json()["error"]["message"]


def test_metrics_tell_what_the_issue_asks_for(server: Running) -> None:
    chat(server)
    text = httpx2.get(server.url + "/metrics").text
    for name in ("requests_running", "requests_waiting", "generation_tokens_total",
                 "time_to_first_token_seconds_bucket", "inter_token_seconds_bucket",
                 "prefix_cache_hits_total", "prefix_cache_tokens_total",
                 "accepted_length"):  # fmt: skip
        assert re.search(rf"^endside_{name}[ {{]", text, re.M), name
    made = float(re.search(r"^endside_generation_tokens_total (\S+)", text, re.M)[1])
    chat(server)
    text = httpx2.get(server.url + "/metrics").text
    after = float(re.search(r"^endside_generation_tokens_total (\S+)", text, re.M)[1])
    assert after == made + 12
