"""Two more steps of the tour, with the model it trained: answers drafted, and answers in a form.

drafts   held-out text is continued greedily, token by token and with prompt lookup: how many
         tokens a pass brings, and whether the text is the same
json     an answer that must fit a schema: that it parses and fits is checked here
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PROMPT, ANSWER = 192, 128  # tokens
SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "minLength": 3, "maxLength": 24},
        "pages": {"type": "integer", "minimum": 1, "maximum": 999},
        "kinds": {"type": "array", "items": {"enum": ["text", "code"]}, "maxItems": 2},
    },
    "required": ["title", "pages", "kinds"],
}


def drafts(folder: Path, rows: Sequence[Sequence[int]]) -> str:
    """What drafts bring on these texts, each at least PROMPT tokens."""
    from endside.api import LLM

    if not rows:
        return f"left out: fewer than {PROMPT} held-out tokens to continue"
    prompts = [list(row[:PROMPT]) for row in rows]
    texts: dict[str, list[tuple[int, ...]]] = {}
    speed: dict[str, float] = {}
    passes: dict[str, int] = {}
    for draft in ("none", "lookup"):
        llm = LLM(folder, context=PROMPT + ANSWER, draft=draft)
        llm.generate(prompts[0], max_tokens=ANSWER, temperature=0.0)  # measures and warms up
        begun = time.perf_counter()
        made = [llm.generate(one, max_tokens=ANSWER, temperature=0.0) for one in prompts]
        texts[draft] = [one.token_ids for one in made]
        tokens = sum(map(len, texts[draft]))
        speed[draft] = tokens / (time.perf_counter() - begun)
        passes[draft] = sum(one.speculative.passes for one in made)
    same = texts["none"] == texts["lookup"]
    plain, looked_up = (sum(map(len, texts[one])) / passes[one] for one in texts)
    return (
        f"prompt lookup on {len(prompts)} held-out texts: {looked_up:.2f} tokens a pass instead of "
        f"{plain:.2f}, {speed['lookup']:.0f} tokens/s instead of {speed['none']:.0f}, prompts "
        f"included; the text is {'the same' if same else 'NOT the same'}"
    )


def constrained(folder: Path) -> str:
    """An answer in JSON, and whether it is one."""
    from endside.api import LLM

    if find_spec("llguidance") is None:
        return "left out: llguidance is not installed (pip install 'endside[serve]')"
    llm = LLM(folder, context=512)
    begun = time.perf_counter()
    made = llm.generate(
        "A book:\n", json_schema=json.dumps(SCHEMA), max_tokens=200, temperature=0.7, seed=1
    )
    spent = time.perf_counter() - begun
    return (
        f"{made.text} {'fits' if fits(made.text) else 'does NOT fit'} the schema it had to "
        f"({len(made.token_ids)} tokens in {spent:.2f} s, the grammar included)"
    )


def fits(text: str) -> bool:
    """Whether a text is a JSON object as SCHEMA says."""
    try:
        found: Any = json.loads(text)
    except ValueError:
        return False
    if not isinstance(found, dict) or found.keys() != SCHEMA["properties"].keys():
        return False
    title, pages, kinds = (found[name] for name in ("title", "pages", "kinds"))
    return (
        isinstance(title, str) and 3 <= len(title) <= 24
        and isinstance(pages, int) and 1 <= pages <= 999
        and isinstance(kinds, list) and len(kinds) <= 2 and set(kinds) <= {"text", "code"}
    )  # fmt: skip
