"""What people's clients do, against a real process: the official library and langchain's."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from .conftest import Running, wait_until

HELLO = [{"role": "user", "content": "hello to you"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "maxLength": 8},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["place", "days"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=60)


def ask(client: openai.OpenAI, **more):
    given = {"model": "tiny", "messages": HELLO, "max_tokens": 12, "seed": 1, "temperature": 1.0}
    return client.chat.completions.create(**{**given, **more})


def test_models_are_listed(client: openai.OpenAI) -> None:
    found = client.models.list().data
    assert [one.id for one in found] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="'other' is not here"):
        ask(client, model="other")


def test_stream_adds_up_to_the_whole_answer(client: openai.OpenAI) -> None:
    whole = ask(client, max_tokens=40)
    chunks = list(ask(client, max_tokens=40, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(one.choices[0].delta.content or "" for one in chunks if one.choices)
    assert text == whole.choices[0].message.content and len(text) > 10
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 40
    assert len({one.id for one in chunks}) == 1


def test_usage_counts_the_begin_token_and_the_cache(client: openai.OpenAI) -> None:
    long = [{"role": "user", "content": "the quick brown fox " * 40}]
    first = ask(client, messages=long).usage
    again = ask(client, messages=long).usage
    assert first.prompt_tokens == again.prompt_tokens > 150
    assert again.prompt_tokens_details.cached_tokens >= 64
    assert first.total_tokens == first.prompt_tokens + first.completion_tokens


def test_a_seed_repeats_and_n_differs(client: openai.OpenAI) -> None:
    one, same, other = (ask(client, seed=seed).choices[0].message.content for seed in (5, 5, 6))
    assert one == same != other
    several = [choice.message.content for choice in ask(client, seed=5, n=3).choices]
    assert several[0] == one and several[1] == other and len(set(several)) == 3


def test_n_streams_arrive_apart(client: openai.OpenAI) -> None:
    whole = [one.message.content for one in ask(client, n=3).choices]
    texts = ["", "", ""]
    for chunk in ask(client, n=3, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == whole


def test_stop_strings_hold_across_tokens(client: openai.OpenAI) -> None:
    text = ask(client, max_tokens=60).choices[0].message.content
    stop = next(text[at : at + 4] for at in range(15, 60) if text[at : at + 4].isprintable()
                and text[at : at + 4].isascii())  # fmt: skip
    found = ask(client, max_tokens=60, stop=[stop, "never seen"])
    assert found.choices[0].message.content == text[: text.index(stop)]
    assert found.choices[0].finish_reason == "stop"
    streamed = ask(client, max_tokens=60, stop=stop, stream=True)
    pieces = "".join(one.choices[0].delta.content or "" for one in streamed)
    assert pieces == text[: text.index(stop)]


def test_logprobs(client: openai.OpenAI) -> None:
    found = ask(client, logprobs=True, top_logprobs=3, temperature=0.0).choices[0]
    listed = found.logprobs.content
    assert len(listed) == 12
    assert "".join(bytes(b for one in listed for b in one.bytes).decode("utf-8", "replace")) == (
        found.message.content
    )
    for one in listed:
        assert len(one.top_logprobs) == 3 and one.logprob <= 0
        assert one.top_logprobs[0].logprob == one.logprob, "greedy takes the likeliest"
        values = [top.logprob for top in one.top_logprobs]
        assert values == sorted(values, reverse=True)
    streamed = ask(client, logprobs=True, top_logprobs=3, temperature=0.0, stream=True)
    parts = [one.choices[0].logprobs for one in streamed]
    assert [one for part in parts if part for one in part.content] == listed


def test_bias_and_penalties_act(client: openai.OpenAI) -> None:
    banned = ask(client, temperature=0.0, logprobs=True).choices[0].logprobs.content[0]
    ids = openai_tokenize(client, banned.token)
    other = ask(client, temperature=0.0, logit_bias={str(one): -100 for one in ids}, logprobs=True)
    assert other.choices[0].logprobs.content[0].token != banned.token
    plain = ask(client, temperature=0.0, max_tokens=40).choices[0].message.content
    varied = ask(
        client, temperature=0.0, max_tokens=40, frequency_penalty=2.0, presence_penalty=2.0
    )
    assert varied.choices[0].message.content != plain


def openai_tokenize(client: openai.OpenAI, text: str) -> list[int]:
    url = str(client.base_url).removesuffix("/v1/") + "/tokenize"
    found = client._client.post(url, json={"prompt": text, "add_special_tokens": False})
    return found.json()["tokens"]


def test_json_schema_is_kept(client: openai.OpenAI) -> None:
    schema = TOOL["function"]["parameters"]
    form = {"type": "json_schema", "json_schema": {"name": "weather", "schema": schema}}
    for seed in range(5):
        found = ask(client, response_format=form, max_tokens=200, seed=seed, temperature=1.5)
        made = json.loads(found.choices[0].message.content)
        assert set(made) == {"place", "days"} and 1 <= made["days"] <= 9 and len(made["place"]) <= 8
        assert found.choices[0].finish_reason == "stop"


def test_tools_round_trip(client: openai.OpenAI) -> None:
    first = ask(client, tools=[TOOL], tool_choice="required", max_tokens=200)
    choice = first.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    call = choice.message.tool_calls[0]
    assert call.function.name == "weather" and json.loads(call.function.arguments)["days"] >= 1
    result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    history = [*HELLO, choice.message.model_dump(exclude_none=True), result]
    second = ask(client, messages=history, tools=[TOOL])
    assert second.choices[0].message.content is not None
    assert second.usage.prompt_tokens > first.usage.prompt_tokens


def test_named_tool_streams(client: openai.OpenAI) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    chunks = list(ask(client, tools=[TOOL], tool_choice=named, max_tokens=200, stream=True))
    calls = [one.choices[0].delta.tool_calls for one in chunks if one.choices[0].delta.tool_calls]
    assert len(calls) == 1 and json.loads(calls[0][0].function.arguments)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert not any(one.choices[0].delta.content for one in chunks)


def test_leaving_a_stream_cancels_the_answer(server: Running, client: openai.OpenAI) -> None:
    stream = ask(client, max_tokens=1500, stream=True)
    for _, _chunk in zip(range(3), stream):
        pass
    stream.close()
    running = lambda: _metric(client, "endside_requests_running")
    wait_until(lambda: running() == 0)
    assert _metric(client, 'endside_answers_total{reason="cancelled"}') >= 1


def test_leaving_before_a_whole_answer_cancels_it(client: openai.OpenAI) -> None:
    before = _metric(client, 'endside_answers_total{reason="cancelled"}')
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.1).chat.completions.create(
            model="tiny", messages=HELLO, max_tokens=1900, n=16
        )
    wait_until(lambda: _metric(client, 'endside_answers_total{reason="cancelled"}') > before)


def _metric(client: openai.OpenAI, name: str) -> float:
    url = str(client.base_url).removesuffix("/v1/") + "/metrics"
    for line in client._client.get(url).text.splitlines():
        if line.startswith(name + " "):
            return float(line.split(" ")[-1])
    return 0.0


def test_company_changes_no_answer(client: openai.OpenAI) -> None:
    """Twenty seeded requests at once get what each gets alone."""
    wanted = [
        {"messages": [{"role": "user", "content": f"say {n} " + "fox " * n}], "seed": n,
         "max_tokens": 5 + n}
        for n in range(20)
    ]  # fmt: skip
    alone = [ask(client, **one).choices[0].message.content for one in wanted]
    with ThreadPoolExecutor(20) as pool:
        together = list(pool.map(lambda one: ask(client, **one).choices[0].message.content, wanted))
    assert together == alone


def test_completions(client: openai.OpenAI) -> None:
    found = client.completions.create(
        model="tiny", prompt=["the quick", "a lazy"], max_tokens=6, seed=1, echo=True, logprobs=2
    )
    assert [one.index for one in found.choices] == [0, 1]
    assert found.choices[0].text.startswith("the quick")
    assert len(found.choices[0].logprobs.tokens) == 6
    assert found.choices[0].logprobs.text_offset[0] == len("the quick")
    ids = openai_tokenize(client, "the quick")
    same = client.completions.create(model="tiny", prompt=ids, max_tokens=6, seed=1)
    assert same.usage.prompt_tokens == len(ids)
    streamed = client.completions.create(
        model="tiny", prompt="the quick", max_tokens=6, seed=1, stream=True
    )
    text = "".join(one.choices[0].text for one in streamed)
    assert "the quick" + text == found.choices[0].text


def test_tokenize_and_back(client: openai.OpenAI) -> None:
    url = str(client.base_url).removesuffix("/v1/")
    ids = openai_tokenize(client, "hello é 你好")
    back = client._client.post(url + "/detokenize", json={"tokens": ids}).json()
    assert back["prompt"] == "hello é 你好"


def test_langchain(server: Running) -> None:
    from langchain_openai import ChatOpenAI
    from pydantic import BaseModel, Field

    chat = ChatOpenAI(
        base_url=server.url + "/v1", api_key="none", model="tiny", max_tokens=200, seed=1,
        temperature=1.0, max_retries=0,
    )  # fmt: skip
    whole = chat.invoke("hello to you")
    assert whole.usage_metadata["output_tokens"] > 0
    assert "".join(one.content for one in chat.stream("hello to you")) == whole.content

    class Weather(BaseModel):
        """The weather."""

        place: str = Field(max_length=8)
        days: int = Field(ge=1, le=9)

    made = chat.with_structured_output(Weather, method="json_schema").invoke("hello")
    assert 1 <= made.days <= 9
    called = chat.bind_tools([Weather], tool_choice="any").invoke("hello")
    assert called.tool_calls[0]["name"] == "Weather"


def test_time_to_first_token_is_told(client: openai.OpenAI) -> None:
    begun = time.monotonic()
    ask(client)
    assert _metric(client, "endside_time_to_first_token_seconds_count") > 0
    assert _metric(client, "endside_time_to_first_token_seconds_sum") < time.monotonic()
    assert time.monotonic() - begun < 30
