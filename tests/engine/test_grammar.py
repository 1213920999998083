"""Constraints: masks against brute force, JSON that validates, bombs that are refused in time."""

from __future__ import annotations

import itertools
import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from endside.engine.grammar import Constraint, Grammar, Vocabulary
from endside.errors import UserError
from endside.tokenizer import Tokenizer, train_bpe
from tests.engine.schemas import schema

STOPS = frozenset({0, 1})
TEXT = ['{"name": "été", "id": 12.5, "a": [true, false, null]} "x-1": -7e9 2024-12-31 abc\\n ']


def fallback() -> list[bytes]:
    """A vocabulary as SentencePiece makes them: controls, all bytes, then pieces, some twice."""
    pieces = [b"a", b"b", b"c", b"d", b"ab", b"abc", b"ca", b'{"', b'":', b"}", b"1", b"12", b" "]
    return [
        b"",
        b"",
        b"",
        *[bytes([one]) for one in range(256)],
        *pieces,
        "é".encode(),
        '"é'.encode(),
    ]


def trained() -> list[bytes]:
    """A byte-level vocabulary trained on JSON."""
    tokenizer = train_bpe(TEXT * 30, 330)
    return tokenizer.token_bytes(331)


VOCABULARIES = {"fallback": Vocabulary(fallback()), "trained": Vocabulary(trained())}


@pytest.fixture(params=VOCABULARIES)
def vocabulary(request: pytest.FixtureRequest) -> Vocabulary:
    return VOCABULARIES[request.param]


def ids(constraint: Constraint) -> list[int]:
    """Allowed ids, ascending."""
    flags = np.unpackbits(constraint.mask().view(np.uint8), bitorder="little")
    return np.flatnonzero(flags).tolist()


def write(constraint: Constraint, *, seed: int, greedy: bool, most: int = 2000) -> bytes:
    """The bytes that a model of random weights writes, without its end id."""
    vocabulary, draw = constraint.grammar.vocabulary, np.random.default_rng(seed)
    logits = draw.normal(size=len(vocabulary)).astype(np.float32)
    text = b""
    for _ in range(most):
        if constraint.finished:
            break
        token = int(constraint.restrict(logits).argmax())
        constraint.advance(token)
        text += vocabulary.tokens[token]
        logits = logits if greedy else draw.normal(size=len(vocabulary)).astype(np.float32)
    return text


# Regexes of finite languages, so that every text of them can be listed.
FINITE = {"[ab]{0,3}c|dd": "abcd", "(ab|a|bc){1,3}": "abc", "a?b?c?": "abc", "(a|é)é?b": "aéb"}


def language(pattern: str) -> set[bytes]:
    words = itertools.chain(*(itertools.product(FINITE[pattern], repeat=n) for n in range(8)))
    return {one.encode() for one in map("".join, words) if re.fullmatch(pattern, one)}


@pytest.mark.parametrize("pattern", FINITE)
def test_a_mask_is_what_brute_force_allows(vocabulary: Vocabulary, pattern: str) -> None:
    """Every state that can be reached: tokens that keep a text of the language possible."""
    texts = language(pattern)
    open_states = [(b"", Grammar.regex(pattern, vocabulary).start(STOPS))]
    seen = set()
    while open_states:
        text, constraint = open_states.pop()
        if text in seen:
            continue
        seen.add(text)
        wanted = {
            at
            for at, data in enumerate(vocabulary.tokens)
            if data and any(one.startswith(text + data) for one in texts)
        }
        assert constraint.finished == (not wanted and text in texts), text
        wanted |= STOPS if text in texts else set()
        assert set(ids(constraint)) == wanted, text
        for at in wanted - STOPS:
            step = constraint.fork()
            step.advance(at)
            open_states.append((text + vocabulary.tokens[at], step))
    assert texts <= seen


def check(seed: int, vocabulary: Vocabulary) -> Iterator[str]:
    """What is wrong with the answers to one random schema."""
    wanted = schema(seed)
    grammar = Grammar.json_schema(wanted, vocabulary)
    for greedy in (True, False):
        text = write(grammar.start(STOPS), seed=seed, greedy=greedy)
        try:
            jsonschema.Draft202012Validator(wanted).validate(json.loads(text.decode("utf-8")))
        except (ValueError, jsonschema.ValidationError) as error:
            yield f"{wanted}: {text!r}: {error}"


@pytest.mark.parametrize("seed", range(40))
def test_json_validates(vocabulary: Vocabulary, seed: int) -> None:
    assert not [*check(seed, vocabulary)]


@pytest.mark.slow
def test_json_of_a_thousand_schemas_validates(vocabulary: Vocabulary) -> None:
    assert not [wrong for seed in range(1000) for wrong in check(seed, vocabulary)]


@pytest.mark.slow
def test_json_of_the_published_vocabulary_validates(test_data: Path) -> None:
    tokenizer = Tokenizer.load(test_data / "minicpm4-8b", whole=False)
    published = Vocabulary(tokenizer.token_bytes())
    assert not [wrong for seed in range(150) for wrong in check(seed, published)]


def test_any_object(vocabulary: Vocabulary) -> None:
    constraint = Grammar.json_object(vocabulary).start(STOPS)
    for byte in b'{"a" : [1, {"b":null}], "c": "\\n"}':
        assert not constraint.finished
        constraint.advance(vocabulary.longest(bytes([byte]))[0])
    assert constraint.finished
    assert set(ids(constraint)) == STOPS


def test_half_characters_may_be_tokens() -> None:
    """Byte tokens write UTF-8 and nothing else."""
    vocabulary = VOCABULARIES["fallback"]
    constraint = Grammar.json_schema({"const": "é"}, vocabulary).start()
    for byte in b'"\xc3\xa9"':
        assert constraint.allows(3 + byte)
        assert not constraint.allows(3 + 0x80)
        constraint.advance(3 + byte)
    assert constraint.finished


def test_tokens_without_bytes_never_come() -> None:
    """Control tokens, padding, and the byte that the parser would take for a mark of its own."""
    table = [b"", b"", b"a", b"\xff", b"\xffa", b"", b"b\xff"]
    constraint = Grammar.regex("(.|\\n)+", Vocabulary(table)).start(frozenset({1}))
    assert ids(constraint) == [2]
    constraint.advance(2)
    assert ids(constraint) == [1, 2]
    with pytest.raises(UserError, match="unknown special token"):
        Grammar.lark("start: <a>", Vocabulary(table))


def test_an_end_id_that_prints_is_an_end_id() -> None:
    constraint = Grammar.regex("ab+", Vocabulary([b"a", b"b", b"c"])).start(frozenset({1, 2}))
    assert ids(constraint) == [0]
    constraint.advance(0)
    with pytest.raises(UserError, match="allows no text"):
        constraint.mask()
    fits = Grammar.regex("ab*", Vocabulary([b"a", b"b", b"c"])).start(frozenset({1, 2}))
    fits.advance(0)
    assert ids(fits) == [1, 2]
    fits.advance(1)
    assert fits.finished


def test_an_answer_ends_without_end_ids(vocabulary: Vocabulary) -> None:
    constraint = Grammar.regex("ab", vocabulary).start()
    constraint.advance(vocabulary.longest(b"a")[0])
    assert not constraint.finished
    constraint.advance(vocabulary.longest(b"b")[0])
    assert constraint.finished


def test_the_worker_computes_the_same_masks(
    vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("endside.engine.grammar.HAND_OVER", -1.0)
    wanted = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    grammar = Grammar.json_schema(wanted, vocabulary)
    ahead, plain = grammar.start(STOPS), grammar.start(STOPS)
    for _ in range(60):
        ahead.prefetch()
        ahead.prefetch()
        assert ids(ahead) == ids(plain)
        token = ids(plain)[len(ids(plain)) // 2]
        ahead.advance(token)
        plain.advance(token)
    ahead.prefetch()
    ahead.advance(ids(plain)[0])  # without asking for the mask
    plain.advance(ids(plain)[0])
    assert ids(ahead) == ids(plain)


def test_only_slow_masks_are_handed_over(
    vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a quick one; one that no worker has begun is taken back."""
    constraint = Grammar.regex("a+", vocabulary).start()
    constraint.prefetch()
    assert constraint._coming is not None, "the first is not known to be quick"
    constraint.advance(vocabulary.longest(b"a")[0])
    monkeypatch.setattr(constraint, "_seconds", 0.0)
    constraint.prefetch()
    assert constraint._coming is None
    release = threading.Event()
    vocabulary.worker.submit(release.wait)
    monkeypatch.setattr(constraint, "_seconds", 1.0)
    constraint.prefetch()
    assert constraint._coming is not None
    assert ids(constraint) == ids(constraint.fork()), "no wait for the busy worker"
    release.set()


def test_a_fork_is_independent(vocabulary: Vocabulary) -> None:
    one = Grammar.regex("a(b|cd)+", vocabulary).start(STOPS)
    one.advance(vocabulary.longest(b"a")[0])
    other = one.fork()
    before = ids(other)
    one.advance(vocabulary.longest(b"c")[0])
    assert ids(other) == before != ids(one)


def test_forced_tokens_spell_what_must_come(vocabulary: Vocabulary) -> None:
    wanted = {"type": "object", "properties": {"abc": {"type": "boolean"}}, "required": ["abc"]}
    constraint = Grammar.json_schema(wanted, vocabulary).start(STOPS)
    constraint.advance(vocabulary.longest(b"{")[0])
    constraint.advance(vocabulary.longest(b'"')[0])
    forced = constraint.forced_tokens()
    assert b"".join(vocabulary.tokens[one] for one in forced) == b'abc"'
    assert len(ids(constraint)) > 1, "one tokenisation is not preferred"
    for one in forced:
        assert constraint.allows(one)
        constraint.advance(one)
    assert constraint.forced_tokens() == []


def test_a_token_that_does_not_fit_is_an_error(vocabulary: Vocabulary) -> None:
    constraint = Grammar.regex("a+", vocabulary).start(STOPS)
    with pytest.raises(UserError, match=r"does not allow b'b'"):
        constraint.advance(vocabulary.longest(b"b")[0])


def test_restrict_keeps_the_model_s_own_numbers(vocabulary: Vocabulary) -> None:
    constraint = Grammar.regex("a|b", vocabulary).start(STOPS)
    logits = np.linspace(-2, 2, len(vocabulary), dtype=np.float32)
    kept = constraint.restrict(logits)
    allowed = ids(constraint)
    assert (kept[allowed] == logits[allowed]).all()
    assert np.isneginf(np.delete(kept, allowed)).all()
    assert np.isfinite(logits).all(), "the caller's logits are its own"


def test_numbers_end(vocabulary: Vocabulary) -> None:
    """A model that loves one digit; digits within strings are not counted."""
    digit = np.full(len(vocabulary), -9, dtype=np.float32)
    for at, data in enumerate(vocabulary.tokens):
        digit[at] = data == b"7" or -9 * (data != b'"')
    wanted = {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}
    constraint = Grammar.json_schema(wanted, vocabulary).start(STOPS)
    text = b""
    while not constraint.finished:
        token = int(constraint.restrict(digit).argmax())
        constraint.advance(token)
        text += vocabulary.tokens[token]
    assert re.fullmatch(rb"\[ ?7{24} ?, ?7{24} ?\]", text), text
    constraint = Grammar.json_schema({"type": "string", "minLength": 40}, vocabulary).start()
    constraint.advance(vocabulary.longest(b'"')[0])
    for _ in range(40):
        assert constraint.allows(vocabulary.longest(b"7")[0])
        constraint.advance(vocabulary.longest(b"7")[0])


@pytest.mark.slow
def test_json_of_the_public_suite_validates(test_data: Path) -> None:
    """JSON-Schema-Test-Suite: a schema is refused before a token is written, or every answer fits.

    Answers are random: a model that says one thing for ever would never end what has no bound.
    """
    place = test_data / "json-schema-test-suite" / "tests" / "draft2020-12"
    if not place.is_dir():
        pytest.skip(f"{place} is not there: it holds the suite's own tests folder")
    fitting = refused = 0
    for file in sorted(place.glob("*.json")):
        for case in json.loads(file.read_text(encoding="utf-8")):
            try:
                grammar = Grammar.json_schema(case["schema"], VOCABULARIES["trained"])
            except UserError:
                refused += 1
                continue
            for seed in range(5):
                text = write(grammar.start(STOPS), seed=seed, greedy=False)
                found = json.loads(text.decode("utf-8"))
                jsonschema.Draft202012Validator(case["schema"]).validate(found)
            fitting += 1
    print(f"{fitting} schemas with 5 answers each, all fitting; {refused} refused beforehand")
    assert fitting >= 150, "more is refused than before"


def test_listed_properties_are_all() -> None:
    vocabulary = VOCABULARIES["trained"]
    listed = {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]}
    opened = {**listed, "additionalProperties": {"type": "null"}}
    laid = {"allOf": [listed, {"properties": {"b": {"type": "null"}}, "required": ["b"]}]}
    for wanted, more in ((listed, False), (opened, True), (laid, True)):
        constraint = Grammar.json_schema(wanted, vocabulary).start(STOPS)
        for byte in b'{"a":null':
            constraint.advance(vocabulary.longest(bytes([byte]))[0])
        assert constraint.allows(vocabulary.longest(b",")[0]) == more, wanted


UNUSABLE = [
    ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    ({"not": {"type": "string"}}, "not"),
    ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
    ({"type": "string", "format": "funny"}, "format: funny"),
    ({"type": "strin"}, "strin"),
    ({"properties": 3}, "properties"),
    ({"type": "string", "maxLength": "2"}, "maxLength"),
    ({"type": "string", "minLength": 5, "maxLength": 2}, "minLength"),
    ({"type": "integer", "multipleOf": 3, "minimum": "2"}, "minimum"),
    ({"$ref": "http://example.com/x.json"}, "example.com"),
    ({"$ref": "#/$defs/q"}, "/\\$defs/q"),
    ({"$ref": "#"}, "no text"),
    ({"type": "string", "pattern": "(?=a)b"}, "look-ahead"),
    ({"properties": {"a": {}}, "required": [{}]}, "required"),
    ({"const": 1e300}, "1e\\+300"),
    ({"type": "integer", "maximum": 10**30}, "too large"),
    ({"properties": {"a": {"$id": "x", "type": "null"}}}, "\\$id"),
    (False, "no object"),
    ([1], "no object"),
    ("{", "no JSON"),
    ({"minimum": float("nan")}, "no JSON"),
    ({"minimum": {1}}, "no JSON"),
]


@pytest.mark.parametrize(("wanted", "message"), UNUSABLE)
def test_a_schema_that_cannot_be_honoured_is_refused(wanted, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Grammar.json_schema(wanted, VOCABULARIES["fallback"])


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("regex", "(", "unclosed group"),
        ("regex", r"(a)\1", "backreferences"),
        ("regex", "", "empty answer"),
        ("regex", r"ab[^\s\S]c", "allows no text"),
        ("lark", "start: foo", "foo"),
        ("lark", 'foo: "a"', "start"),
        ("lark", "start: a\na: a", "allows no text"),
        ("lark", 'start: "', "grammar"),
    ],
)
def test_a_grammar_without_answers_is_refused(kind: str, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        getattr(Grammar, kind)(text, VOCABULARIES["fallback"])


def test_a_text_outside_the_vocabulary_is_an_error() -> None:
    constraint = Grammar.regex("ab", Vocabulary([b"", b"a"])).start(frozenset({0}))
    constraint.advance(1)
    with pytest.raises(UserError, match="no text that the vocabulary can write"):
        constraint.mask()
    with pytest.raises(UserError, match="vocabulary"):
        Grammar.regex("x", Vocabulary([b"", b"a"]))


NESTED = {"type": "array"}
for _ in range(120):
    NESTED = {"type": "array", "items": NESTED}

BOMBS = [
    ("regex", "a" * 300_000),
    ("regex", "(" * 5000 + "a" + ")" * 5000),
    ("regex", "(a{1,1000}){1,1000}"),
    ("regex", "(.*a.*b){50}"),
    ("regex", "((a?){100}){100}"),
    ("regex", "(a|b|ab)*[ab]{300}c"),
    ("lark", "start: " + "(" * 3000 + '"a"' + ")" * 3000),
    ("lark", 'start: "a"{1000000}'),
    ("lark", "start: a a a a a a\na: b{0,50}\nb: c{0,50}\nc: start | /x*/"),
    ("json_schema", NESTED),
    ("json_schema", "[" * 100_000),
    ("json_schema", {"enum": [str(one) for one in range(20_000)]}),
    ("json_schema", {"type": "array", "items": {"type": "string"}, "minItems": 10**7}),
    ("json_schema", {"type": "string", "pattern": "^(a+)+$", "minLength": 10**6}),
]


@pytest.mark.parametrize(("kind", "text"), BOMBS, ids=range(len(BOMBS)))
def test_bombs_cost_little(kind: str, text: object) -> None:
    """Refused, or served: either within the time of a few answers."""
    begin = time.thread_time()
    try:
        constraint = getattr(Grammar, kind)(text, VOCABULARIES["trained"]).start(STOPS)
        write(constraint, seed=0, greedy=False, most=20)
    except UserError:
        pass
    assert time.thread_time() - begin < 5


def test_the_library_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UserError, match=r"pip install 'endside\[serve\]'"):
        Grammar.regex("a", Vocabulary([b"a"]))
