"""The server's log: one JSON object a line on stderr. Prompts and answers are never in it."""

from __future__ import annotations

import json
import sys
import time
from typing import Any


def event(what: str, **fields: Any) -> None:
    """Write one line: when, what, and the fields."""
    line = {"time": round(time.time(), 3), "event": what, **fields}
    print(json.dumps(line, ensure_ascii=False, default=str), file=sys.stderr, flush=True)
