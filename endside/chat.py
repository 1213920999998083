"""A conversation as token ids, and as (ids, loss mask) for training: the only chat template code.

The template is the checkpoint's own jinja text, else `CHATML`. It writes one text; control tokens
are the ones it wrote itself, the runs between them are encoded whole, so harmless conversations get
the ids of the published encoder on the rendered text. BOS follows by the tokenizer's rule: added
unless the text starts with it (MiniCPM4's template does not write it, MiniCPM5's does).

What people write is not trusted (`endside.untrusted`). An assistant's content may hold the markers
that a model writes itself (`<think>`, tool calls), never those that end or start a turn.
`control=True` trusts everything.

Thinking (`think`): None leaves the template's default, or follows a last user message that ends in
/think or /no_think. True and False are given to the template as `enable_thinking`; if it has no
such switch, False closes an empty think block at the end of the generation prompt. For a model that
cannot think at all False is already so, and True is refused.

Training renders prefixes: a turn's loss covers what follows its generation prompt, up to and with
the token that ends it. A template that rewrites earlier turns (drops their reasoning) is refused
there, because the ids would not be those of any prompt.

Not here: images and audio, and reading tool calls out of answers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, TypedDict

from endside.chatml import CHATML, run
from endside.errors import UserError
from endside.untrusted import Cover, characters, walk

if TYPE_CHECKING:
    from endside.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "tool")
TURN = ("<|im_start|>", "<|im_end|>")
EMPTY_THOUGHT = "<think>\n\n</think>\n"
OPENERS = {"<think>": "</think>", "<|thought_start|>": "<|thought_end|>"}
LEAD = "\n\u4e00"  # no vocabulary joins these to what follows
# what a model writes inside an answer; in an assistant's content these stay control tokens
ANSWER_MARKS = frozenset(
    [
        *OPENERS, *OPENERS.values(), "<tool_call>", "</tool_call>", "<|tool_call|>", "<param",
        "</param>", "<|tool_call_start|>", "<|tool_call_end|>", "<function", "</function>",
    ]
)  # fmt: skip


class Message(TypedDict, total=False):
    """One turn, as OpenAI-compatible clients write it."""

    role: str  # one of ROLES
    content: str | list[dict[str, Any]] | None  # a text, or parts {"type": "text", "text": ...}
    reasoning_content: str | None
    tool_calls: list[dict[str, Any]] | None
    tool_call_id: str
    name: str


Tools = Sequence[dict[str, Any]]


class RewrittenError(UserError):
    """The template writes an earlier turn differently once the conversation goes on."""


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Tools | None = None,
    think: bool | None = None,
    add_generation_prompt: bool = True,
    control: bool = False,
) -> list[int]:
    """Token ids of a conversation, ready for the model to answer.

    control: names of control tokens in the messages become these tokens.
    """
    chat = _Chat.of(tokenizer, messages, tools=tools, think=think, control=control)
    text = chat.text(len(messages), prompt=add_generation_prompt)
    return chat.encode(text)[0]


def render_text(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Tools | None = None,
    think: bool | None = None,
    add_generation_prompt: bool = True,
) -> str:
    """What `render` encodes, to look at; which names are control tokens cannot be seen in it."""
    chat = _Chat.of(tokenizer, messages, tools=tools, think=think, control=False)
    return chat.restore(chat.text(len(messages), prompt=add_generation_prompt))


def render_for_training(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Tools | None = None,
    think: bool | None = None,
    only_last: bool = False,
) -> tuple[list[int], list[int]]:
    """Token ids and loss mask: 1 on what the assistant has to write, its end token included.

    only_last: of the last turn alone; the earlier ones may then be written differently here than
    when they were answered, as they are when a model answers. Else that is a RewrittenError.
    """
    chat = _Chat.of(tokenizer, messages, tools=tools, think=think, control=False)
    full = chat.text(len(messages), prompt=False)
    spans: list[tuple[int, int]] = []
    for turn, message in enumerate(messages):
        last = turn == len(messages) - 1
        if message["role"] != "assistant" or (only_last and not last):
            continue
        full, start = chat.after_prompt(turn, full)
        done = full if last else chat.text(turn + 1, prompt=False)
        end = len(done.rstrip())
        if not full.startswith(done[:end]) or end <= start:
            _unstable(turn)
        spans.append((start, end))
    if not spans:
        raise UserError("the conversation has no assistant turn: there is nothing to learn from it")
    return chat.encode(full, spans)


def can_chat(tokenizer: Tokenizer) -> bool:
    """Whether there is a template to chat in: the checkpoint's, or the tokens that CHATML needs."""
    return tokenizer.chat_template is not None or tokenizer.control_tokens.keys() >= set(TURN)


def split_reasoning(text: str, *, opened: bool = False) -> tuple[str, str]:
    """(reasoning, answer) of a whole answer; reasoning is "" if it does not begin with any.

    opened: the prompt ended inside a think block (`opens_reasoning`), so the text starts in it.
    An unfinished block is all reasoning.
    """
    head = text.lstrip()
    opener = next((one for one in OPENERS if head.startswith(one)), "<think>" if opened else None)
    if opener is None:
        return "", text
    reasoning, _, answer = head.removeprefix(opener).partition(OPENERS[opener])
    return reasoning.strip(), answer.lstrip("\n")


def opens_reasoning(tokenizer: Tokenizer, ids: Sequence[int]) -> bool:
    """Whether a rendered prompt ends inside a think block that it opened."""
    tail = tokenizer.decode(ids[-16:], skip_special=False).rstrip()
    return tail.endswith(tuple(OPENERS))


def spell(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids that continue an answer with a text; markers in it are control tokens where there are.

    As a model writes it: without the space that some vocabularies put before a text.
    """
    ids: list[int] = []
    for part, token in tokenizer.split(text):
        if token is not None:
            ids.append(token)
            continue
        before = tokenizer.encode_run(LEAD, first=False)[0]
        both = tokenizer.encode_run(LEAD + part, first=False)[0]
        alone = both[: len(before)] == before
        ids += both[len(before) :] if alone else tokenizer.encode_run(part, first=False)[0]
    return ids


@dataclass(frozen=True)
class _Chat:
    """A conversation made safe, with the template that will write it."""

    tokenizer: Tokenizer
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    source: str
    switch: dict[str, bool]  # enable_thinking, where the template knows it
    close_thought: bool  # whether to close an empty think block after the generation prompt
    hidden: dict[int, str]  # private character -> what it stands for

    @classmethod
    def of(
        cls,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Tools | None,
        think: bool | None,
        control: bool,
    ) -> _Chat:
        if not messages:
            raise UserError("the conversation is empty: give at least one message")
        plain = [_check(at, message) for at, message in enumerate(messages)]
        source = _template(tokenizer, plain, tools)
        think = _think(tokenizer, plain, think)
        knows = "enable_thinking" in source
        listed = list(tools) if tools else None
        hidden: dict[int, str] = {}
        if not control:
            cover = Cover(tokenizer.control_tokens, characters([plain, listed, source]))
            last = _last_query(plain)
            plain = [
                _hide_message(message, cover, switch=at == last) for at, message in enumerate(plain)
            ]
            listed = walk(listed, cover.hide)
            hidden = cover.literals
        return cls(
            tokenizer,
            plain,
            listed,
            source,
            switch={"enable_thinking": think} if knows and think is not None else {},
            close_thought=think is False and not knows,
            hidden=hidden,
        )

    def text(self, turns: int, *, prompt: bool) -> str:
        """The first turns as the template writes them, private characters still in."""
        text = run(
            self.source,
            messages=self.messages[:turns],
            tools=self.tools,
            documents=None,
            add_generation_prompt=prompt,
            **self.tokenizer.names,
            **self.switch,
        )
        if prompt and self.close_thought:
            opened = text.rstrip().endswith("<think>")
            text = (
                text.rstrip() + EMPTY_THOUGHT.removeprefix("<think>")
                if opened
                else (text + EMPTY_THOUGHT)
            )
        return text

    def after_prompt(self, turn: int, full: str) -> tuple[str, int]:
        """Where the answer of an assistant turn starts in the full text, and that text.

        The last turn may miss the empty think block which the generation prompt has; it is put in.
        """
        prompt = self.text(turn, prompt=True)
        if full.startswith(prompt):
            return full, len(prompt)
        before = self.text(turn, prompt=False)
        shared = _shared(prompt, full)
        block = prompt[shared:]
        last = turn == len(self.messages) - 1
        if last and shared > len(before) and block.strip() == EMPTY_THOUGHT.strip():
            return full[:shared] + block + full[shared:], len(prompt)
        _unstable(turn)

    def restore(self, text: str) -> str:
        return text.translate(self.hidden)

    def encode(
        self, text: str, spans: Sequence[tuple[int, int]] = ()
    ) -> tuple[list[int], list[int]]:
        """Ids of a rendered text, and 1 for those that start inside a span of it."""
        ids: list[int] = []
        mask: list[int] = []
        at = 0
        for part, token in self.tokenizer.split(text):
            if token is None:
                made, starts = self.tokenizer.encode_run(self.restore(part), first=not ids)
            else:
                made, starts = [token], [0]
            ids += made
            inside = [(low - at, high - at) for low, high in spans if low < at + len(part)]
            shifted = [
                (len(self.restore(part[: max(low, 0)])), len(self.restore(part[: max(high, 0)])))
                for low, high in inside
            ]
            mask += [int(any(low <= one < high for low, high in shifted)) for one in starts]
            at += len(part)
        whole = self.tokenizer.with_bos(ids)
        return whole, [0] * (len(whole) - len(ids)) + mask


def _check(at: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with its content as one text and arguments as objects; refuses what is wrong."""
    if not isinstance(message, Mapping):
        raise UserError(f"message {at} is no object: give {{'role': ..., 'content': ...}}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise UserError(f"message {at} has role {role!r}: use one of {', '.join(ROLES)}")
    if content is None and not (
        role == "assistant" and (message.get("tool_calls") or message.get("reasoning_content"))
    ):
        raise UserError(f"message {at} ({role}) has no content: give a text")
    checked = {**message, "content": _join(at, content)}
    if not isinstance(message.get("reasoning_content", ""), str | None):
        raise UserError(f"message {at} has a reasoning_content that is no text: give a text")
    if message.get("tool_calls"):
        checked["tool_calls"] = [_check_call(at, call) for call in message["tool_calls"]]
    return checked


def _join(at: int, content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, list) else [None]
    if not all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in parts
    ):
        raise UserError(f"message {at} has a content that is no text: only text parts are read")
    return "".join(part["text"] for part in parts)


def _check_call(at: int, call: Any) -> dict[str, Any]:
    """Arguments come as JSON text from the API; templates want the object."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(f"message {at} has a tool call without a function name: give one")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except json.JSONDecodeError as error:
            raise UserError(
                f"message {at}: the arguments of {function['name']} are no JSON ({error})"
            ) from error
    if not isinstance(arguments, dict | None):
        raise UserError(f"message {at}: the arguments of {function['name']} are no JSON object")
    made = {**function, "arguments": arguments or {}}
    return {**call, "function": made} if "function" in call else made


def _template(tokenizer: Tokenizer, messages: list[dict[str, Any]], tools: Tools | None) -> str:
    """The checkpoint's template, or ours where there is none or it would leave the tools out."""
    source = tokenizer.tool_template if tools else None
    source = source or tokenizer.chat_template
    calls = any(message.get("tool_calls") for message in messages)
    if source and (not tools or "tools" in source) and (not calls or "tool_calls" in source):
        return source
    if not tokenizer.control_tokens.keys() >= set(TURN):
        what = "ignores tools" if source else "is missing"
        raise UserError(
            f"the chat template {what} and the vocabulary has no {TURN[0]} and {TURN[1]} for ours: "
            "use a chat model, or continue plain text with generate"
        )
    return CHATML


def can_think(tokenizer: Tokenizer) -> bool:
    """Whether the template or the vocabulary knows of thoughts; true where our template is used."""
    source = tokenizer.chat_template
    return (
        source is None
        or any(mark in source for mark in ("enable_thinking", *OPENERS, *OPENERS.values()))
        or tokenizer.id_of("<think>") is not None
    )


def _think(tokenizer: Tokenizer, messages: list[dict[str, Any]], think: bool | None) -> bool | None:
    """The thinking switch: the caller's, else the one at the end of the last user message."""
    if not can_think(tokenizer):
        if think:
            raise UserError("this model has no thinking mode: leave think out")
        return None
    last = _last_query(messages)
    if think is None and last is not None:
        found = _typed_switch(messages[last]["content"])
        return None if found is None else found[1] == "/think"
    return think


def _last_query(messages: list[dict[str, Any]]) -> int | None:
    return next(
        (at for at in reversed(range(len(messages))) if messages[at]["role"] == "user"), None
    )


def _typed_switch(content: str) -> re.Match[str] | None:
    return re.search(r"(?<!\S)(/think|/no_think)\s*\Z", content)


def _hide_message(message: dict[str, Any], cover: Cover, *, switch: bool) -> dict[str, Any]:
    """The message with untrusted names covered. switch: a final /think may be a control token."""
    content = message["content"]
    keep = ANSWER_MARKS if message["role"] == "assistant" else frozenset()
    typed = _typed_switch(content) if switch else None
    cut = typed.start() if typed else len(content)
    covered = cover.hide(content[:cut], keep=keep) + content[cut:]
    rest = {name: value for name, value in message.items() if name not in ("role", "content")}
    return {"role": message["role"], "content": covered, **walk(rest, cover.hide)}


def _shared(left: str, right: str) -> int:
    """Length of the common beginning."""
    pairs: Iterator[tuple[str, str]] = zip(left, right, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


def _unstable(turn: int) -> NoReturn:
    raise RewrittenError(
        f"the chat template writes message {turn} differently once the conversation goes on, so no "
        "training text has the ids of its prompt: end the sample there, or give reasoning_content "
        "or think=False as the template expects"
    )
