"""Constrained decoding: which tokens may come next so that the answer fits a grammar.

A JSON schema, a regular expression or a context-free grammar (Lark's syntax) is compiled once;
every answer then follows its own `Constraint`, which turns the text so far into a mask over the
vocabulary. The parser is llguidance: Earley parsing over a lexer of regex derivatives, walked along
a trie of all tokens (the method of Guidance, which ArkInfer builds on), some 0.1 ms a mask.

What a mask means. A token is allowed iff its bytes keep the text completable, and an end id iff the
text is complete. No tokenisation of a forced text is preferred: sampling is the model's own
distribution, cut to the allowed tokens and renormalised. Forced bytes are only *offered*, as
`forced_tokens`, a draft that costs nothing. When nothing but the end is possible the answer is
`finished`, without spending a forward pass on an end id.

The vocabulary is a table id -> bytes; b"" is never produced, so control tokens stay out.

JSON answers end. A schema leaves some lengths open that a small model gets lost in, so answers keep
to a part of what it allows: one line, with at most one space between two signs; a number ends at
24 characters, as many as a double prints; an object that lists `properties` has only these unless
the schema speaks of others. Strings and arrays without a bound stay without one.

A mask can be computed in a worker thread while the model runs (`prefetch`): the library releases
the interpreter. Handing a task over costs as much as a usual mask, so only an answer whose last
mask was slow does it.

Compilation has limits (`MAX_TEXT`, `MAX_DEPTH`, `LIMITS`), and so has every step. What exceeds
them, what the parser does not know and what allows no text is refused by name.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from endside.errors import UserError

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

MAX_TEXT = 256 * 1024  # characters of a grammar: compiled in about a second
MAX_DEPTH = 100  # brackets inside brackets of a schema; the parser itself stops at 128
LIMITS = {
    "initial_lexer_fuel": 1_000_000,  # steps of building the lexer: tens of milliseconds
    "step_lexer_fuel": 200_000,  # the same for one mask
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,  # about 2 KB each
    "max_grammar_size": 500_000,
    "verbose_errors": False,
}
HAND_OVER = 0.0003  # seconds: waking a thread and being woken, with the interpreter to pass on
LONGEST_NUMBER = 24  # characters of -1.7976931348623157e+308
LONGEST_FORMAT = 64  # characters of a date, an address, ... that has no other bound
LARGE = 10**15  # integers to here are exact in a double, and so are their sums
SPACE = " "  # at most one between two signs of a JSON text
NO_TEXT = "it allows no text that the vocabulary can write"
NO_FORCING = '%llguidance {"no_forcing": true}\n'
NUMBER = b"0123456789.eE+-"

# Keywords of JSON schema: those that hold named schemas, those that hold one or a list; those that
# lay another schema over this one; those that bound a number; those that say which properties there
# are beside the listed.
NAMED_SCHEMAS = {"properties", "patternProperties", "$defs", "definitions"}
SCHEMAS = {"items", "prefixItems", "anyOf", "oneOf", "additionalProperties", "additionalItems"}
JOINS = {"anyOf", "oneOf", "$ref"}
BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
OPENS = {"additionalProperties", "patternProperties", "unevaluatedProperties", "minProperties"}


class Vocabulary:
    """The tokens of one model, as the parser wants them. Built when the first grammar comes."""

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        # 0xFF occurs in no UTF-8 text; the parser would read it as the mark of a control token.
        self.tokens = [b"" if b"\xff" in one else bytes(one) for one in token_bytes]

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def parser(self) -> Any:
        """llguidance's tokenizer. One id past the vocabulary stands for every end id."""
        library = _library()
        return library.LLTokenizer(_Table(self), slices=library.LLTokenizer.json_slices())

    @cached_property
    def worker(self) -> ThreadPoolExecutor:
        """The thread that computes masks beside the model; it starts with its first task."""
        from concurrent.futures import ThreadPoolExecutor

        return ThreadPoolExecutor(max_workers=1, thread_name_prefix="endside-mask")

    @cached_property
    def number_bits(self) -> np.ndarray:
        """Tokens that would go on with a number, as a mask."""
        return self.bits([at for at, one in enumerate(self.tokens) if one[:1] and one[0] in NUMBER])

    def bits(self, ids: Sequence[int]) -> np.ndarray:
        """A mask (ceil(V / 32),) uint32 with these ids allowed."""
        flags = np.zeros(-(-len(self) // 32) * 32, dtype=np.uint8)
        flags[list(ids)] = 1
        return np.packbits(flags, bitorder="little").view(np.uint32)

    def longest(self, text: bytes) -> list[int]:
        """Ids that spell the text, the longest token first; stops at bytes that no token has."""
        ids: list[int] = []
        at = 0
        while at < len(text):
            sizes = range(min(self._longest, len(text) - at), 0, -1)
            found = next((n for n in sizes if text[at : at + n] in self._ids), 0)
            if not found:
                break
            ids.append(self._ids[text[at : at + found]])
            at += found
        return ids

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        # Where a byte has two tokens the later one is the character, the earlier the fallback.
        return {one: at for at, one in enumerate(self.tokens) if one}

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._ids), default=0)


class _Table:
    """A vocabulary with the attributes that llguidance reads from a tokenizer."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.eos_token_id = len(vocabulary)
        self.special_token_ids = (len(vocabulary),)
        self.tokens = [*vocabulary.tokens, b"<end>"]
        self._longest = vocabulary.longest

    def __call__(self, text: str | bytes) -> list[int]:
        return self._longest(text.encode("utf-8") if isinstance(text, str) else text)


class Grammar:
    """A compiled constraint; any number of answers may start from it, in any thread."""

    def __init__(self, source: str, vocabulary: Vocabulary, what: str, *, is_json: bool = False):
        """Use `json_schema`, `json_object`, `regex` or `lark`. source: llguidance's own form."""
        self.vocabulary = vocabulary
        self.what = what
        self.is_json = is_json
        if len(source) > MAX_TEXT:
            raise UserError(f"the {what} has {len(source):,} characters, at most {MAX_TEXT:,} fit")
        library = _library()
        limits = library.LLParserLimits(**LIMITS)
        self._matcher = library.LLMatcher(vocabulary.parser, source, log_level=0, limits=limits)
        if self._matcher.is_error():
            raise UserError(f"the {what} cannot be used: {_reason(self._matcher.get_error())}")
        first = self.start()
        first.mask()
        if first.finished:
            raise UserError(f"the {what} allows the empty answer only: nothing could be generated")

    @classmethod
    def json_schema(cls, schema: str | Mapping[str, Any] | bool, vocabulary: Vocabulary) -> Grammar:
        """A JSON text that the schema allows. schema: JSON text, or what it parses to."""
        what = "JSON schema"
        try:
            text = schema if isinstance(schema, str) else _dump(schema)
            plain = json.loads(text, parse_int=_number, parse_float=_number)
        except (TypeError, ValueError, RecursionError) as error:
            raise UserError(f"the {what} is no JSON: {error}") from error
        plain = {} if plain is True else plain
        if not isinstance(plain, dict):
            raise UserError(f"the {what} is no object: give one such as {{'type': 'object'}}")
        if _depth(plain) > MAX_DEPTH:
            raise UserError(f"the {what} is nested deeper than {MAX_DEPTH}: flatten it")
        if any("$id" in one for one in _schemas(plain) if one is not plain):
            raise UserError(f"the {what} has a $id within, which cannot be honoured: take it out")
        _narrow(plain)
        plain["x-guidance"] = {"whitespace_flexible": True, "whitespace_pattern": SPACE}
        return cls(f"{NO_FORCING}start: %json {_dump(plain)}", vocabulary, what, is_json=True)

    @classmethod
    def json_object(cls, vocabulary: Vocabulary) -> Grammar:
        """Any JSON object."""
        return cls.json_schema({"type": "object"}, vocabulary)

    @classmethod
    def regex(cls, pattern: str, vocabulary: Vocabulary) -> Grammar:
        """A text that the regular expression matches as a whole."""
        made = json.loads(_library().LLMatcher.grammar_from_regex(pattern))
        return cls(NO_FORCING + made["grammars"][0]["lark_grammar"], vocabulary, "regex")

    @classmethod
    def lark(cls, text: str, vocabulary: Vocabulary) -> Grammar:
        """A text of a context-free grammar in Lark's syntax; it begins with the rule `start`."""
        return cls(NO_FORCING + text, vocabulary, "grammar")

    def start(self, stop_ids: frozenset[int] = frozenset()) -> Constraint:
        """A new answer. stop_ids: the ids that end it, allowed where the grammar may end."""
        return Constraint(self, self._matcher.deep_copy(), stop_ids)


class Constraint:
    """Follows one answer. Every method raises UserError where the grammar leads nowhere."""

    def __init__(self, grammar: Grammar, matcher: Any, stop_ids: frozenset[int]) -> None:
        self.grammar = grammar
        self.stop_ids = stop_ids
        self.finished = False  # nothing but the end may follow
        self._matcher = matcher
        self._number = _NumberWatch() if grammar.is_json else None
        self._mask: np.ndarray | None = None
        self._coming: Future[np.ndarray] | None = None
        self._seconds = np.inf  # what the last mask took

    def prefetch(self) -> None:
        """Start computing the next mask in the worker thread, where that is worth a hand-over."""
        wanted = self._mask is None and self._coming is None and not self.finished
        if wanted and self._seconds > HAND_OVER:
            self._coming = self.grammar.vocabulary.worker.submit(self._compute)

    def mask(self) -> np.ndarray:
        """What may come next: bit id % 32 of word id // 32, (ceil(V / 32),) uint32."""
        if self._mask is None:
            coming, self._coming = self._coming, None
            # A worker that has not begun, on a busy machine, is not waited for.
            begun = coming is not None and not coming.cancel()
            self._mask = coming.result() if begun else self._compute()
        return self._mask

    def restrict(self, logits: np.ndarray) -> np.ndarray:
        """logits (V,) float32 with -inf on every token that may not come; a copy."""
        count = len(self.grammar.vocabulary)
        assert logits.shape == (count,), f"logits {logits.shape} for a vocabulary of {count}"
        flags = np.unpackbits(self.mask().view(np.uint8), count=count, bitorder="little")
        return np.where(flags.view(bool), logits, np.float32(-np.inf))

    def allows(self, token: int) -> bool:
        """Whether the token may come next."""
        return bool(self.mask()[token >> 5] >> (token & 31) & 1)

    def advance(self, token: int) -> None:
        """The answer's next token, one of those the mask allows."""
        self._settle()
        self._mask = None
        if token in self.stop_ids:
            self.finished = True
            return
        if not self._matcher.consume_token(token):
            self._fail(f"does not allow {self.grammar.vocabulary.tokens[token]!r} here")
        if self._number is not None:
            self._number.push(self.grammar.vocabulary.tokens[token])
        self.finished = self._matcher.is_stopped()

    def forced_tokens(self) -> list[int]:
        """Ids that spell what must come next, [] where there is a choice; an offer, as a draft."""
        self._settle()
        if self.finished:
            return []
        return self.grammar.vocabulary.longest(self._matcher.compute_ff_bytes())

    def fork(self) -> Constraint:
        """An independent copy."""
        self._settle()
        copy = Constraint(self.grammar, self._matcher.deep_copy(), self.stop_ids)
        copy.finished = self.finished
        if self._number is not None:
            copy._number = self._number.copy()
        return copy

    def _settle(self) -> None:
        """Wait for the worker, which holds the matcher."""
        if self._coming is not None:
            self.mask()

    def _compute(self) -> np.ndarray:
        begun = time.perf_counter()
        vocabulary, end = self.grammar.vocabulary, len(self.grammar.vocabulary)
        bits = np.zeros((end + 1 + 31) // 32, dtype=np.uint32)
        if self.finished:
            may_end = True
        else:
            self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
            may_end = bool(bits[end >> 5] >> np.uint32(end & 31) & 1)
            if self._matcher.is_error():
                self._fail()
        bits[end >> 5] &= ~np.uint32(1 << (end & 31))
        bits = bits[: -(-end // 32)]
        for one in self.stop_ids:
            bit = np.uint32(1 << (one & 31))
            bits[one >> 5] = bits[one >> 5] | bit if may_end else bits[one >> 5] & ~bit
        if self._number is not None and self._number.run >= LONGEST_NUMBER:
            shorter = bits & ~vocabulary.number_bits
            bits = shorter if shorter.any() else bits
        if not bits.any():
            # Complete, and no token may follow: the answer ends without an end id.
            self.finished = may_end
            if not may_end:
                self._fail(f"cannot be followed: {NO_TEXT}")
        self._seconds = time.perf_counter() - begun
        return bits

    def _fail(self, what: str | None = None) -> None:
        what = what or f"cannot be followed: {_reason(self._matcher.get_error())}"
        raise UserError(f"the {self.grammar.what} {what}: correct it")


class _NumberWatch:
    """Characters of the number that a JSON text ends in; 0 outside one and within strings."""

    def __init__(self) -> None:
        self.run = 0
        self._text = self._escaped = False

    def copy(self) -> _NumberWatch:
        other = _NumberWatch()
        other.__dict__.update(self.__dict__)
        return other

    def push(self, data: bytes) -> None:
        for byte in data:
            if self._text:
                self._text = self._escaped or byte != 0x22
                self._escaped = not self._escaped and byte == 0x5C
            else:
                self._text = byte == 0x22
                self.run = self.run + 1 if byte in NUMBER else 0


def _library() -> ModuleType:
    try:
        import llguidance
    except ImportError as error:
        raise UserError(
            "constrained answers need llguidance: pip install 'endside[serve]'"
        ) from error
    return llguidance


def _reason(error: str) -> str:
    """The library's message without the place in a grammar that the user has not written."""
    if error.startswith("NoExtension"):
        return NO_TEXT
    lines = [line.strip() for line in error.splitlines() if not re.match(r"\s*(\d+ )?\|", line)]
    text = " ".join(line for line in lines if line.strip("^ "))
    text = re.sub(r"^(at )?\d+\(\d+\): ", "", text).removeprefix("failed to compile JSON schema: ")
    keys = re.sub(r"Unimplemented keys: \[(.*)\]", r"\1 cannot be honoured", text).replace('"', "")
    return (keys if keys != text.replace('"', "") else text)[:300]


def _number(text: str) -> int | float:
    """A number of a schema; for one too large the parser would silently take another."""
    value = float(text)
    if abs(value) >= 2.0**63:
        raise UserError(f"the JSON schema has {text[:40]}, which cannot be honoured: too large")
    return value if any(one in text for one in ".eE") else int(text)


def _dump(value: Any) -> str:
    return json.dumps(value, allow_nan=False)


def _depth(value: Any) -> int:
    """How deep lists and objects are nested."""
    level, depth = [value], 0
    while level := [part for one in level for part in _parts(one)]:
        depth += 1
    return depth


def _parts(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value.values()]
    return value if isinstance(value, list) else []


def _schemas(schema: Any) -> Iterator[dict[str, Any]]:
    """The schema and every schema within it."""
    if isinstance(schema, list):
        for one in schema:
            yield from _schemas(one)
    elif isinstance(schema, dict):
        yield schema
        for name, part in schema.items():
            if name in NAMED_SCHEMAS and isinstance(part, dict):
                yield from _schemas([*part.values()])
            elif name in SCHEMAS:
                yield from _schemas(part)


def _narrow(schema: dict[str, Any]) -> None:
    """Settle what the schema leaves open, so that answers end: see the top.

    An object that lists its properties gets no others; a number with a divisor, which cannot end at
    any digit, and a string with a format get bounds. Not where schemas are laid over one another:
    each would refuse what another asks for.
    """
    found = [*_schemas(schema)]
    if any("allOf" in one or ("properties" in one and one.keys() & JOINS) for one in found):
        return
    for one in found:
        if "multipleOf" in one and not one.keys() & BOUNDS:
            one |= {"minimum": -LARGE, "maximum": LARGE}
        if "format" in one:
            one.setdefault("maxLength", LONGEST_FORMAT)
        listed, needed = one.get("properties"), one.get("required", [])
        if not isinstance(listed, dict) or not isinstance(needed, list) or one.keys() & OPENS:
            continue
        if all(name in [*listed] for name in needed):
            one["additionalProperties"] = False
