"""What a tokenizer.json says: pieces, merges, added tokens, and the bytes each piece stands for.

A description is the parsed JSON, passed around as it is. `build` makes the `tokenizers` model that
encodes plain runs. In it the added tokens are gone, control tokens keep their ids under names that
no text can spell, and merges that would spell one are left out, so a literal `<s>` is three pieces.

Two ways to write bytes as pieces are read: byte-level BPE (each byte one visible character) and
SentencePiece (U+2581 for a space, `<0x0A>` for a byte without a piece of its own). WordPiece and
word lists are not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from endside.errors import UserError
from endside.spm import SPACE

if TYPE_CHECKING:
    import tokenizers

# what a description with a field of a wrong kind raises where it is read
MALFORMED = (KeyError, TypeError, ValueError, AttributeError, IndexError)
LARGEST = 1 << 24  # ids of any vocabulary stay far below
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))  # pieces of one byte
AGAIN = "get the file again from where the model came from"


@dataclass(frozen=True)
class Cutter:
    """Finds the names of added tokens in a text."""

    pattern: re.Pattern[str] | None
    ids: dict[str, int]


def cutter(added: list[dict[str, Any]]) -> Cutter:
    """The longest name wins. A look at the first character spares most of the text the list."""
    if not added:
        return Cutter(None, {})
    patterns = []
    for one in sorted(added, key=lambda one: -len(one["content"])):
        text = re.escape(one["content"])
        text = rf"(?<!\w){text}(?!\w)" if one.get("single_word") else text
        left, right = (r"\s*" if one.get(side) else "" for side in ("lstrip", "rstrip"))
        patterns.append(left + text + right)
    starts = "".join(sorted({re.escape(one["content"][0]) for one in added}))
    starts += r"\s" if any(one.get("lstrip") for one in added) else ""
    pattern = re.compile(f"(?=[{starts}])(?:{'|'.join(patterns)})")
    return Cutter(pattern, {one["content"]: one["id"] for one in added})


def cut(text: str, cutter: Cutter) -> list[tuple[str, int | None]]:
    """(text, id) of the names found and (text, None) of what lies between; all of the text."""
    parts: list[tuple[str, int | None]] = []
    at = 0
    for match in cutter.pattern.finditer(text) if cutter.pattern else ():
        if match.start() > at:
            parts.append((text[at : match.start()], None))
        found = match.group()
        name = found if found in cutter.ids else found.strip()
        parts.append((found, cutter.ids[name]))
        at = match.end()
    if at < len(text):
        parts.append((text[at:], None))
    return parts


def build(spec: dict[str, Any], control: dict[str, int], *, first: bool) -> tokenizers.Tokenizer:
    """The model for plain runs: control tokens have names no text has, and no merge leads there."""
    from tokenizers import Tokenizer

    hidden = {text: f"\0 {index} \0" for text, index in control.items()}
    model = dict(spec["model"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {hidden.get(text, text): index for text, index in model["vocab"].items()}
        pairs = map(pair, model["merges"])
        model["merges"] = [(a, b) for a, b in pairs if hidden.keys().isdisjoint((a, b, a + b))]
        model["unk_token"] = hidden.get(model.get("unk_token"), model.get("unk_token"))
    else:
        model["vocab"] = [(hidden.get(text, text), score) for text, score in model["vocab"]]
    plain = {**spec, "model": model, "added_tokens": []}
    unused = ("post_processor", "decoder", "truncation", "padding")
    plain |= dict.fromkeys(unused)
    text = json.dumps(plain)
    if not first:
        text = text.replace('"prepend_scheme": "first"', '"prepend_scheme": "never"')
    return Tokenizer.from_str(text)


class Short:
    """Models for short texts: `build` with only the pieces that a text can come to, in no time.

    A merge acts only where its result stands in the text, after normalizing and splitting; what no
    merge makes is one character or one byte. So every other piece and merge may be left out and
    the ids are the same: 1 ms instead of the 300 ms that 73,440 pieces take.
    """

    LONGEST = 2000  # characters; beyond, the whole model is soon the faster way

    def __init__(self, spec: dict[str, Any], control: dict[str, int]) -> None:
        self._spec, self._control = spec, control
        self._merges = spec["model"].get("merges", [])
        results = _results(self._merges)
        self._by_result = dict(zip(results, range(len(results))))
        # other merges that give the same piece; kept apart, they are few
        self._others: dict[str, list[int]] = {}
        for at, result in enumerate(results if len(self._by_result) < len(results) else ()):
            if self._by_result[result] != at:
                self._others.setdefault(result, []).append(at)
        self._longest = max(map(len, self._by_result), default=0)
        # merges of pieces that stand for a byte do not show in the text
        self._always = [at for at, result in enumerate(results) if "<0x" in result]

    @staticmethod
    def serves(spec: dict[str, Any]) -> bool:
        """Whether the model is one of those that this is exact for."""
        model = spec["model"]
        odd = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
        return isinstance(model["vocab"], dict) and not any(model.get(one) for one in odd)

    def model(self, text: str, *, first: bool) -> tokenizers.Tokenizer:
        """The model that gives this text the ids that the whole one gives it."""
        plan = {**self._spec, "model": {**self._spec["model"], "vocab": {}, "merges": []}}
        plan["model"]["unk_token"] = None
        shell = build(plan, {}, first=first)
        normal = shell.normalizer.normalize_str(text) if shell.normalizer else text
        split = shell.pre_tokenizer
        words = [word for word, _ in split.pre_tokenize_str(normal)] if split else [normal]
        kept = sorted({*self._always, *self._acting(words)})
        merges = [self._merges[at] for at in kept]
        sides = [one for merge in merges for one in pair(merge)]
        vocab = self._spec["model"]["vocab"]
        wanted = {*sides, *map("".join, map(pair, merges)), *"".join(words), *words, *BYTES}
        wanted |= {self._spec["model"].get("unk_token")}
        small = {piece: vocab[piece] for piece in wanted & vocab.keys()}
        model = {**self._spec["model"], "vocab": small, "merges": merges}
        return build({**self._spec, "model": model}, self._control, first=first)

    def _acting(self, words: list[str]) -> Iterator[int]:
        for word in words:
            for start in range(len(word)):
                for end in range(start + 2, min(start + self._longest, len(word)) + 1):
                    result = word[start:end]
                    if result in self._by_result:
                        yield self._by_result[result]
                        yield from self._others.get(result, ())


def _results(merges: list[Any]) -> list[str]:
    """The piece that each merge makes. One pass over one string is ten times a Python loop."""
    if all(isinstance(merge, str) for merge in merges):
        found = "\n".join(merges).replace(" ", "").split("\n")
        if len(found) == len(merges):
            return found
    return ["".join(pair(merge)) for merge in merges]


def pair(merge: str | list[str]) -> tuple[str, str]:
    """A merge is written "a b" in older files, [a, b] in newer ones."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def vocabulary(model: dict[str, Any]) -> dict[str, int]:
    """Piece -> id of the model, added tokens not counted."""
    vocab = model["vocab"]
    return vocab if isinstance(vocab, dict) else {one[0]: at for at, one in enumerate(vocab)}


def unknown(model: dict[str, Any]) -> str | None:
    """The piece for what has no piece, None without one."""
    if model.get("unk_id") is not None:
        return model["vocab"][model["unk_id"]][0]
    return model.get("unk_token")


def flat(spec: dict[str, Any], name: str, inside: str) -> Iterator[dict[str, Any]]:
    """The steps of a pre-tokenizer or decoder, sequences opened."""
    step = spec.get(name)
    if step is not None and step["type"] == "Sequence":
        for one in step[inside]:
            yield from flat({name: one}, name, inside)
    elif step is not None:
        yield step


def first_only(step: dict[str, Any]) -> bool:
    """Whether the step puts a space only in front of the whole text."""
    return step.get("prepend_scheme") == "first"


def piece_decoder(spec: dict[str, Any]) -> Callable[[str], bytes]:
    """Piece -> bytes, by what the decoder says the pieces are."""
    kinds = {one["type"] for one in flat(spec, "decoder", "decoders")}
    if "ByteLevel" in kinds:
        table = byte_alphabet()
        return lambda piece: (
            bytes(table[one] for one in piece) if table.keys() >= set(piece) else piece.encode()
        )
    if not kinds & {"ByteFallback", "Metaspace", "Replace"}:
        raise UserError(
            f"the decoder {sorted(kinds)} of tokenizer.json is neither byte-level nor "
            "SentencePiece's: use a model with one of these"
        )
    fallback = "ByteFallback" in kinds
    byte = re.compile("<0x[0-9A-Fa-f]{2}>")
    return lambda piece: (
        bytes([int(piece[3:5], 16)])
        if fallback and piece.startswith("<0x") and byte.fullmatch(piece)
        else piece.replace(SPACE, " ").encode()
    )


def bytes_of(spec: dict[str, Any], names: list[str]) -> list[bytes]:
    """The bytes each piece stands for: `piece_decoder` for all at once.

    SentencePiece's are done in one pass over one string, which is ten times faster than a loop.
    """
    of_piece = piece_decoder(spec)
    kinds = {one["type"] for one in flat(spec, "decoder", "decoders")}
    if "ByteLevel" in kinds:
        return [of_piece(name) for name in names]
    found = "\n".join(names).replace(SPACE, " ").encode().split(b"\n")
    if len(found) != len(names):
        return [of_piece(name) for name in names]
    places = {name: at for at, name in enumerate(names) if name.startswith("<0x")}
    for name, at in places.items():
        found[at] = of_piece(name)
    return found


def byte_alphabet() -> dict[str, int]:
    """Byte-level BPE writes each byte as one visible character: itself, or the next from U+0100."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + at): b for at, b in enumerate(rest)}


def check_spec(spec: dict[str, Any], place: Path) -> None:
    """Refuse a description that lacks what everything below reads; fill in defaults."""
    model = spec.get("model")
    kind = model.get("type", "BPE") if isinstance(model, dict) else None
    if kind not in ("BPE", "Unigram"):
        raise UserError(f"{place} holds a {kind or 'missing'} model: BPE and Unigram are read")
    if not model.get("vocab") or (kind == "BPE" and "merges" not in model):
        raise UserError(f"{place} has no vocabulary or no merges: {AGAIN}")
    added = spec.setdefault("added_tokens", [])
    for one in added:
        index, text = one.get("id"), one.get("content")
        if not isinstance(text, str) or not isinstance(index, int) or not 0 <= index < LARGEST:
            raise UserError(f"{place} has an added token without a proper id or text: {AGAIN}")
        one.setdefault("special", False)


def first_special(step: dict[str, Any] | None) -> str | None:
    """The token a post-processor puts in front of every text."""
    if step is None:
        return None
    if step["type"] == "Sequence":
        found = (first_special(one) for one in step["processors"])
        return next((one for one in found if one), None)
    first = (step.get("single") or [{}])[0]
    return first.get("SpecialToken", {}).get("id") if isinstance(first, dict) else None


class Complaints:
    """Turns the bare Exception with which `tokenizers` refuses a description into our error."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, UserError):
            return
        if kind is Exception or issubclass(kind, MALFORMED):
            raise UserError(
                f"{self.place} is damaged ({kind.__name__}: {error}): {AGAIN}"
            ) from error
