"""Text to token ids and back, for published tokenizers and for those trained here.

A folder is read from tokenizer.json, else from a SentencePiece tokenizer.model (`endside.spm`),
which is turned into the same description (`endside.pieces`). The `tokenizers` package runs the
merges; everything around them is here, because three things must hold that it does not give:

1. Text is data. A tokenizer.json lists added tokens (`<s>`, `<|im_end|>`, `<think>`), and the usual
   encoder turns their names into control ids wherever they occur, also in what a stranger typed.
   We take them out of the model altogether: a *run* of plain text can never give a control id, not
   by merging its way there either. Text is cut at added tokens only where the caller asks for it
   (`control=True`), and each run is then encoded alone. Published encoders do that too, so ids
   agree. In Llama-family vocabularies every run gets a leading space of its own.
2. Streams. Each id appends fixed bytes (`token_bytes`); text is these bytes as UTF-8, decoded
   incrementally, so no half character is ever shown and nothing is decoded twice. Only the first
   space of a whole text is dropped, and only where the tokenizer put it there.
3. BOS is added by one rule: if the tokenizer has it and the ids do not start with it.

Round trips are exact where the vocabulary allows it: SentencePiece writes a space as U+2581, so a
U+2581 in the text comes back as a space, and a lossy normaliser (NFC, stripped spaces) stays lossy.
Special tokens append nothing; an added token not marked special (`<think>` in MiniCPM5) is shown.
"""

from __future__ import annotations

import codecs
import dataclasses
import hashlib
import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from endside import pieces, spm
from endside.errors import UserError

if TYPE_CHECKING:
    import tokenizers

JSON, SPM, CONFIG = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
# everything of a folder that describes its tokenizer, copied as it is
FILES = (JSON, SPM, CONFIG, "special_tokens_map.json", "added_tokens.json", TEMPLATE)
NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
TURN_END = "<|im_end|>"

# Control tokens of our own vocabularies, ids from 0. The markers that a program must see in the
# answer (reasoning, tool calls) are not special: decoding shows them.
OWN_SPECIAL = ("<s>", "</s>", "<|im_start|>", TURN_END)
OWN_SHOWN = ("<think>", "</think>", "<|tool_call_start|>", "<|tool_call_end|>")
# Pieces never cross these borders: a contraction; a word with the one sign or space before it; at
# most three digits; other signs with the line ends after them; line ends; other white space, which
# leaves its last space to the next word.
OWN_WORDS = "|".join(
    [
        r"'(?:ll|re|ve|[dmst])(?!\p{L})",
        r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A vocabulary with its rules. Immutable; safe to share between threads."""

    spec: dict[str, Any] = field(repr=False)  # the content of a tokenizer.json
    names: dict[str, str] = field(default_factory=dict)  # "bos_token" -> "<s>"
    add_bos: bool = False
    chat_template: str | None = None  # jinja source; None: the checkpoint has none
    tool_template: str | None = None  # the one to take when tools are given, where it differs
    source: Path | None = None  # the folder it came from, whose files `files` passes on
    edited: bool = False  # the template is not the folder's

    @classmethod
    def load(cls, folder: str | Path, *, whole: bool = True) -> Tokenizer:
        """Read a checkpoint folder; UserError names the missing or damaged file.

        whole: False leaves the model that encodes long texts, and the check that it can be built,
        until one comes; short ones do without (`pieces.Short`), and the ids are the same.
        """
        folder = Path(folder)
        place = folder / JSON if (folder / JSON).is_file() else folder / SPM
        if not place.is_file():
            raise UserError(
                f"{folder} has neither {JSON} nor {SPM}: copy one there from the original model"
            )
        config, names = _read_config(folder)
        with pieces.Complaints(place):
            tokenizer = cls._read(place, config, names)
            if whole or not pieces.Short.serves(tokenizer.spec):
                # built now, while a complaint can name the file
                assert tokenizer._head and tokenizer._tail, "built on first use"
            return tokenizer

    @classmethod
    def _read(cls, place: Path, config: dict[str, Any], names: dict[str, str | None]) -> Tokenizer:
        if place.name == JSON:
            spec = _read_json(place)
            pieces.check_spec(spec, place)
            first = pieces.first_special(spec.get("post_processor"))
            own, default_bos = {"bos_token": first}, first is not None
        else:
            spec, own = _read_spm(place, config)
            default_bos = True
        names = own | names
        _add_tokens(spec, place.parent, config, names)
        chat, tools = _read_templates(place.parent, config)
        add_bos = config.get("add_bos_token")
        tokenizer = cls(
            spec,
            {name: text for name, text in names.items() if text is not None},
            add_bos=add_bos if isinstance(add_bos, bool) else default_bos,
            chat_template=chat,
            tool_template=tools,
            source=place.parent,
        )
        assert tokenizer._bytes, "built on first use"
        return tokenizer

    def encode(self, text: str, *, bos: bool = True, control: bool = False) -> list[int]:
        """Token ids of a text.

        bos: start with BOS if the tokenizer adds one and the text does not bring it; control: names
        of added tokens in the text become these tokens. Without it they are plain text.
        """
        ids: list[int] = []
        for part, token in self.split(text) if control else [(text, None)]:
            ids += self.encode_run(part, first=not ids)[0] if token is None else [token]
        return self.with_bos(ids) if bos else ids

    def with_bos(self, ids: list[int]) -> list[int]:
        """The ids with BOS in front, if this tokenizer wants it and it is not there yet."""
        if not self.add_bos or self.bos_id is None or ids[:1] == [self.bos_id]:
            return ids
        return [self.bos_id, *ids]

    def split(self, text: str) -> list[tuple[str, int | None]]:
        """Cut a trusted text at control tokens: (text, id), id None for the plain runs between."""
        return pieces.cut(text, self._control)

    def encode_run(self, text: str, *, first: bool = True) -> tuple[list[int], list[int]]:
        """Ids of plain text, and where in it each token starts. Never a control id.

        first: the run is the start of the whole text (some vocabularies add a space only there).
        """
        ids: list[int] = []
        starts: list[int] = []
        at = 0
        for part, token in pieces.cut(text, self._blank):
            if token is not None:
                ids.append(token)
                starts.append(at)
            else:
                made = self._encode_plain(part, first and not ids)
                ids += made.ids
                starts += [at + start for start, _ in made.offsets]
            at += len(part)
        return ids, starts

    def _encode_plain(self, text: str, first: bool) -> tokenizers.Encoding:
        with pieces.Complaints(self.source or Path(JSON)):
            model = self._model(text, first)
        try:
            return model.encode(text, add_special_tokens=False)
        except TypeError as error:
            raise UserError(
                f"the text holds half a surrogate pair ({error}): send valid Unicode"
            ) from error

    def _model(self, text: str, first: bool) -> tokenizers.Tokenizer:
        built = "_head" in vars(self) or self.source is None
        if built or len(text) > pieces.Short.LONGEST or not pieces.Short.serves(self.spec):
            return self._head if first else self._tail
        return self._short.model(text, first=first)

    def decode(
        self, ids: Iterable[int], *, skip_special: bool = True, at_start: bool = True
    ) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD.

        skip_special: special tokens show nothing, else their names; at_start: the ids begin a text,
        so the space that encoding put in front is dropped; False where they continue one.
        """
        stream = Detokenizer(self, skip_special=skip_special, at_start=at_start)
        return "".join([*map(stream.push, ids), stream.flush()])

    def token_bytes(
        self, vocab_size: int | None = None, *, shown: Collection[str] = ()
    ) -> list[bytes]:
        """id -> the bytes it appends; special tokens append b"", those named in `shown` their name.

        vocab_size: fill up with b"" to the size of a model with a padded vocabulary.
        """
        table = [*self._bytes, *[b""] * max(0, (vocab_size or 0) - self.vocab_size)]
        for name in self.control_tokens.keys() & shown:
            table[self.control_tokens[name]] = name.encode("utf-8")
        return table

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return len(self._bytes)

    @cached_property
    def bos_id(self) -> int | None:
        """Id that starts a text, None without one."""
        return self._named("bos_token")

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: the tokenizer's own and the end of a ChatML turn.

        generation_config.json may name more; whoever has it adds them.
        """
        turn = self.id_of(TURN_END) if self._added.get(TURN_END, {}).get("special") else None
        found = (self._named("eos_token"), turn)
        return tuple(dict.fromkeys(one for one in found if one is not None))

    def id_of(self, token: str) -> int | None:
        """Id of a piece or an added token by its name in the vocabulary, None if unknown."""
        return self._ids.get(token)

    @cached_property
    def control_tokens(self) -> dict[str, int]:
        """Name -> id of the added tokens that plain text can never give."""
        return {
            text: token["id"]
            for text, token in self._added.items()
            if token["special"] or text.strip()
        }

    def with_chat_template(self, template: str | None) -> Tokenizer:
        """The same tokenizer with another chat template."""
        return dataclasses.replace(self, chat_template=template, tool_template=None, edited=True)

    def files(self) -> dict[str, bytes | Path]:
        """Name -> content of what a checkpoint folder needs; foreign files as they are."""
        found: dict[str, bytes | Path]
        if self.source is not None:
            places = [self.source / name for name in FILES]
            found = {place.name: place for place in places if place.is_file()}
        else:
            config = {
                "tokenizer_class": "PreTrainedTokenizerFast",
                **self.names,
                "add_bos_token": self.add_bos,
                "clean_up_tokenization_spaces": False,
            }
            found = {JSON: _to_json(self.spec), CONFIG: _to_json(config)}
        if self.edited:
            found.pop(TEMPLATE, None)
            if self.chat_template is not None:
                found[TEMPLATE] = self.chat_template.encode("utf-8")
        return found

    def save(self, folder: str | Path) -> None:
        """Write the files that `load` and other libraries read."""
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in self.files().items():
                data = content if isinstance(content, bytes) else content.read_bytes()
                (folder / name).write_bytes(data)
        except OSError as error:
            raise UserError(f"cannot write the tokenizer to {folder}: {error}") from error

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the mapping between text and ids: equal for equal rules in another file."""
        rules = {name: self.spec.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")}
        model = dict(self.spec["model"])
        model["merges"] = [" ".join(pieces.pair(one)) for one in model.get("merges", [])]
        added = sorted((one["id"], text, one["special"]) for text, one in self._added.items())
        text = json.dumps([model, rules, added], sort_keys=True)
        return hashlib.sha256(text.encode("ascii")).hexdigest()[:16]

    def _named(self, name: str) -> int | None:
        return self._ids.get(self.names[name]) if name in self.names else None

    @cached_property
    def _added(self) -> dict[str, dict[str, Any]]:
        return {one["content"]: one for one in self.spec["added_tokens"] if one["content"]}

    @cached_property
    def _ids(self) -> dict[str, int]:
        return pieces.vocabulary(self.spec["model"]) | {
            t: one["id"] for t, one in self._added.items()
        }

    @cached_property
    def _control(self) -> pieces.Cutter:
        return pieces.cutter([self._added[text] for text in self.control_tokens])

    @cached_property
    def _blank(self) -> pieces.Cutter:
        names = self._added.keys() - self.control_tokens.keys()
        return pieces.cutter([self._added[text] for text in sorted(names)])

    @cached_property
    def _head(self) -> tokenizers.Tokenizer:
        return pieces.build(self.spec, self.control_tokens, first=True)

    @cached_property
    def _short(self) -> pieces.Short:
        return pieces.Short(self.spec, self.control_tokens)

    @cached_property
    def _tail(self) -> tokenizers.Tokenizer:
        if not any(
            pieces.first_only(one)
            for one in pieces.flat(self.spec, "pre_tokenizer", "pretokenizers")
        ):
            return self._head
        return pieces.build(self.spec, self.control_tokens, first=False)

    @cached_property
    def _bytes(self) -> tuple[bytes, ...]:
        vocabulary = pieces.vocabulary(self.spec["model"])
        size = 1 + max([*vocabulary.values(), *(one["id"] for one in self._added.values())])
        table = [b""] * size
        made = pieces.bytes_of(self.spec, [*vocabulary])
        for index, data in zip(vocabulary.values(), made):
            table[index] = data
        unknown = pieces.unknown(self.spec["model"])
        if unknown is not None:
            table[vocabulary[unknown]] = b""
        for text, one in self._added.items():
            table[one["id"]] = b"" if one["special"] else text.encode("utf-8")
        return tuple(table)

    @cached_property
    def _special(self) -> dict[int, bytes]:
        return {one["id"]: t.encode("utf-8") for t, one in self._added.items() if one["special"]}

    @cached_property
    def _drops_space(self) -> bool:
        """Whether encoding puts a space in front of a text, which decoding has to drop."""
        for one in pieces.flat(self.spec, "decoder", "decoders"):
            if one["type"] == "Strip" and one.get("content") == " " and one.get("start"):
                return True
            if one["type"] == "Metaspace":
                scheme = "always" if one.get("add_prefix_space", True) else "never"
                return one.get("prepend_scheme", scheme) != "never"
        return False


class Detokenizer:
    """Ids to text as they come: every piece is finished, never half a character."""

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special: bool = True, at_start: bool = True
    ) -> None:
        """skip_special: special tokens show nothing; at_start: the ids begin a text."""
        self._table = tokenizer._bytes
        self._special = {} if skip_special else tokenizer._special
        self._drop = at_start and tokenizer._drops_space
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode

    def push(self, token: int) -> str:
        """The text that this id finishes; "" while a character is incomplete."""
        if token < 0:
            raise UserError(f"token id {token} is negative: ids count from 0")
        # ids beyond the vocabulary are the padding of a model's head
        data = self._table[token] if token < len(self._table) else b""
        data = self._special.get(token, data)
        if self._drop and data:
            data, self._drop = data.removeprefix(b" "), False
        return self._decode(data)

    def flush(self) -> str:
        """What is left: U+FFFD for an unfinished character. Ready for another continuation."""
        return self._decode(b"", final=True)


def train_bpe(texts: Iterable[str], vocab_size: int, *, add_bos: bool = True) -> Tokenizer:
    """A byte-level BPE vocabulary of the texts, the same for the same texts in the same order.

    add_bos: documents and prompts start with <s>. A small corpus may fill less than vocab_size.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Model

    control = [*OWN_SPECIAL, *OWN_SHOWN]
    least = len(control) + 256
    if vocab_size < least:
        raise UserError(f"a vocabulary of {vocab_size} is too small: at least {least} for bytes")
    trained = Model(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(OWN_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=control,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    trained.train_from_iterator(iter(texts), trainer)
    spec = json.loads(trained.to_str())
    for one in spec["added_tokens"]:
        one["special"] = one["content"] in OWN_SPECIAL
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    if add_bos:
        spec["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [bos, *({"Sequence": {"id": one, "type_id": 0}} for one in "AB")],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
        }
    return Tokenizer(spec, {"bos_token": "<s>", "eos_token": "</s>"}, add_bos=add_bos)


def _read_json(path: Path) -> dict[str, Any]:
    from endside.checkpoint import read_json

    return read_json(path)


def _read_config(folder: Path) -> tuple[dict[str, Any], dict[str, str | None]]:
    """tokenizer_config.json, and the names of bos, eos, unk and pad (None: it has none)."""
    config, special = (
        _read_json(folder / name) if (folder / name).is_file() else {}
        for name in (CONFIG, "special_tokens_map.json")
    )
    names = {}
    for name in NAMES:
        for given in (special, config):
            value = given.get(name)
            if name in given:
                names[name] = value.get("content") if isinstance(value, dict) else value
    return config, names


def _read_spm(path: Path, config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str | None]]:
    model = spm.read_model(path)
    # Llama's own class puts the space there whatever the model file says
    llama = "Llama" in config.get("tokenizer_class", "Llama")
    prefix: bool | str = model.add_dummy_prefix
    if isinstance(config.get("add_prefix_space"), bool):
        prefix = config["add_prefix_space"]
    elif llama:
        prefix = "first" if config.get("legacy") is False else True
    ends = (("bos_token", model.bos_id), ("eos_token", model.eos_id))
    names: dict[str, str | None] = {
        name: model.pieces[at].text for name, at in ends if 0 <= at < len(model.pieces)
    }
    return spm.to_spec(model, prefix=prefix, cut_symbols=not llama), names


def _read_templates(folder: Path, config: dict[str, Any]) -> tuple[str | None, str | None]:
    """The chat template and the one for tools: a file of its own, or in tokenizer_config.json."""
    if (folder / TEMPLATE).is_file():
        try:
            return (folder / TEMPLATE).read_text(encoding="utf-8"), None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {folder / TEMPLATE}: {error}: {pieces.AGAIN}") from error
    written = config.get("chat_template")
    if isinstance(written, list):
        named = {one.get("name"): one.get("template") for one in written if isinstance(one, dict)}
        return named.get("default"), named.get("tool_use")
    if written is not None and not isinstance(written, str):
        raise UserError(f"{folder / CONFIG}: chat_template is no text: {pieces.AGAIN}")
    return written, None


def _add_tokens(
    spec: dict[str, Any], folder: Path, config: dict[str, Any], names: dict[str, str | None]
) -> None:
    """Join added tokens that only the other files list, where their ids are free."""
    path = folder / "added_tokens.json"
    special = {*names.values(), *config.get("additional_special_tokens", ())}
    listed = [
        spm.added_token(index, text, special=text in special or text.startswith("<|"))
        for text, index in (_read_json(path) if path.is_file() else {}).items()
    ]
    decoder = config.get("added_tokens_decoder", {}).items()
    listed = [{"special": False, **one, "id": int(index)} for index, one in decoder] + listed
    vocabulary = pieces.vocabulary(spec["model"])
    taken = set(vocabulary.values()) | {one["id"] for one in spec["added_tokens"]}
    known = {one["content"] for one in spec["added_tokens"]}
    for one in listed:
        free = vocabulary.get(one["content"], one["id"]) == one["id"] and (
            one["content"] in vocabulary or one["id"] not in taken
        )
        if one["content"] not in known and free:
            spec["added_tokens"].append(one)
            known.add(one["content"])


def _to_json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode("utf-8")
