"""Lines of files to examples: modes, splits, tools, and every way a file can be wrong."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from endside.chatml import CHATML
from endside.data.conversation_rows import ConversationRows, best_fit, stack
from endside.data.conversations import (
    Conversation,
    ConversationConfig,
    Example,
    ThoughtConfig,
    gather,
    read,
    render,
    ways,
)
from endside.dist import World
from endside.errors import UserError
from endside.tokenizer import Tokenizer, train_bpe

# A template as newer models have it: it drops the thoughts of answers that were followed.
FORGETFUL = """{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.role == 'assistant' and loop.last and message.reasoning_content %}<think>
{{ message.reasoning_content }}
</think>
{% endif %}{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>
{% endif %}{% endif %}"""
PLAIN = """{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
THOUGHTFUL = [
    {"role": "user", "content": "two and two"},
    {"role": "assistant", "content": "four", "reasoning_content": "one more than three"},
    {"role": "user", "content": "and one"},
    {"role": "assistant", "content": "five", "reasoning_content": "the next one"},
]
PAIR = [{"role": "user", "content": "say one"}, {"role": "assistant", "content": "one"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Sum.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
CALLS = [
    {"role": "user", "content": "add one"},
    {"role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]},
    {"role": "tool", "content": "result two"},
    {"role": "assistant", "content": "two"},
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    texts = ["two and two is four, one more than three is the next one, say add result five"] * 30
    return train_bpe(iter(texts), 320).with_chat_template(CHATML)


def talk(messages: list[dict[str, Any]], **changes: Any) -> Conversation:
    return Conversation(messages, changes.get("tools"), changes.get("think"), "here:1")


def learned(tokenizer: Tokenizer, ids: list[int], mask: list[int]) -> str:
    return tokenizer.decode([i for i, m in zip(ids, mask) if m], skip_special=False)


def write(folder: Path, lines: list[Any], name: str = "a.jsonl") -> Path:
    path = folder / name
    path.write_text(
        "".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines)
    )
    return path


def test_with_and_without_thought(tokenizer: Tokenizer) -> None:
    ((ids, mask),) = render(talk(THOUGHTFUL), tokenizer, "think", typed=False)
    assert learned(tokenizer, ids, mask) == (
        "<think>\none more than three\n</think>\nfour<|im_end|>"
        "<think>\nthe next one\n</think>\nfive<|im_end|>"
    )
    ((ids, mask),) = render(talk(THOUGHTFUL), tokenizer, "no_think", typed=False)
    assert learned(tokenizer, ids, mask) == "four<|im_end|>five<|im_end|>"
    assert tokenizer.decode(ids, skip_special=False).count("<think>\n\n</think>\n") == 2


@pytest.mark.parametrize(("mode", "switch"), [("think", "/think"), ("no_think", "/no_think")])
def test_a_typed_switch_stands_where_a_user_types_it(
    tokenizer: Tokenizer, mode: Any, switch: str
) -> None:
    ((ids, mask),) = render(talk(THOUGHTFUL), tokenizer, mode, typed=True)
    ((plain, plain_mask),) = render(talk(THOUGHTFUL), tokenizer, mode, typed=False)
    text = tokenizer.decode(ids, skip_special=False)
    assert text.count(f" {switch}") == 1
    assert f"and one {switch}<|im_end|>" in text
    assert learned(tokenizer, ids, mask) == learned(tokenizer, plain, plain_mask)


def test_a_thought_inside_the_content_is_one_too(tokenizer: Tokenizer) -> None:
    inside = [PAIR[0], {"role": "assistant", "content": "<think>\nthe next one\n</think>\none"}]
    apart = [PAIR[0], {"role": "assistant", "content": "one", "reasoning_content": "the next one"}]
    assert talk(inside).thoughtful
    for mode in ("think", "no_think"):
        one, other = (render(talk(m), tokenizer, mode, typed=False) for m in (inside, apart))
        assert one == other


def test_a_template_that_knows_no_thoughts_gets_them_as_text(tokenizer: Tokenizer) -> None:
    plain = tokenizer.with_chat_template(PLAIN)
    ((ids, mask),) = render(talk(THOUGHTFUL[:2]), plain, "think", typed=False)
    assert learned(plain, ids, mask) == "<think>\none more than three\n</think>\nfour<|im_end|>"


def test_tool_calls_are_learned_and_results_are_not(tokenizer: Tokenizer) -> None:
    ((ids, mask),) = render(talk(CALLS, tools=[TOOL]), tokenizer, "plain", typed=False)
    assert learned(tokenizer, ids, mask) == (
        "<|tool_call_start|>\n```python\nadd(a=1)\n```\n<|tool_call_end|>\n<|im_end|>two<|im_end|>"
    )
    assert "result two" in tokenizer.decode(ids)


def test_a_template_that_rewrites_gives_one_example_an_answer(tokenizer: Tokenizer) -> None:
    forgetful = tokenizer.with_chat_template(FORGETFUL)
    parts = render(talk(THOUGHTFUL), forgetful, "think", typed=False)
    assert [learned(forgetful, *part) for part in parts] == [
        "<think>\none more than three\n</think>\nfour<|im_end|>",
        "<think>\nthe next one\n</think>\nfive<|im_end|>",
    ]
    assert "one more" not in forgetful.decode(parts[1][0])
    assert len(render(talk(THOUGHTFUL[:2]), forgetful, "think", typed=False)) == 1


def test_shares_are_drawn_from_the_words() -> None:
    asked = ThoughtConfig(share=0.3, typed=0.5)
    talks = [
        talk([{"role": "user", "content": str(i)}, THOUGHTFUL[1]], think=None) for i in range(2000)
    ]
    drawn = [ways(one, asked, mixed=True, seed=1)[0] for one in talks]
    modes = Counter(mode for mode, _ in drawn)
    assert modes["think"] / 2000 == pytest.approx(0.3, abs=0.04)
    assert sum(typed for _, typed in drawn) / 2000 == pytest.approx(0.5, abs=0.04)
    assert drawn == [ways(one, asked, mixed=True, seed=1)[0] for one in talks]
    assert drawn != [ways(one, asked, mixed=True, seed=2)[0] for one in talks]


def test_both_ways_and_what_a_line_says_itself() -> None:
    asked = ThoughtConfig(share=0.0, both=True)
    assert ways(talk(THOUGHTFUL), asked, mixed=True, seed=0) == [
        ("think", False), ("no_think", False)]  # fmt: skip
    assert ways(talk(THOUGHTFUL, think=True), asked, mixed=True, seed=0) == [("think", False)]
    assert ways(talk(PAIR), asked, mixed=True, seed=0) == [("no_think", False)]
    assert ways(talk(PAIR), asked, mixed=False, seed=0) == [("plain", False)]


def test_gather_splits_by_content_and_counts(tokenizer: Tokenizer, tmp_path: Path) -> None:
    lines = [{"messages": [{"role": "user", "content": f"n {i}"}, PAIR[1]]} for i in range(200)]
    path = write(tmp_path, [*lines, *lines])
    config = ConversationConfig({str(tmp_path): 1.0}, heldout_share=0.2)
    made = gather(config, ThoughtConfig(), tokenizer, longest=60, seed=0)
    assert made.counts["conversations"] + made.counts["held out"] == 400
    assert 40 < made.counts["held out"] < 120
    train = {one.ids.tobytes() for one in made.train}
    assert not train & {one.ids.tobytes() for one in made.heldout}
    assert f"{len(made.train)} conversations" in made.report()
    apart = replace(config, heldout=(str(path),))
    assert len(gather(apart, ThoughtConfig(), tokenizer, longest=60, seed=0).train) == 400


@pytest.mark.parametrize("what", ["refuse", "drop", "cut"])
def test_what_is_too_long_is_never_silent(tokenizer: Tokenizer, tmp_path: Path, what: Any) -> None:
    long = [PAIR[0], {"role": "assistant", "content": "one two " * 20}]
    endless = [{"role": "user", "content": "one two " * 40}, PAIR[1]]
    write(tmp_path, [{"messages": one} for one in (PAIR, long, endless)])
    config = ConversationConfig({str(tmp_path): 1.0}, heldout_share=0.0, too_long=what)
    if what == "refuse":
        with pytest.raises(UserError, match=r"2 of 3 examples have more than 30 tokens \(the long"):
            gather(config, ThoughtConfig(), tokenizer, longest=30, seed=0)
        return
    made = gather(config, ThoughtConfig(), tokenizer, longest=30, seed=0)
    assert [len(one) for one in made.train[1:]] == ([30] if what == "cut" else [])
    assert made.counts["dropped as too long"] == (1 if what == "cut" else 2)
    assert "dropped as too long" in made.report()
    with pytest.raises(UserError, match="no conversation is left"):
        gather(replace(config, too_long="drop"), ThoughtConfig(), tokenizer, longest=3, seed=0)


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("{not json", r"a\.jsonl:2 is no JSON .*: correct the line or remove it"),
        ("[]", r"a\.jsonl:2 has no list of messages: write"),
        ({"text": "x"}, r"a\.jsonl:2 has no list of messages"),
        ({"messages": ["x"]}, r"a\.jsonl:2 has no list of messages"),
        ({"messages": PAIR, "tools": "x"}, r"a\.jsonl:2: tools is no list"),
        ({"messages": PAIR, "think": "yes"}, r"a\.jsonl:2: think is 'yes'"),
        ({"messages": [{"role": "bot", "content": "x"}]},
         r"a\.jsonl:2: message 0 has role 'bot': use one of system, user"),
        ({"messages": PAIR[:1]}, r"a\.jsonl:2: the conversation has no assistant turn"),
        ({"messages": []}, r"a\.jsonl:2: the conversation is empty"),
        ({"messages": [PAIR[0], {"role": "assistant"}]}, r"a\.jsonl:2: message 1 .* no content"),
    ],
)  # fmt: skip
def test_bad_lines_are_named(tokenizer: Tokenizer, tmp_path: Path, line: Any, part: str) -> None:
    write(tmp_path, [{"messages": PAIR}, line])
    config = ConversationConfig({str(tmp_path): 1.0}, heldout_share=0.0)
    with pytest.raises(UserError, match=part):
        gather(config, ThoughtConfig(), tokenizer, longest=90, seed=0)


def test_bad_sources(tmp_path: Path) -> None:
    write(tmp_path, ["", "  "])
    with pytest.raises(UserError, match=r"holds no conversation: give \.jsonl lines"):
        list(read(tmp_path / "a.jsonl"))
    with pytest.raises(UserError, match=r"cannot read .*b\.jsonl: No such file"):
        list(read(tmp_path / "b.jsonl"))
    (tmp_path / "a.jsonl").write_bytes(b'{"messages": "\xff"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl is not UTF-8"):
        list(read(tmp_path))
    for sources in ({}, {"x": 0.0}, {"x": -1.0}):
        with pytest.raises(UserError, match=r"data\.sources"):
            ConversationConfig(sources)
    with pytest.raises(UserError, match=r"thoughts\.share is 2"):
        ThoughtConfig(share=2)


def test_a_model_without_template_or_turns_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    spec = json.loads(json.dumps(tokenizer.spec).replace("im_start", "other"))
    bare = replace(tokenizer, spec=spec, chat_template=None)
    write(tmp_path, [{"messages": PAIR}])
    with pytest.raises(UserError, match="the model has no chat template, and its vocabulary lacks"):
        gather(ConversationConfig({str(tmp_path): 1.0}), ThoughtConfig(), bare, longest=9, seed=0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=60))
def test_best_fit_holds_all_and_wastes_little(lengths: list[int]) -> None:
    rows = best_fit(lengths, 20)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    sums = [sum(lengths[item] for item in row) for row in rows]
    assert all(total <= 20 for total in sums)
    # Two rows could never be one: no item fits where a row was opened for it.
    assert len(rows) <= 1.7 * -(-sum(lengths) // 20) + 1


def test_best_fit_is_the_textbook_one() -> None:
    assert best_fit([5, 7, 5, 2, 4, 2, 5, 1], 10) == [[1, 3, 7], [0, 2], [6, 4], [5]]


def example(tokens: list[int], source: int = 0) -> Example:
    mask = [0, *[1] * (len(tokens) - 1)]
    return Example(np.array(tokens, np.int32), np.array(mask, np.uint8), "plain", source)


def test_a_row_keeps_its_examples_apart() -> None:
    batch = stack([[example([5, 6, 7]), example([8, 9])]], 6, filler=1)
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9, 1, 1]]
    assert batch.documents.tolist() == [[0, 0, 0, 1, 1, -1, -1]]
    assert batch.mask.int().tolist() == [[0, 1, 1, 0, 1, 0, 0]]


def loader(**changes: Any) -> ConversationRows:
    examples = [example([i, i + 1, i + 2][: 2 + i % 2], i % 2) for i in range(20)]
    return ConversationRows(examples, **{"batch": 2, "seq_len": 7, "weights": (1, 1), **changes})


def test_an_epoch_reads_each_example_as_often_as_its_weight_says() -> None:
    rows = loader(weights=(2.0, 0.5), batch=1)
    seen = Counter(item for row in rows._rows for item in row)
    assert all(seen[item] == 2 for item in range(0, 20, 2))
    assert 0 < sum(seen[item] for item in range(1, 20, 2)) < 10
    other = Counter(item for row in rows._draw(1) for item in row)
    assert other != seen
    assert rows._draw(0) == rows._rows


def test_the_cursor_goes_on_where_it_stood() -> None:
    whole, torn = loader(), loader()
    for _ in range(9):
        next(whole)
        next(torn)
    state = json.loads(json.dumps(torn.state()))
    assert state["epoch"] > 0
    again = loader()
    again.restore(state)
    for _ in range(9):
        one, other = next(whole), next(again)
        assert one.tokens.tolist() == other.tokens.tolist()
    for changes in ({"seed": 1}, {"seq_len": 8}, {"weights": (1, 2)}):
        assert not loader(**changes).fits(state)
        with pytest.raises(UserError, match="the checkpoint read data with"):
            loader(**changes).restore(state)


def test_processes_share_the_rows() -> None:
    alone = loader(batch=4)
    team = [loader(world=World(rank, 2)) for rank in range(2)]
    for _ in range(5):
        parts = [next(one).tokens.tolist() for one in team]
        assert next(alone).tokens.tolist() == parts[0] + parts[1]
