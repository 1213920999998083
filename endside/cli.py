"""The command line: `endside VERB …`, one verb per stage of a model's life.

A verb is a module in `endside/verbs` with a frozen dataclass of flags and a `main`. This file only
looks the verb up, so that `endside --help` imports nothing heavy, and holds the one boundary where
errors become exit codes: 0 done, 2 the user's input is wrong, 130 interrupted, 1 anything else
(with its traceback, because that is a defect of ours).
"""

from __future__ import annotations

import os
import sys
from importlib import import_module

from endside.dist import first_to_fail
from endside.errors import UserError

VERBS = {
    "demo": "the tour on this machine: real text, tokenizer, small model, text again",
    "run": "generate, or chat interactively without a prompt",
    "serve": "OpenAI-compatible server and web chat on this machine",
    "bench": "prefill and decode speed at several contexts, beside the memory bandwidth",
    "inspect": "architecture, parameters, memory plan, and what will be used and why",
    "convert": "write a checkpoint in another format (hf, llama, gptq, gguf, endside)",
    "quantize": "make a checkpoint small: int4 or int8 by rtn, GPTQ or P-GPTQ",
    "pretrain": "train from tokens: CONFIG.toml [key=value ...]",
    "check": "muP coordinate check: does anything grow with the width?",
    "sft": "fine-tune on conversations: CONFIG.toml [key=value ...]",
    "qat": "train a model in ternary or int4 weights: CONFIG.toml [key=value ...]",
    "data": "text to token shards (pack), and whether they are whole (check)",
    "draft": "speculation: count token frequencies (rank), train a draft head (train)",
    "plan": "memory and time of a training run on N devices, before it starts",
    "plot": "loss curves of one or more runs as a PNG",
    "trace": "where two executors diverge on one prompt, stage by stage",
    "size": "lines per room of this package",
}


def main(argv: list[str] | None = None) -> None:
    """Run one verb and exit the process with its code."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()
    except UserError as error:
        if first_to_fail():
            print(f"endside: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("endside: interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        # The reader left; give the interpreter's last flush somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb in ("-V", "--version", "version"):
        from endside import __version__

        print(f"endside {__version__}")
        return 0
    if verb not in VERBS:
        raise UserError(f"no verb is called {verb!r}{_nearest(verb)}: `endside --help` lists them")
    import_module(f"endside.verbs.{verb}").main(rest)
    return 0


def _nearest(verb: str) -> str:
    from difflib import get_close_matches

    close = get_close_matches(verb, VERBS, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _help() -> str:
    rows = "\n".join(f"  {verb:<10} {text}" for verb, text in VERBS.items())
    return (
        "endside: the whole life of an efficient language model for end devices\n\n"
        f"usage: endside VERB ...\n\n{rows}\n\n"
        "`endside VERB --help` shows a verb's flags. MODEL is a local folder in Hugging Face\n"
        "layout or a hub name such as openbmb/MiniCPM4-0.5B."
    )
