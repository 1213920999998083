"""`endside run MODEL [PROMPT]`: one answer, or a chat when there is no prompt.

A model with a chat template answers a conversation; one without continues the text (`--raw` asks
for that anyway). The answer goes to stdout as it is written, everything else to stderr, a model's
thought too: what is piped on is the answer. In a chat, Ctrl-C stops the answer and not the program;
Ctrl-D or /exit leaves; the next turn sees the answers of the turns before, not their thoughts.
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
    from endside.verbs.remote import Answer, Server
    from endside.verbs.remote import Stream as RemoteStream
else:
    tyro = lazily("tyro")


TALK = "--system, --think, --no-think and --thinking-budget"


@dataclass(frozen=True)
class Run:
    """Generate, or chat interactively without a prompt."""

    model: tyro.conf.Positional[str | None] = None
    """Local folder, .gguf file or hub name; with --server a name there, or left out."""
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
    thinking_budget: int | None = None
    """Close the thought after that many tokens."""
    json_schema: Path | None = None
    """Answer with JSON that fits the schema in this file."""
    regex: str | None = None
    """Answer with a text that this regular expression matches as a whole."""
    grammar: Path | None = None
    """Answer with a text of the context-free grammar in this file (Lark's syntax)."""
    server: str | None = None
    """Ask the server at this address instead of loading a model."""
    session: Path | None = None
    """Go on with the conversation in this file, where there is one, and save it there."""
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
    llm: LLM | Server | None = None
    if flags.server is not None:
        from endside.verbs.remote import Server

        llm = Server(flags.server)
        flags = llm.settle(flags)
    prompt, options = _prompt(flags), _options(flags)
    if prompt is None and flags.json:
        raise UserError("--json prints one answer: give a prompt, --file, or pipe one in")
    llm = llm or _load(flags)
    history = _history(llm, flags)
    if prompt is None:
        try:
            _chat(llm, flags, options, history)
        finally:
            _save(llm, flags, history)
        return
    stream = _ask(llm, flags, options, history, prompt)
    result = _finish(stream, quiet=flags.json)
    history += _turn(prompt, result)
    _save(llm, flags, history)
    if flags.json:
        print(json.dumps(asdict(result), ensure_ascii=False))
    if flags.stats:
        print(_stats(result), file=sys.stderr)


def _load(flags: Run) -> LLM:
    from endside.api import LLM

    assert flags.model is not None, "checked"
    return LLM(flags.model, **{one.name: getattr(flags.plan, one.name) for one in fields(Plan)})


def _check(flags: Run) -> None:
    if flags.model is None and flags.server is None:
        raise UserError("MODEL is missing: give a folder, a .gguf file, a hub name or --server")
    if flags.think and flags.no_think:
        raise UserError("--think and --no-think contradict each other: give one")
    if flags.prompt is not None and flags.file is not None:
        raise UserError("both a prompt and --file are given: give one")
    if flags.no_think and flags.thinking_budget is not None:
        raise UserError("--no-think leaves nothing for --thinking-budget to close: give one")
    if flags.raw and _talk(flags):
        raise UserError(f"--raw continues plain text: leave {TALK} out")


def _talk(flags: Run) -> bool:
    """Whether a flag is given that only a conversation understands."""
    given = (flags.system, flags.thinking_budget)
    return flags.think or flags.no_think or any(one is not None for one in given)


def _prompt(flags: Run) -> str | None:
    """The one prompt to answer; None where a person sits at the terminal and gave none."""
    if flags.file is not None:
        text = _read("--file", flags.file)
    elif flags.prompt is not None:
        text = flags.prompt
    elif sys.stdin.isatty():
        return None
    else:
        text = sys.stdin.read().rstrip("\n")
    if not text:
        raise UserError("the prompt is empty: give some text to answer")
    return text


def _read(flag: str, file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {flag} {file}: {error}") from error


def _options(flags: Run) -> dict[str, Any]:
    """The flags that are options of one answer: sampling, and what the answer must look like."""
    options = {one.name: getattr(flags.sampling, one.name) for one in fields(SamplingConfig)}
    options |= {"regex": flags.regex, "thinking_budget": flags.thinking_budget}
    for name, file in (("json_schema", flags.json_schema), ("grammar", flags.grammar)):
        if file is not None:
            options[name] = _read("--" + name.replace("_", "-"), file)
    return options


def _ask(
    llm: LLM | Server,
    flags: Run,
    options: dict[str, Any],
    history: list[dict[str, Any]],
    prompt: str,
) -> Stream | RemoteStream:
    """The answer to `prompt`, after the turns of `history`, not yet begun."""
    think = True if flags.think else False if flags.no_think else None
    messages = [*history, {"role": "user", "content": prompt}]
    # A base model that merely knows the turn tokens was never taught to answer.
    remote = flags.server is not None
    talks = llm.talks if remote else llm.tokenizer.chat_template is not None
    if flags.raw or not talks:
        if _talk(flags):
            raise UserError(
                f"{flags.model} has no chat template, so {TALK} cannot act: leave them out"
            )
        if remote:
            return llm.complete(prompt, options)
        ids = llm.tokenizer.encode(prompt, bos=True, control=flags.control)
        return llm.stream(ids, **options)
    if remote:
        return llm.ask(messages, {**options, "think": think})
    return llm.stream(messages, think=think, control=flags.control, **options)


def _finish(stream: Stream | RemoteStream, *, quiet: bool) -> Generation | Answer:
    """Print the pieces as they come, the thought to stderr; the whole answer."""
    thinking = False
    for piece in stream:
        if quiet:
            continue
        if piece.reasoning:
            thinking = True
            print(piece.reasoning, end="", file=sys.stderr, flush=True)
        if thinking and (piece.text or piece.tool_calls):
            thinking = False
            print("\n", file=sys.stderr)
        print(piece.text, end="", flush=True)
        for call in piece.tool_calls:
            print(f"{call.name}({call.arguments})", flush=True)
    if not quiet:
        print(flush=True)
    return stream.result()


def _history(llm: LLM | Server, flags: Run) -> list[dict[str, Any]]:
    """The turns before: those of the session file, or the system message alone."""
    if flags.session is not None and flags.session.exists():
        saved = llm.load_session(flags.session).get("history", [])
        if saved and flags.system is not None:
            raise UserError(
                f"{flags.session} holds a conversation that has begun: leave --system out, or "
                "name a new file"
            )
        if saved:
            return saved
    return [{"role": "system", "content": flags.system}] if flags.system is not None else []


def _save(llm: LLM | Server, flags: Run, history: list[dict[str, Any]]) -> None:
    if flags.session is not None:
        llm.save_session(flags.session, {"history": [] if flags.raw else history})


def _turn(question: str, result: Generation | Answer) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": result.text},
    ]


def _chat(
    llm: LLM | Server, flags: Run, options: dict[str, Any], history: list[dict[str, Any]]
) -> None:
    """Turns until the user leaves; an interrupted answer stays in the history as far as it came."""
    print("Ctrl-C stops an answer, /clear forgets, Ctrl-D or /exit leaves.", file=sys.stderr)
    for line in _lines():
        if line == "/clear":
            history[:] = [one for one in history if one["role"] == "system"]
            continue
        try:
            result = _answer(_ask(llm, flags, options, history, line))
        except UserError as error:
            print(f"endside: {error}", file=sys.stderr)
            continue
        history += _turn(line, result)
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


def _answer(stream: Stream | RemoteStream) -> Generation | Answer:
    try:
        return _finish(stream, quiet=False)
    except KeyboardInterrupt:
        stream.close()
        print("\n(stopped)", file=sys.stderr)
        return stream.result()


def _stats(result: Generation | Answer) -> str:
    if hasattr(result, "stats"):
        return result.stats()
    times, usage = result.timings, result.usage
    return (
        f"[{result.executor}, {result.attention.mode} attention, "
        f"{result.attention.visible_tokens} keys seen] load {times.load_s:.2f} s; "
        f"prompt {usage.prompt_tokens} tokens at {times.prefill_tokens_per_s:.1f}/s; "
        f"answer {usage.completion_tokens} tokens at {times.decode_tokens_per_s:.1f}/s, "
        f"{result.speculative.mean_accepted:.2f} a pass (draft {result.speculative.draft}); "
        f"peak {result.peak_memory_bytes / 2**20:.0f} MiB; seed {result.seed}; "
        f"ended by {result.finish_reason}"
    )
