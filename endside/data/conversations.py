"""Conversations from files, as token ids with the tokens that are to be learned.

A source is a .jsonl file or a folder of them; a line is one object:

    {"messages": [{"role": ..., "content": ..., "reasoning_content"?, "tool_calls"?}, ...],
     "tools"?: [...], "think"?: true | false}

Other keys are left alone. The one chat template code (`endside.chat`) writes ids and mask; here it
is only decided *how* a conversation is shown:

    think       with its thoughts, as `thoughts.share` of those that have any are shown
    no-think    without them, behind the closed think block that the prompt then ends in
    typed       the switch also stands at the end of the last user message (/think, /no_think)
    plain       as the template does by default: where no conversation has a thought

A conversation without a thought beside others that have one is shown as no-think, because in think
mode it would teach to skip the thought. Every choice is drawn from the conversation's own words and
the seed, so it does not depend on order or neighbours, and neither does the held-out split.

A template that rewrites earlier turns once a conversation goes on (most drop old thoughts) gives
one example per answer instead of one per conversation. What does not fit a row is counted, and
refused, dropped or cut, as `too_long` says.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from endside import chat
from endside.errors import UserError
from endside.tokenizer import Tokenizer

Mode = Literal["think", "no_think", "plain"]
SHAPE = '{"messages": [{"role": ..., "content": ...}, ...]}'


@dataclass(frozen=True)
class ThoughtConfig:
    """How conversations that have thoughts are shown."""

    share: float = 1.0  # of them that keep their thoughts; the others become no-think
    both: bool = False  # show each of them both ways instead
    typed: float = 0.0  # share of think and no-think examples whose switch is typed by the user

    def __post_init__(self) -> None:
        for name in ("share", "typed"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"thoughts.{name} is {getattr(self, name)}: use a share, 0 to 1")


@dataclass(frozen=True)
class ConversationConfig:
    """Which conversations."""

    sources: dict[str, float]  # .jsonl file or folder -> how often an epoch reads it; parts drawn
    heldout: tuple[str, ...] = ()  # files or folders to evaluate on; empty: `heldout_share`
    heldout_share: float = 0.02  # of the sources, chosen by content, never trained on
    too_long: Literal["refuse", "drop", "cut"] = "refuse"  # what does not fit a row

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError("data.sources is empty: name a .jsonl file or a folder, and its weight")
        for path, weight in self.sources.items():
            if not 0 < weight < float("inf"):
                raise UserError(f"data.sources.{path} is {weight}: a weight is a number above 0")
        if not 0 <= self.heldout_share < 1:
            raise UserError(
                f"data.heldout_share is {self.heldout_share}: use a share, 0 to below 1"
            )


@dataclass(frozen=True)
class Conversation:
    """One line of a source."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    think: bool | None
    place: str  # file:line
    source: int = 0  # number of the source

    def draw(self, purpose: str, seed: int) -> float:
        """A number in [0, 1) of these words, this purpose and this seed alone."""
        words = json.dumps([self.messages, self.tools, purpose, seed], sort_keys=True)
        return int.from_bytes(hashlib.sha256(words.encode()).digest()[:6], "big") / 2**48

    @property
    def thoughtful(self) -> bool:
        """Whether any answer has a thought."""
        return any(_thought(message)[0] for message in self.messages)


@dataclass(frozen=True)
class Example:
    """ids (n,) int32 and mask (n,) uint8: 1 on what the assistant has to write."""

    ids: np.ndarray
    mask: np.ndarray
    mode: Mode
    source: int

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class Examples:
    """What the sources gave, and the counts to report."""

    train: list[Example] = field(default_factory=list)
    heldout: list[Example] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def report(self) -> str:
        """One line of counts."""
        named = ", ".join(f"{count:,} {name}" for name, count in self.counts.items())
        targets = sum(int(example.mask.sum()) for example in self.train)
        return f"{named}; {targets:,} of {sum(map(len, self.train)):,} tokens are learned"


def read(path: str | Path, source: int = 0) -> Iterator[Conversation]:
    """The conversations of a file or folder. Raises UserError with file and line."""
    place = Path(path)
    files = sorted(place.rglob("*.jsonl")) if place.is_dir() else [place]
    found = 0
    for file in files:
        for conversation in _lines(file, source):
            found += 1
            yield conversation
    if not found:
        raise UserError(f"{path} holds no conversation: give .jsonl lines of the form {SHAPE}")


def _lines(file: Path, source: int) -> Iterator[Conversation]:
    try:
        with open(file, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _parse(line, f"{file}:{number}", source)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}; give a .jsonl file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 ({error}): convert it") from error


def _parse(line: str, place: str, source: int) -> Conversation:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place} is no JSON ({error}): correct the line or remove it") from error
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
        raise UserError(f"{place} has no list of messages: write {SHAPE}")
    tools, think = record.get("tools"), record.get("think")
    if tools is not None and not isinstance(tools, list):
        raise UserError(f"{place}: tools is no list: give a list of functions, or leave it out")
    if think is not None and not isinstance(think, bool):
        raise UserError(f"{place}: think is {think!r}: use true or false, or leave it out")
    return Conversation(messages, tools or None, think, place, source)


def gather(
    config: ConversationConfig,
    thoughts: ThoughtConfig,
    tokenizer: Tokenizer,
    *,
    longest: int,
    seed: int,
) -> Examples:
    """Every source rendered; longest: tokens an example may have."""
    if not chat.can_chat(tokenizer):
        raise UserError(
            "the model has no chat template, and its vocabulary lacks the turn tokens "
            f"{' and '.join(chat.TURN)} that ours needs: start from another model"
        )
    train = [one for at, path in enumerate(config.sources) for one in read(path, at)]
    apart = [one for path in config.heldout for one in read(path)]
    if not apart:
        cut = config.heldout_share
        apart = [one for one in train if one.draw("heldout", 0) < cut]
        train = [one for one in train if one.draw("heldout", 0) >= cut]
    made = Examples(counts=Counter({"conversations": len(train), "held out": len(apart)}))
    mixed = any(one.thoughtful for one in train)
    for side, conversations in ((made.train, train), (made.heldout, apart)):
        for one in conversations:
            shown = ways(one, thoughts, mixed=mixed, seed=seed)
            side.extend(_examples(one, shown, tokenizer, made.counts))
    made.train = _fitting(made.train, config, longest, made.counts)
    made.heldout = [one for one in made.heldout if len(one) <= longest]
    if not made.train:
        raise UserError("no conversation is left to train on: see the counts, or lengthen seq_len")
    return made


def ways(
    conversation: Conversation, thoughts: ThoughtConfig, *, mixed: bool, seed: int
) -> list[tuple[Mode, bool]]:
    """How a conversation is shown: its modes, each with whether the user types the switch.

    mixed: whether some conversation of the run has thoughts.
    """
    modes: list[Mode]
    if conversation.think is not None:
        modes = ["think" if conversation.think else "no_think"]
    elif not conversation.thoughtful:
        modes = ["no_think" if mixed else "plain"]
    elif thoughts.both:
        modes = ["think", "no_think"]
    else:
        modes = ["think" if conversation.draw("share", seed) < thoughts.share else "no_think"]
    return [
        (mode, mode != "plain" and conversation.draw(f"typed {mode}", seed) < thoughts.typed)
        for mode in modes
    ]


def _examples(
    conversation: Conversation,
    shown: Iterable[tuple[Mode, bool]],
    tokenizer: Tokenizer,
    counts: Counter[str],
) -> Iterator[Example]:
    for mode, typed in shown:
        counts[f"{mode} examples"] += 1
        try:
            parts = render(conversation, tokenizer, mode, typed=typed)
        except UserError as error:
            raise UserError(f"{conversation.place}: {error}") from error
        if len(parts) > 1:
            counts["split by answer"] += 1
        for ids, mask in parts:
            arrays = np.array(ids, np.int32), np.array(mask, np.uint8)
            yield Example(*arrays, mode, conversation.source)


def render(
    conversation: Conversation, tokenizer: Tokenizer, mode: Mode, *, typed: bool
) -> list[tuple[list[int], list[int]]]:
    """Ids and masks: one pair, or one per answer where the template rewrites earlier turns."""
    messages = [_shown(message, mode, tokenizer) for message in conversation.messages]
    if typed:
        messages = _type(messages, "/think" if mode == "think" else "/no_think")
    think = None if mode == "plain" or not chat.can_think(tokenizer) else mode == "think"
    options = {"tools": conversation.tools, "think": think}
    try:
        return [chat.render_for_training(tokenizer, messages, **options)]
    except chat.RewrittenError:
        answers = [at for at, one in enumerate(messages) if one["role"] == "assistant"]
        return [
            chat.render_for_training(tokenizer, messages[: at + 1], only_last=True, **options)
            for at in answers
        ]


def _shown(message: dict[str, Any], mode: Mode, tokenizer: Tokenizer) -> dict[str, Any]:
    """The message with its thought where the template looks for it, or without one."""
    thought, answer = _thought(message)
    if not thought:
        return message
    rest = {name: value for name, value in message.items() if name != "reasoning_content"}
    if mode == "no_think":
        return {**rest, "content": answer}
    if "reasoning_content" in (tokenizer.chat_template or "reasoning_content"):
        return {**rest, "content": answer, "reasoning_content": thought}
    return {**rest, "content": f"<think>\n{thought}\n</think>\n{answer}"}


def _thought(message: Mapping[str, Any]) -> tuple[str, Any]:
    """(thought, rest of the content) of an answer; the thought is "" where there is none."""
    content, apart = message.get("content"), message.get("reasoning_content")
    if message.get("role") != "assistant":
        return "", content
    if isinstance(apart, str) and apart.strip():
        return apart.strip(), content if content is not None else ""
    if isinstance(content, str):
        return chat.split_reasoning(content)
    return "", content


def _type(messages: list[dict[str, Any]], switch: str) -> list[dict[str, Any]]:
    """The messages with a switch at the end of the last user's."""
    users = [at for at, one in enumerate(messages) if one.get("role") == "user"]
    if not users or not isinstance(messages[users[-1]].get("content"), str):
        return messages
    last = messages[users[-1]]
    typed = {**last, "content": f"{last['content'].rstrip()} {switch}"}
    return [*messages[: users[-1]], typed, *messages[users[-1] + 1 :]]


def _fitting(
    examples: list[Example], config: ConversationConfig, longest: int, counts: Counter[str]
) -> list[Example]:
    """Those that fit a row, and what `too_long` makes of the others."""
    long = [one for one in examples if len(one) > longest]
    if long and config.too_long == "refuse":
        raise UserError(
            f"{len(long):,} of {len(examples):,} examples have more than {longest:,} tokens (the "
            f"longest {max(map(len, long)):,}): lengthen seq_len, or say data.too_long = "
            '"drop" or "cut"'
        )
    kept = [one for one in examples if len(one) <= longest]
    if config.too_long == "cut":
        cut = [Example(one.ids[:longest], one.mask[:longest], one.mode, one.source) for one in long]
        kept += [one for one in cut if one.mask.any()]
        counts["cut to fit"] += sum(bool(one.mask.any()) for one in cut)
    if dropped := len(examples) - len(kept):
        counts["dropped as too long"] += dropped
    return kept
