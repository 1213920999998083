"""The tour's own check of its JSON answer, and what it says where there is too little text."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest

from endside.demo_answers import SCHEMA, drafts, fits

GOOD = '{"title": "abc", "pages": 7, "kinds": ["code", "text"]}'


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        GOOD[:-1],
        "[1]",
        GOOD.replace("abc", "ab"),
        GOOD.replace("abc", 25 * "a"),
        GOOD.replace("7", "0"),
        GOOD.replace("7", "1000"),
        GOOD.replace("7", '"7"'),
        GOOD.replace("code", "prose"),
        GOOD.replace('["code", "text"]', '["code", "text", "code"]'),
        GOOD.replace('["code", "text"]', "[]"),
        GOOD.replace(', "kinds": ["code", "text"]', ""),
    ],
)
def test_it_says_what_a_validator_says(text: str) -> None:
    import json

    try:
        jsonschema.validate(json.loads(text), {**SCHEMA, "additionalProperties": False})
        good = True
    except (ValueError, jsonschema.ValidationError):
        good = False
    assert fits(text) == good


def test_too_little_text_is_said() -> None:
    assert drafts(Path("nowhere"), []).startswith("left out: fewer than 192")
