"""Answers with a shape, through LLM: constraints, thoughts and tool calls on real executors."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch

from endside import LLM, chat, native
from endside.answer import ToolCall
from endside.engine.drafts.lookup import Lookup
from endside.engine.engine import Engine
from endside.engine.sampler import sample
from endside.errors import UserError
from endside.formats.hf import save
from endside.model.presets import preset
from endside.model.transformer import Transformer
from endside.tokenizer import Tokenizer, train_bpe
from tests.engine.schemas import schema

TEXT = ['{"name": "été", "id": 12.5, "a": [true, false, null]} "x-1": -7e9 2024-12-31 <think> ']
CHAT = [{"role": "user", "content": "Hi there"}]
EXECUTORS = ["torch", *["native"] * bool(native.available_isas())]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = train_bpe(TEXT * 30, 330)
    place = tmp_path_factory.mktemp("model")
    tokenizer.save(place / "text")
    config = dataclasses.replace(
        preset("tiny"), vocab_size=333, eos_token_ids=tokenizer.eos_ids, bos_token_id=0
    )
    model = Transformer(config)
    model.init_weights(torch.Generator().manual_seed(2))
    return save(model, place / "model", tokenizer_files=place / "text")


@pytest.fixture(scope="module", params=EXECUTORS)
def llm(request: pytest.FixtureRequest, folder: Path) -> LLM:
    made = LLM(folder, executor=request.param, context=1024)
    # Two engines use this executor: neither may keep pages for later.
    made.engine = Engine(made.engine.executor, made.engine.token_bytes, prefix_cache=False)
    return made


@pytest.fixture(scope="module")
def drafting(llm: LLM) -> LLM:
    """The same model with prompt lookup."""
    executor, table = llm.engine.executor, llm.engine.token_bytes
    made = LLM.of(executor, llm.tokenizer)
    made.engine = Engine(executor, table, prefix_cache=False, drafts=Lookup())
    return made


def wrong(llm: LLM, drafting: LLM, seed: int) -> Iterator[str]:
    """What is wrong with the answers to one random schema, plain and drafted."""
    wanted = schema(seed)
    for temperature in (0.0, 1.3):
        values = {"json_schema": wanted, "temperature": temperature, "seed": seed}
        plain = llm.generate("Once", **values)
        try:
            jsonschema.Draft202012Validator(wanted).validate(json.loads(plain.text))
        except (ValueError, jsonschema.ValidationError) as error:
            yield f"{wanted}: {plain.text!r}: {error}"
        if plain.finish_reason != "stop":
            yield f"{wanted}: ended by {plain.finish_reason}"
        if drafting.generate("Once", **values).token_ids != plain.token_ids:
            yield f"{wanted}: another answer with drafts"


@pytest.mark.parametrize("seed", range(6))
def test_json_validates_with_and_without_drafts(llm: LLM, drafting: LLM, seed: int) -> None:
    assert not [*wrong(llm, drafting, seed)]


@pytest.mark.slow
def test_json_of_a_thousand_schemas(llm: LLM, drafting: LLM) -> None:
    assert not [one for seed in range(1000) for one in wrong(llm, drafting, seed)]


def test_answers_are_alone_in_a_batch(folder: Path) -> None:
    llm = LLM(folder, context=256, max_batch=3)
    shapes = [
        {"json_schema": {"type": "array", "items": {"type": "boolean"}, "maxItems": 9}},
        {"regex": "(ab?)+c"},
        {"grammar": 'start: "x" | "(" start ")"'},
        {},
    ]
    values = {"temperature": 1.5, "seed": 4, "max_tokens": 40}
    alone = [llm.generate("Once", **shape, **values) for shape in shapes]
    streams = [llm.stream("Once", **shape, **values) for shape in shapes]
    for stream in streams:
        stream.start()
    assert [one.result().text for one in streams] == [one.text for one in alone]
    assert re.match("(ab?)+c?", alone[1].text)
    assert re.match(r"\(*x?\)*", alone[2].text)


def test_the_answer_is_the_model_s_own_within_the_grammar(llm: LLM) -> None:
    """Each token is the best of those allowed, by the model's own logits."""
    result = llm.generate("Once", regex="[a-z ]{30}", temperature=0.0)
    ids = [*llm.encode("Once"), *result.token_ids]
    logits = llm.logits(ids)
    table, at, text = llm.vocabulary.tokens, len(llm.encode("Once")), ""
    config = dataclasses.replace(llm.stream("a")._request.sampling, temperature=0.0)
    for token in result.token_ids:
        fits = [
            re.fullmatch("[a-z ]+", one.decode("latin-1")) is not None
            and len(text) + len(one) <= 30
            for one in table
        ]
        row = np.where(fits, logits[at - 1], -np.inf)
        assert sample(row, np.array(ids[:at]), config, np.random.default_rng(0)) == token
        text, at = text + table[token].decode(), at + 1
    assert text == result.text
    assert len(text) == 30


def test_control_tokens_stay_out(llm: LLM) -> None:
    """Not even the printing ones: a reader would take them for markers."""
    shown = llm.tokenizer.id_of("<think>")
    assert llm.engine.token_bytes[shown] == b"<think>"
    for seed in range(4):
        answer = llm.generate("a", regex="(.|\n){50,60}", temperature=3.0, seed=seed)
        assert not {*answer.token_ids} & {*llm.tokenizer.control_tokens.values()} - llm.stop_ids


@pytest.mark.parametrize("kind", [{"json_schema": {"const": 5}}, {"regex": "ab"}])
def test_the_end_needs_no_end_token(llm: LLM, kind: dict) -> None:
    answer = llm.generate("a", **kind)
    assert answer.finish_reason == "stop"
    assert not {*answer.token_ids} & llm.stop_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regex": "a", "grammar": "b"}, "regex and grammar"),
        ({"regex": ""}, "empty answer"),
        ({"json_schema": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"thinking_budget": 3}, "belong to a chat"),
        ({"jsonschema": {}}, "did you mean json_schema"),
        ({"temprature": 1}, "did you mean temperature"),
    ],
)
def test_wrong_shapes_are_refused_before_generation(llm: LLM, options, message: str) -> None:
    with pytest.raises(UserError, match=message):
        llm.generate("a", **options)
    assert llm.engine.idle


@pytest.mark.parametrize("budget", [0, 1, 7])
@pytest.mark.parametrize("drafted", [False, True])
def test_a_budget_closes_the_thought(llm: LLM, drafting: LLM, budget: int, drafted: bool) -> None:
    """The prompt opens the thought; a random model would never end it."""
    model = thinking(drafting if drafted else llm)
    values = {"temperature": 2.0, "seed": 3, "max_tokens": 40}
    answer = model.chat(CHAT, thinking_budget=budget, **values)
    close = chat.spell(model.tokenizer, "\n</think>\n\n")
    at = next(i for i in range(40) if [*answer.token_ids[i : i + len(close)]] == close)
    assert budget <= at <= budget + 3
    assert answer.usage.completion_tokens == len(answer.token_ids) == 40
    whole = model.tokenizer.decode(answer.token_ids, at_start=False)
    assert (answer.reasoning, answer.text) == chat.split_reasoning(whole, opened=True)
    plain = thinking(llm).chat(CHAT, thinking_budget=budget, **values)
    assert plain.token_ids == answer.token_ids
    pieces = [*model.stream(CHAT, thinking_budget=budget, **values)]
    assert "".join(one.reasoning for one in pieces) == answer.reasoning
    assert "".join(one.text for one in pieces) == answer.text


def thinking(llm: LLM) -> LLM:
    """The model with a template that opens a thought."""
    made = LLM.of(
        llm.engine.executor,
        llm.tokenizer.with_chat_template("{{ messages[0].content }}<think>\n"),
    )
    made.engine = llm.engine
    return made


def test_an_open_thought_is_no_answer(llm: LLM) -> None:
    answer = thinking(llm).chat(CHAT, max_tokens=12, temperature=1.0, seed=1)
    assert answer.finish_reason == "length"
    assert answer.text == ""
    assert answer.reasoning


def test_a_grammar_waits_for_the_thought(llm: LLM, drafting: LLM) -> None:
    wanted = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    for model in (thinking(llm), thinking(drafting)):
        answer = model.chat(CHAT, json_schema=wanted, thinking_budget=9, temperature=2.0, seed=2)
        assert answer.reasoning
        assert json.loads(answer.text)["ok"] in (True, False)
        assert not {*answer.token_ids} & llm.stop_ids
    plain = llm.chat(CHAT, json_schema=wanted, thinking_budget=5, think=True, seed=2)
    assert plain.reasoning, "asked to think, it begins with a thought"
    assert json.loads(plain.text)
    assert not llm.chat(CHAT, json_schema=wanted, think=False).reasoning


def test_tool_calls_are_told_apart(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is made to write a call, the way it would write a forced thought."""
    text = 'Look:\n<|tool_call_start|>\n```python\nnow(zone="x")\n```\n<|tool_call_end|>'
    ids = [*chat.spell(llm.tokenizer, text), llm.tokenizer.id_of("<|im_end|>")]
    turns = iter(ids)
    monkeypatch.setattr("endside.engine.choice.sample", lambda *_, **__: next(turns))
    answer = llm.chat(CHAT, tools=[{"name": "now", "parameters": {"properties": {"zone": {}}}}])
    assert answer.text == "Look:"
    assert answer.tool_calls == (ToolCall(answer.tool_calls[0].id, "now", '{"zone": "x"}'),)
    assert json.dumps(dataclasses.asdict(answer))


def test_markers_that_are_special_are_still_read(folder: Path) -> None:
    """In MiniCPM5 they are control tokens that decoding does not show."""
    tokenizer = Tokenizer.load(folder)
    spec = json.loads(json.dumps(tokenizer.spec))
    for one in spec["added_tokens"]:
        one["special"] = True
    hidden = dataclasses.replace(tokenizer, spec=spec)
    think = hidden.id_of("<think>")
    assert hidden.token_bytes()[think] == b""
    assert hidden.token_bytes(shown=chat.ANSWER_MARKS)[think] == b"<think>"
    assert hidden.token_bytes(shown=chat.ANSWER_MARKS)[hidden.id_of("<|im_end|>")] == b""


def test_spelling_continues_a_text(folder: Path, test_data: Path) -> None:
    for place in (folder, test_data / "minicpm4-8b"):
        tokenizer = Tokenizer.load(place)
        for text in ("\n</think>\n\n", "</think>", "think>\n\n", "\n\n", "<think>\n"):
            ids = chat.spell(tokenizer, text)
            table = tokenizer.token_bytes(shown=chat.ANSWER_MARKS)
            assert b"".join(table[one] for one in ids) == text.encode()
