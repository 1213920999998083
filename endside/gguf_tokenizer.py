"""Tokenizers in GGUF: the pieces as llama.cpp wants them, and back to files we can load.

A GGUF holds the vocabulary twice over in one list: tokens, their types (normal 1, unknown 2,
control 3, user-defined 4, unused 5, byte 6, the numbers of SentencePiece) and, for the two kinds
that exist in practice,

    llama   SentencePiece BPE: a score per token decides which neighbours are joined first
    gpt2    byte-level BPE: merges in order, and the name of a pre-tokenizer that cuts words

Reading gives a tokenizer.json and tokenizer_config.json. A known trap: files exist in which every
score is the same number, so that nothing says what to join first. Merges are then taken where the
file has them; without them it cannot encode text as the model was trained, and no tokenizer is
made of it.

Writing takes real scores from tokenizer.model, or the order of merges of a tokenizer.json. Pieces
that SentencePiece calls user-defined become normal ones: the published encoders do not cut text at
them, llama.cpp would. llama.cpp knows word patterns by name only; one that has no name there is
written as the nearest one, which is said, and the whole tokenizer.json travels in the file so that
we read back exactly what we wrote.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from endside import spm
from endside.errors import UserError
from endside.formats.gguf import PREFIX
from endside.formats.gguf_file import f32, i32, u32
from endside.pieces import flat, pair
from endside.tokenizer import SPM, Tokenizer

log = logging.getLogger(__name__)

UNUSED = 5
LONGEST = 512  # characters of a token; every way to cut one in two is tried
ADDED_SCORE = -1000.0  # of tokens that nothing is merged into
WHOLE = "tokenizer.huggingface.json"
# llama.cpp's names of word patterns, by the regular expression in tokenizer.json
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {LLAMA3_WORDS: "llama-bpe", LLAMA3_WORDS.replace("{1,3}", ""): "qwen2"}
NEAREST = "llama-bpe"


def to_keys(files: Mapping[str, bytes | Path], vocab_size: int) -> tuple[dict[str, Any], list[str]]:
    """The tokenizer.* keys for a source's tokenizer files, and notes; ({}, note) without any.

    vocab_size: of the model; ids without a token are filled with unused ones.
    """
    if not {"tokenizer.json", SPM} & set(files):
        return {}, ["no tokenizer in the source, so llama.cpp will not load text with this file"]
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            data = content if isinstance(content, bytes) else content.read_bytes()
            (Path(folder) / name).write_bytes(data)
        return _to_keys(Path(folder), vocab_size)


def _to_keys(folder: Path, vocab_size: int) -> tuple[dict[str, Any], list[str]]:
    tokenizer = Tokenizer.load(folder)
    model = tokenizer.spec["model"]
    if model.get("type", "BPE") != "BPE":
        raise UserError(f"the tokenizer is {model['type']}: GGUF is written for BPE")
    pieces = tokenizer_pieces(tokenizer)
    if len(pieces) > vocab_size:
        raise UserError(
            f"the tokenizer has {len(pieces)} tokens, the model {vocab_size}: "
            "they do not belong together"
        )
    decoders = {step["type"] for step in flat(tokenizer.spec, "decoder", "decoders")}
    byte_level = "ByteLevel" in decoders
    keys, notes = _byte_level(tokenizer) if byte_level else _sentence_piece(tokenizer, folder)
    scores = keys.pop("scores", None)
    tokens, types = _with_unused(pieces, vocab_size)
    found: dict[str, Any] = {
        f"{PREFIX}model": keys.pop("model"),
        f"{PREFIX}tokens": tokens,
        f"{PREFIX}token_type": i32(types),
    }
    if scores is not None:
        missing = vocab_size - len(scores)
        found[f"{PREFIX}scores"] = f32(scores + [ADDED_SCORE] * missing)
    found |= {f"{PREFIX}{name}": value for name, value in keys.items() if name != WHOLE}
    found |= {WHOLE: keys[WHOLE]} if WHOLE in keys else {}
    return found | _rules(tokenizer), notes


def tokenizer_pieces(tokenizer: Tokenizer) -> list[tuple[str, int] | None]:
    """(text, GGUF type) of every id, None where no token has the id."""
    spec = tokenizer.spec
    found: list[tuple[str, int] | None] = [None] * tokenizer.vocab_size
    fallback = bool(spec["model"].get("byte_fallback"))
    for text, index in spec["model"]["vocab"].items():
        byte = fallback and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        found[index] = (text, spm.BYTE if byte else spm.NORMAL)
    for one in spec["added_tokens"]:
        kind = spm.CONTROL if one["special"] else spm.USER_DEFINED
        found[one["id"]] = (one["content"], kind)
    unknown = spec["model"].get("unk_token")
    if unknown is not None and unknown in spec["model"]["vocab"]:
        found[spec["model"]["vocab"][unknown]] = (unknown, spm.UNKNOWN)
    return found


def _with_unused(pieces: list[tuple[str, int] | None], size: int) -> tuple[list[str], list[int]]:
    filled = [one or (f"[UNUSED{index}]", UNUSED) for index, one in enumerate(pieces)]
    filled += [(f"[UNUSED{index}]", UNUSED) for index in range(len(filled), size)]
    return [text for text, _ in filled], [kind for _, kind in filled]


def _rules(tokenizer: Tokenizer) -> dict[str, Any]:
    """Ids of control tokens, whether BOS is added, and the chat template."""
    found: dict[str, Any] = {}
    for key, name in (("bos", "bos_token"), ("eos", "eos_token"), ("unknown", "unk_token"),
                      ("padding", "pad_token")):  # fmt: skip
        index = tokenizer.id_of(tokenizer.names[name]) if name in tokenizer.names else None
        if index is not None:
            found[f"{PREFIX}{key}_token_id"] = u32(index)
    turn = tokenizer.id_of("<|im_end|>")
    if turn in tokenizer.eos_ids:
        found[f"{PREFIX}eot_token_id"] = u32(turn)
    found[f"{PREFIX}add_bos_token"] = tokenizer.add_bos
    found[f"{PREFIX}add_eos_token"] = False
    if tokenizer.chat_template is not None:
        found["tokenizer.chat_template"] = tokenizer.chat_template
    return found


def _sentence_piece(tokenizer: Tokenizer, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Scores: tokenizer.model's own where the pieces agree, else from the order of merges."""
    vocab, scores = tokenizer.spec["model"]["vocab"], [ADDED_SCORE] * tokenizer.vocab_size
    notes = []
    real = _real_scores(folder / SPM, vocab)
    if real is not None:
        for text, score in real.items():
            scores[vocab[text]] = score
    else:
        notes.append("token scores follow the order of merges, tokenizer.model being absent")
        for rank, merge in enumerate(tokenizer.spec["model"]["merges"]):
            left, right = pair(merge)
            joined = vocab.get(left + right)
            if joined is not None and scores[joined] == ADDED_SCORE:
                scores[joined] = -float(rank)
    first = any(
        step.get("type") == "Prepend" for step in flat(tokenizer.spec, "normalizer", "normalizers")
    )
    first |= any(step.get("prepend_scheme") in ("always", "first")
                 for step in flat(tokenizer.spec, "pre_tokenizer", "pretokenizers"))  # fmt: skip
    return {"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": first}, notes


def _real_scores(path: Path, vocab: Mapping[str, int]) -> dict[str, float] | None:
    if not path.is_file():
        return None
    model = spm.read_model(path)
    agree = all(vocab.get(piece.text) == index for index, piece in enumerate(model.pieces))
    constant = len({piece.score for piece in model.pieces if piece.kind == spm.NORMAL}) < 2
    if model.algorithm != spm.BPE or not agree or constant:
        return None
    return {piece.text: piece.score for piece in model.pieces}


def _byte_level(tokenizer: Tokenizer) -> tuple[dict[str, Any], list[str]]:
    """Merges as text, and the name of the word pattern."""
    steps = flat(tokenizer.spec, "pre_tokenizer", "pretokenizers")
    patterns = [step["pattern"].get("Regex") for step in steps if step["type"] == "Split"]
    name = PATTERNS.get(patterns[0]) if len(patterns) == 1 else None
    notes = []
    if name is None:
        notes.append(
            f"llama.cpp has no name for this tokenizer's word pattern: {NEAREST!r} is written, so "
            "it cuts some texts differently; endside reads the whole tokenizer.json in the file"
        )
    merges = [" ".join(pair(one)) for one in tokenizer.spec["model"]["merges"]]
    whole = json.dumps(tokenizer.spec, ensure_ascii=False)
    return {"model": "gpt2", "pre": name or NEAREST, "merges": merges, WHOLE: whole}, notes


def from_keys(keys: Mapping[str, Any], place: Path) -> tuple[dict[str, bytes | Path], list[str]]:
    """tokenizer.json and tokenizer_config.json of a GGUF, and notes; nothing when it has none."""
    if f"{PREFIX}tokens" not in keys:
        return {}, ["the file holds no tokenizer"]
    try:
        spec, notes = _spec(keys)
        if spec is None:
            return {}, notes
        config = _config(keys, spec)
    except UserError:
        raise
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise UserError(
            f"the tokenizer in {place} is damaged ({error}): get the file again"
        ) from error
    files: dict[str, bytes | Path] = {
        "tokenizer.json": json.dumps(spec, ensure_ascii=False).encode("utf-8", "replace"),
        "tokenizer_config.json": (json.dumps(config, ensure_ascii=False, indent=1) + "\n").encode(
            "utf-8", "replace"
        ),
    }
    return files, notes


def _config(keys: Mapping[str, Any], spec: dict[str, Any]) -> dict[str, Any]:
    tokens = keys[f"{PREFIX}tokens"]
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    for key, name in (("bos", "bos_token"), ("eos", "eos_token"), ("unknown", "unk_token"),
                      ("padding", "pad_token")):  # fmt: skip
        index = keys.get(f"{PREFIX}{key}_token_id")
        if isinstance(index, int) and 0 <= index < len(tokens):
            config[name] = tokens[index]
    default = keys[f"{PREFIX}model"] == "llama"
    config["add_bos_token"] = bool(keys.get(f"{PREFIX}add_bos_token", default))
    template = keys.get("tokenizer.chat_template")
    if isinstance(template, str):
        config["chat_template"] = template
    return config


def _spec(keys: Mapping[str, Any]) -> tuple[dict[str, Any] | None, list[str]]:
    """The content of a tokenizer.json."""
    kind, whole = keys.get(f"{PREFIX}model"), keys.get(WHOLE)
    if isinstance(whole, str):
        spec = json.loads(whole)
        if not isinstance(spec, dict):
            raise ValueError(f"{WHOLE} is no object")
        return spec, []
    if kind == "llama":
        return _from_pieces(keys)
    if kind == "gpt2":
        return _from_merges(keys)
    return None, [f"its tokenizer is of kind {kind!r}, which is not read (llama and gpt2 are)"]


def _listed(keys: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    """Tokens and types, checked to belong together."""
    tokens = keys[f"{PREFIX}tokens"]
    types = keys.get(f"{PREFIX}token_type", np.ones(len(tokens), np.int32))
    if not isinstance(tokens, list) or not all(isinstance(one, str) for one in tokens):
        raise ValueError("tokens are no list of texts")
    if max(map(len, tokens), default=0) > LONGEST:
        raise ValueError(f"a token of more than {LONGEST} characters")
    if len(types) != len(tokens):
        raise ValueError(f"{len(types)} types for {len(tokens)} tokens")
    return tokens, [int(kind) for kind in types]


def _from_pieces(keys: Mapping[str, Any]) -> tuple[dict[str, Any] | None, list[str]]:
    tokens, types = _listed(keys)
    scores = keys.get(f"{PREFIX}scores", np.zeros(len(tokens), np.float32))
    if len(scores) != len(tokens):
        raise ValueError(f"{len(scores)} scores for {len(tokens)} tokens")
    if types.count(spm.UNKNOWN) != 1 or len(set(tokens)) != len(tokens):
        raise ValueError("it needs one unknown token and no token twice")
    normal = {float(score) for score, kind in zip(scores, types) if kind == spm.NORMAL}
    merges = keys.get(f"{PREFIX}merges")
    notes = []
    if len(normal) < 2 and not isinstance(merges, list):
        note = (
            "every token has the same score and there are no merges, so the tokenizer cannot be "
            "recovered: take tokenizer.json from the original model"
        )
        log.warning(note)
        return None, [note]
    # a user-defined token with a real score is a piece of SentencePiece's, the others were added
    added = [
        kind == spm.USER_DEFINED and score <= ADDED_SCORE for kind, score in zip(types, scores)
    ]
    types = [spm.NORMAL if kind == spm.USER_DEFINED and not late else kind
             for kind, late in zip(types, added)]  # fmt: skip
    pieces = [
        spm.Piece(text, float(score), kind)
        for text, score, kind in zip(tokens, scores, types)
        if kind not in (UNUSED, spm.USER_DEFINED)
    ]
    if len(normal) < 2:
        notes.append("every token has the same score: the file's merges are used instead")
        pieces = [spm.Piece(one.text, -float(at), one.kind) for at, one in enumerate(pieces)]
    byte_fallback = spm.BYTE in types
    model = spm.Model(
        pieces=tuple(pieces), algorithm=spm.BPE, byte_fallback=byte_fallback, bos_id=-1, eos_id=-1,
        charsmap=b"", add_dummy_prefix=True, remove_extra_whitespaces=False,
    )  # fmt: skip
    prefix = bool(keys.get(f"{PREFIX}add_space_prefix", True))
    spec = spm.to_spec(model, prefix=prefix, cut_symbols=False)
    if len(normal) < 2:
        spec["model"]["merges"] = [str(one).split(" ", 1) for one in merges]
    # ids are places in the file; tokens that are no pieces leave holes
    ids = [index for index, kind in enumerate(types) if kind not in (UNUSED, spm.USER_DEFINED)]
    spec["model"]["vocab"] = {piece.text: ids[at] for at, piece in enumerate(pieces)}
    spec["added_tokens"] = _added(tokens, types)
    return spec, notes


def _added(tokens: list[str], types: list[int]) -> list[dict[str, Any]]:
    return [
        spm.added_token(index, text, special=kind != spm.USER_DEFINED)
        for index, (text, kind) in enumerate(zip(tokens, types))
        if kind in (spm.UNKNOWN, spm.CONTROL, spm.USER_DEFINED)
    ]


def _from_merges(keys: Mapping[str, Any]) -> tuple[dict[str, Any] | None, list[str]]:
    tokens, types = _listed(keys)
    merges, pre = keys.get(f"{PREFIX}merges"), keys.get(f"{PREFIX}pre", "default")
    if not isinstance(merges, list):
        raise ValueError("byte-level tokens without merges")
    names = {name: pattern for pattern, name in PATTERNS.items()}
    if pre not in names:
        return None, [
            f"its word pattern {pre!r} is not known here, so no tokenizer is made: take "
            "tokenizer.json from the original model"
        ]
    split = {"type": "Split", "pattern": {"Regex": names[pre]}, "behavior": "Isolated",
             "invert": False}  # fmt: skip
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
             "use_regex": False}  # fmt: skip
    plain = {text: index for index, (text, kind) in enumerate(zip(tokens, types))
             if kind == spm.NORMAL}  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
        "added_tokens": _added(tokens, types),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": None, "decoder": dict(level),
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": pre == "llama-bpe", "vocab": plain,
            "merges": [str(one).split(" ", 1) for one in merges],
        },
    }, []  # fmt: skip
