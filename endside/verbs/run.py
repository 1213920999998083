"""`endside run MODEL [PROMPT]`: one answer, or a chat when there is no prompt.

A model with a chat template answers a conversation; one without continues the text (`--raw` asks
for that anyway). Text goes to stdout as it is written, everything else to stderr. In a chat, Ctrl-C
stops the answer and not the program; Ctrl-D or /exit leaves.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from endside.engine.executors import Plan
from endside.engine.request import SamplingConfig
from endside.errors import UserError
from endside.verbs import lazily, parse

if TYPE_CHECKING:
    import tyro

    from endside.api import LLM, Generation, Stream
else:
    tyro = lazily("tyro")


@dataclass(frozen=True)
class Run:
    """Generate, or chat interactively without a prompt."""

    model: tyro.conf.Positional[str]
    """Local folder or hub name."""
    prompt: tyro.conf.Positional[str | None] = None
    """Text to answer or continue; without it, what is piped in, else a chat."""
    file: Path | None = None
    """Read the prompt from this file."""
    system: str | None = None
    """System message of the conversation."""
    think: bool = False
    """Let a reasoning model think before it answers."""
    no_think: bool = False
    """Let it answer at once."""
    raw: bool = False
    """Continue the text, also where the model has a chat template."""
    control: bool = False
    """Read control strings such as <|im_end|> in the prompt as control tokens."""
    stats: bool = False
    """Print speed and memory to stderr at the end."""
    json: bool = False
    """Print one JSON object instead of the text."""
    sampling: Annotated[SamplingConfig, tyro.conf.arg(name="")] = field(
        default_factory=SamplingConfig
    )
    plan: Annotated[Plan, tyro.conf.arg(name="")] = field(default_factory=Plan)


def main(argv: list[str]) -> None:
    """Check the flags, load the model, answer."""
    flags = parse(Run, argv, "run")
    _check(flags)
    prompt = _prompt(flags)
    if prompt is None and flags.json:
        raise UserError("--json prints one answer: give a prompt, --file, or pipe one in")
    from endside.api import LLM

    llm = LLM(flags.model, **{one.name: getattr(flags.plan, one.name) for one in fields(Plan)})
    if prompt is None:
        _chat(llm, flags)
        return
    stream = _ask(llm, flags, [], prompt)
    result = _finish(stream, quiet=flags.json)
    if flags.json:
        print(json.dumps(asdict(result), ensure_ascii=False))
    if flags.stats:
        print(_stats(result), file=sys.stderr)


def _check(flags: Run) -> None:
    if flags.think and flags.no_think:
        raise UserError("--think and --no-think contradict each other: give one")
    if flags.prompt is not None and flags.file is not None:
        raise UserError("both a prompt and --file are given: give one")
    if flags.raw and (flags.system is not None or flags.think or flags.no_think):
        raise UserError("--raw continues plain text: leave --system, --think and --no-think out")


def _prompt(flags: Run) -> str | None:
    """The one prompt to answer; None where a person sits at the terminal and gave none."""
    if flags.file is not None:
        try:
            text = flags.file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read --file {flags.file}: {error}") from error
    elif flags.prompt is not None:
        text = flags.prompt
    elif sys.stdin.isatty():
        return None
    else:
        text = sys.stdin.read().rstrip("\n")
    if not text:
        raise UserError("the prompt is empty: give some text to answer")
    return text


def _ask(llm: LLM, flags: Run, history: list[dict[str, Any]], prompt: str) -> Stream:
    """The answer to `prompt`, after the turns of `history`, not yet begun."""
    sampling = {one.name: getattr(flags.sampling, one.name) for one in fields(SamplingConfig)}
    # A base model that merely knows the turn tokens was never taught to answer.
    talks = llm.tokenizer.chat_template is not None and not flags.raw
    if not talks:
        if flags.system is not None or flags.think or flags.no_think:
            raise UserError(
                f"{flags.model} has no chat template, so --system, --think and --no-think cannot "
                "act: leave them out"
            )
        ids = llm.tokenizer.encode(prompt, bos=True, control=flags.control)
        return llm.stream(ids, **sampling)
    think = True if flags.think else False if flags.no_think else None
    messages = [*history, {"role": "user", "content": prompt}]
    return llm.stream(messages, think=think, control=flags.control, **sampling)


def _finish(stream: Stream, *, quiet: bool) -> Generation:
    """Print the pieces as they come; the whole answer."""
    for piece in stream:
        if not quiet:
            print(piece.text, end="", flush=True)
    if not quiet:
        print(flush=True)
    return stream.result()


def _chat(llm: LLM, flags: Run) -> None:
    """Turns until the user leaves; an interrupted answer stays in the history as far as it came."""
    start = [{"role": "system", "content": flags.system}] if flags.system is not None else []
    history = list(start)
    print("Ctrl-C stops an answer, /clear forgets, Ctrl-D or /exit leaves.", file=sys.stderr)
    for line in _lines():
        if line == "/clear":
            history = list(start)
            continue
        try:
            stream = _ask(llm, flags, history, line)
        except UserError as error:
            print(f"endside: {error}", file=sys.stderr)
            continue
        result = _answer(stream)
        history += [
            {"role": "user", "content": line},
            {"role": "assistant", "content": result.text},
        ]
        if flags.stats:
            print(_stats(result), file=sys.stderr)


def _lines() -> Iterator[str]:
    """What the user types, line by line; empty lines are passed over."""
    # Importing readline gives `input` line editing and history.
    import readline  # noqa: F401

    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /exit leaves)", file=sys.stderr)
            continue
        if line == "/exit":
            return
        if line:
            yield line


def _answer(stream: Stream) -> Generation:
    try:
        return _finish(stream, quiet=False)
    except KeyboardInterrupt:
        stream.close()
        print("\n(stopped)", file=sys.stderr)
        return stream.result()


def _stats(result: Generation) -> str:
    times, usage = result.timings, result.usage
    return (
        f"[{result.executor}, {result.attention.mode} attention, "
        f"{result.attention.visible_tokens} keys seen] load {times.load_s:.2f} s; "
        f"prompt {usage.prompt_tokens} tokens at {times.prefill_tokens_per_s:.1f}/s; "
        f"answer {usage.completion_tokens} tokens at {times.decode_tokens_per_s:.1f}/s; "
        f"peak {result.peak_memory_bytes / 2**20:.0f} MiB; seed {result.seed}; "
        f"ended by {result.finish_reason}"
    )
