"""Files of text as a stream of documents: .txt .md .jsonl .parquet, also compressed (.zst, .gz).

    .txt .md     one document; beyond 16 MiB cut at line ends, so that memory stays bounded
    .jsonl       one document per line, its text under a chosen field
    .parquet     one document per row, its text in a column of that name

Folders are read recursively in the order of their paths. What cannot be used (no JSON, no such
field, not UTF-8) is counted and noted with file and line, and reading goes on; empty documents are
counted. A compressed file that ends early, or a parquet file that is damaged, is an error: what
follows in it is lost, and only a new copy helps.

A document's id is its file below the folder that was named, with that folder's own name, and its
line: the same on every machine, so the held-out split is too.
"""

from __future__ import annotations

import gzip
import importlib
import io
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from endside.data.document import Document
from endside.errors import UserError

PLAIN, LINES, COLUMNS = (".txt", ".md"), (".jsonl",), (".parquet",)
COMPRESSED = (".zst", ".gz")
TEXT_BYTES = 16 << 20  # of a text file, as one document
NOTED = 20  # places that are kept of what could not be used


@dataclass
class Tally:
    """What was read so far."""

    documents: int = 0
    empty: int = 0
    bad: int = 0
    cut: int = 0  # pieces of texts that were too long for one document
    bytes: int = 0  # read from the disk
    notes: list[str] = field(default_factory=list)  # place and fact of the first bad ones

    def note(self, place: str, fact: str) -> None:
        """Count something that could not be used."""
        self.bad += 1
        if len(self.notes) < NOTED:
            self.notes.append(f"{place}: {fact}")


@dataclass(frozen=True)
class TextFile:
    """A file to read: where it is, and what its documents are called after."""

    path: Path
    name: str

    @property
    def kind(self) -> str:
        """Its ending, without that of the compression."""
        path = self.path
        return (path.with_suffix("") if path.suffix in COMPRESSED else path).suffix


def find(sources: Sequence[Path]) -> list[TextFile]:
    """Every file to read of files and folders; UserError where one is missing or has none."""
    found = []
    for source in sources:
        if not source.exists():
            raise UserError(f"no text at {source}: give a file or a folder")
        inside = [source] if source.is_file() else sorted(source.rglob("*"))
        base = source.resolve().parent
        files = [
            TextFile(path, path.resolve().relative_to(base).as_posix())
            if source.is_file()
            else TextFile(path, f"{source.resolve().name}/{path.relative_to(source).as_posix()}")
            for path in inside
            if path.is_file()
        ]
        chosen = [file for file in files if file.kind in (*PLAIN, *LINES, *COLUMNS)]
        if not chosen:
            endings = ", ".join((*PLAIN, *LINES, *COLUMNS))
            raise UserError(
                f"nothing to read in {source}: it holds no file ending in {endings} "
                f"(each also with {' or '.join(COMPRESSED)})"
            )
        found += chosen
    return found


def read(files: Sequence[TextFile], text_field: str, tally: Tally) -> Iterator[Document]:
    """The documents of `files` in order, one at a time; `tally` follows."""
    readers = {**dict.fromkeys(PLAIN, _plain), **dict.fromkeys(LINES, _lines)}
    readers |= dict.fromkeys(COLUMNS, _columns)
    for file in files:
        before = tally.bytes
        for name, text in _checked(readers[file.kind], file, text_field, tally):
            if text.strip():
                tally.documents += 1
                yield Document(name, text, file.kind.removeprefix("."))
            else:
                tally.empty += 1
        tally.bytes = before + file.path.stat().st_size


Pairs = Iterator[tuple[str, str]]


def _checked(reader: Callable[..., Pairs], file: TextFile, text_field: str, tally: Tally) -> Pairs:
    """What `reader` gives, with errors of the file's bytes as the user's."""
    try:
        yield from reader(file, text_field, tally)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{file.path} is damaged ({error}): get it again") from error
    except OSError as error:
        raise UserError(
            f"cannot read {file.path}: {error.strerror or error}; correct its rights or get it "
            "again"
        ) from error


class _Counted(io.RawIOBase):
    """A file that adds what is read of it to the tally."""

    def __init__(self, file: BinaryIO, tally: Tally) -> None:
        self._file, self._tally = file, tally

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer)  # type: ignore[attr-defined]
        self._tally.bytes += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _open(file: TextFile, tally: Tally) -> BinaryIO:
    """The file's bytes, decompressed as they are read."""
    counted = _Counted(open(file.path, "rb", buffering=0), tally)  # noqa: SIM115 (closed by it)
    raw = io.BufferedReader(counted, 1 << 20)
    if file.path.suffix == ".gz":
        unpacked = gzip.GzipFile(fileobj=raw, mode="rb")
        return io.BufferedReader(unpacked, 1 << 20)  # type: ignore[arg-type]
    if file.path.suffix == ".zst":
        return io.BufferedReader(_Zstd(extra("zstandard"), raw, file.path), 1 << 20)
    return raw


class _Zstd(io.RawIOBase):
    """A zstd stream as a file; one that ends within a frame is an error, not an end."""

    def __init__(self, zstandard: ModuleType, raw: BinaryIO, path: Path) -> None:
        self._module, self._raw, self._path = zstandard, raw, path
        self._frame, self._ready = zstandard.ZstdDecompressor().decompressobj(), b""
        self._begun = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            while not self._ready:
                compressed = self._frame.unused_data if self._frame.eof else b""
                if self._frame.eof:
                    self._frame, self._begun = (
                        self._module.ZstdDecompressor().decompressobj(),
                        False,
                    )
                compressed = compressed or self._raw.read(1 << 16)
                if not compressed:
                    if self._begun:
                        raise EOFError("it ends within a frame")
                    return 0
                self._begun = True
                self._ready = self._frame.decompress(compressed)
        except self._module.ZstdError as error:
            raise UserError(f"{self._path} is damaged ({error}): get it again") from error
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


def _plain(file: TextFile, _: str, tally: Tally) -> Pairs:
    with _open(file, tally) as stream:
        number, rest = 0, b""
        while True:
            piece = rest + stream.read(TEXT_BYTES - len(rest))
            if not piece:
                return
            end = len(piece)
            if end == TEXT_BYTES:
                # The last line end; without one, the last byte that begins a character.
                end = piece.rfind(b"\n") + 1 or _character_end(piece)
                tally.cut += 1
            name = file.name if number == 0 else f"{file.name}#{number}"
            text = _decode(piece[:end], f"{file.path}", tally)
            if text is not None:
                yield name, text.removeprefix("\ufeff")
            number, rest = number + 1, piece[end:]
            if len(piece) < TEXT_BYTES:
                return


def _character_end(data: bytes) -> int:
    end = len(data) - 1
    while end > 0 and data[end] & 0xC0 == 0x80:
        end -= 1
    return end or len(data)


def _decode(data: bytes, place: str, tally: Tally) -> str | None:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        tally.note(place, f"not UTF-8 (byte {error.start}): convert it")
        return None


def _lines(file: TextFile, text_field: str, tally: Tally) -> Pairs:
    loads = _json()
    with _open(file, tally) as stream:
        for number, line in enumerate(stream, start=1):
            place = f"{file.path}:{number}"
            if not line.strip():
                continue
            try:
                record = loads(line)
            except ValueError as error:
                tally.note(place, f"not JSON ({error}): correct or remove the line")
                continue
            text = record.get(text_field) if isinstance(record, dict) else None
            if not isinstance(text, str):
                tally.note(place, _no_field(record, text_field))
            else:
                yield f"{file.name}:{number}", text


def _no_field(record: object, text_field: str) -> str:
    if not isinstance(record, dict):
        return "no object: write one {...} on each line"
    texts = ", ".join(key for key, value in record.items() if isinstance(value, str))
    return f'no text under "{text_field}": name the field with --text-field (texts: {texts})'


def _json() -> Callable[[bytes], Any]:
    """orjson's reader where it is installed, else the standard library's."""
    try:
        return importlib.import_module("orjson").loads
    except ImportError:
        import json

        return json.loads


def _columns(file: TextFile, text_field: str, tally: Tally) -> Pairs:
    parquet = extra("pyarrow.parquet")
    arrow = extra("pyarrow")
    if file.path.suffix in COMPRESSED:
        raise UserError(
            f"{file.path}: parquet files compress themselves and are read from any place in them; "
            "decompress it first"
        )
    before = tally.bytes
    try:
        opened = parquet.ParquetFile(file.path)
        names = opened.schema_arrow.names
        if text_field not in names:
            raise UserError(
                f'{file.path} has no column "{text_field}": name one with --text-field '
                f"({', '.join(names)})"
            )
        row, groups = 0, opened.num_row_groups
        for group in range(groups):
            for batch in opened.iter_batches(256, row_groups=[group], columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if isinstance(text, str):
                        yield f"{file.name}:{row}", text
                    else:
                        tally.note(f"{file.path}:{row}", "no text in the row")
            tally.bytes = before + file.path.stat().st_size * (group + 1) // groups
    except arrow.ArrowException as error:
        raise UserError(f"{file.path} is damaged ({error}): get it again") from error


def extra(name: str) -> ModuleType:
    """A module of the extra `data`; UserError names the extra where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise UserError(
            f"{package} is not installed, and this file needs it: pip install 'endside[data]'"
        ) from error
