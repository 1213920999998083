"""SentencePiece model files: read the pieces, give the same tokenizer as a tokenizer.json.

`tokenizer.model` is one protobuf message (ModelProto): field 1 the pieces (text, score, type),
field 2 how they were trained, field 3 how text is normalised. The wire format is a few lines, so
no package is needed: a key holds (field << 3 | kind), kind 0 is a varint, 1 and 5 are 8 and 4
bytes, 2 has its length in front.

A SentencePiece BPE model stores no merges. Its encoder joins the neighbours whose union is the
piece with the best score, so each way to cut a piece in two known pieces is a merge, ranked by that
score; among the cuts of one piece the ids of the halves decide. For the published 73,440 pieces
this gives the 104,297 merges of the published tokenizer.json in the published order.

As in the published tokenizer.json of Llama-family models, and unlike SentencePiece: every segment
between control tokens gets a space in front whatever the model file says ("legacy"), and
user-defined symbols (`<h2>`, `<td>` ...) are not cut out of the text first.
In a unigram vocabulary the text "<0x41>" is found as the byte piece of that name (the `tokenizers`
package searches all names). Word and character models are not read.
"""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from endside.errors import UserError

SPACE = "\u2581"
UNIGRAM, BPE = 1, 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
AGAIN = "get the file again, or a folder with tokenizer.json"


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; its id is its place."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class Model:
    """What a tokenizer.model says, as far as encoding and decoding need it."""

    pieces: tuple[Piece, ...]
    algorithm: int  # UNIGRAM or BPE
    byte_fallback: bool
    bos_id: int  # -1: none
    eos_id: int  # -1: none
    charsmap: bytes  # compiled character table, empty for identity
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool


def read_model(path: Path) -> Model:
    """Read a tokenizer.model; UserError names what is wrong with it."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}: {AGAIN}") from error
    try:
        model = _parse(content)
    except (ValueError, IndexError, TypeError, struct.error) as error:
        raise UserError(
            f"{path} is no SentencePiece model or is damaged ({error}): {AGAIN}"
        ) from error
    if not model.pieces:
        raise UserError(f"{path} holds no pieces: {AGAIN}")
    if model.algorithm not in (UNIGRAM, BPE):
        raise UserError(f"{path} is a word or character model: only BPE and unigram are read")
    kinds = [piece.kind for piece in model.pieces]
    if kinds.count(UNKNOWN) != 1 or len({piece.text for piece in model.pieces}) != len(kinds):
        raise UserError(f"{path} needs one unknown piece and no piece twice: {AGAIN}")
    if model.byte_fallback and kinds.count(BYTE) != 256:
        raise UserError(f"{path} has {kinds.count(BYTE)} byte pieces, not 256: {AGAIN}")
    return model


def to_spec(model: Model, *, prefix: bool | str, cut_symbols: bool) -> dict[str, Any]:
    """The content of a tokenizer.json that encodes as the model does.

    prefix: a leading space for every segment (True), for none (False), or for the "first" only;
    cut_symbols: user-defined symbols are cut out of the text first, as SentencePiece does.
    """
    added = {UNKNOWN, CONTROL} | ({USER_DEFINED} if cut_symbols else set())
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            added_token(index, piece.text, special=piece.kind != USER_DEFINED)
            for index, piece in enumerate(model.pieces)
            if piece.kind in added
        ],
        "normalizer": _normalizer(model, prefix),
        "pre_tokenizer": None if prefix != "first" else {
            "type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False,
        },
        "post_processor": None,
        "decoder": _decoder(strip=bool(prefix)),
        "model": _bpe(model) if model.algorithm == BPE else _unigram(model),
    }  # fmt: skip


def added_token(index: int, content: str, *, special: bool = True) -> dict[str, Any]:
    """An entry of added_tokens that matches exactly its text."""
    return {
        "id": index,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
    }


def merges(model: Model) -> list[list[str]]:
    """Every way to put a piece together from two, best score first."""
    known = {piece.text: index for index, piece in enumerate(model.pieces)}
    # a control or byte piece is a name, not text: nothing may be merged into it
    whole = [piece for piece in model.pieces if piece.kind not in (UNKNOWN, CONTROL, BYTE)]
    found: list[tuple[float, str, str]] = []
    for piece in whole:
        text = piece.text
        cuts = ((text[:at], text[at:]) for at in range(1, len(text)))
        pairs = [(a, b) for a, b in cuts if a in known and b in known]
        pairs.sort(key=lambda pair: (known[pair[0]], known[pair[1]]))
        found += [(piece.score, a, b) for a, b in pairs]
    if len(found) > 1 and len({score for score, _, _ in found}) == 1:
        raise UserError(
            "every piece of tokenizer.model has the same score, so the order of merges is lost: "
            "get the original file, or tokenizer.json"
        )
    found.sort(key=lambda one: -one[0])
    return [[a, b] for _, a, b in found]


def _bpe(model: Model) -> dict[str, Any]:
    unknown = next(piece.text for piece in model.pieces if piece.kind == UNKNOWN)
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": model.byte_fallback,
        "ignore_merges": False,
        "vocab": {piece.text: index for index, piece in enumerate(model.pieces)},
        "merges": merges(model),
    }


def _unigram(model: Model) -> dict[str, Any]:
    unknown = next(at for at, piece in enumerate(model.pieces) if piece.kind == UNKNOWN)
    return {
        "type": "Unigram",
        "unk_id": unknown,
        "vocab": [[piece.text, piece.score] for piece in model.pieces],
        "byte_fallback": model.byte_fallback,
    }


def _normalizer(model: Model, prefix: bool | str) -> dict[str, Any] | None:
    steps: list[dict[str, Any]] = []
    if model.charsmap:
        table = base64.b64encode(model.charsmap).decode("ascii")
        steps.append({"type": "Precompiled", "precompiled_charsmap": table})
    if model.remove_extra_whitespaces:
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if prefix is True:
        steps.append({"type": "Prepend", "prepend": SPACE})
    if prefix != "first":
        steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    return {"type": "Sequence", "normalizers": steps} if steps else None


def _decoder(*, strip: bool) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if strip:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _parse(content: bytes) -> Model:
    pieces: list[Piece] = []
    training: dict[int, Any] = {}
    normalising: dict[int, Any] = {}
    for field, value in _fields(content):
        if field == 1:
            pieces.append(_piece(value))
        elif field == 2:
            training = dict(_fields(value))
        elif field == 3:
            normalising = dict(_fields(value))
    return Model(
        pieces=tuple(pieces),
        algorithm=training.get(3, UNIGRAM),
        byte_fallback=bool(training.get(35, 0)),
        bos_id=_signed(training.get(41, 1)),
        eos_id=_signed(training.get(42, 2)),
        charsmap=normalising.get(2, b""),
        add_dummy_prefix=bool(normalising.get(3, 1)),
        remove_extra_whitespaces=bool(normalising.get(4, 1)),
    )


def _piece(content: bytes) -> Piece:
    one = dict(_fields(content))
    text = one[1].decode("utf-8") if 1 in one else ""
    score = struct.unpack("<f", one[2])[0] if 2 in one else 0.0
    kind = one.get(3, NORMAL)
    if kind == BYTE and not re.fullmatch("<0x[0-9A-F]{2}>", text):
        raise ValueError(f"byte piece {text!r}")
    return Piece(text, score, kind)


def _fields(content: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a protobuf message: int for varints, bytes for the rest."""
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(content, at)
            yield key >> 3, value
            continue
        if kind == 2:
            size, at = _varint(content, at)
        else:
            size = {1: 8, 5: 4}.get(kind, -1)
        if size < 0 or at + size > len(content):
            raise ValueError(f"field {key >> 3} at byte {at} does not fit")
        yield key >> 3, content[at : at + size]
        at += size


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = content[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError(f"number at byte {at} does not end")


def _signed(value: int) -> int:
    """Negative numbers are stored as 64 bits of two's complement."""
    return value - (1 << 64) if value >= 1 << 63 else value
