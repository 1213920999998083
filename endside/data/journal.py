"""How far a packing is, so that one that was cut short goes on instead of beginning again.

    work/whole/           the shards, the last of each split still growing
    work/journal.json     how long each file was at the last save, and how many documents are in it

A save puts the files on the disk first and then replaces the journal; whoever resumes cuts the
files back to what the journal says. Reading is cheap beside encoding, so documents that are in
already are read again and passed over, and their hash tells whether they are the same ones: with
the same texts, tokenizer and flags the result is the same, bit for bit, however often it stopped.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from endside.atomic import write_atomic
from endside.data.document import Document
from endside.errors import UserError

JOURNAL = "journal.json"
SAVE_SECONDS = 15.0


class Journal:
    """What was done of a packing that asks for `asked`."""

    def __init__(self, work: Path, asked: dict[str, Any]) -> None:
        self.path, self.asked = work / JOURNAL, asked
        self.documents = 0
        self._hash = hashlib.sha256()
        self._saved = time.monotonic()

    def read(self) -> dict[str, Any] | None:
        """What was saved last; None where nothing was, or for something else than is asked."""
        try:
            saved = json.loads(self.path.read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        return saved if isinstance(saved, dict) and saved.get("asked") == self.asked else None

    def forget(self) -> None:
        """Nothing was done: before the files that an older journal speaks of become others."""
        self.path.unlink(missing_ok=True)

    def skip(self, documents: Iterable[Document], saved: dict[str, Any]) -> Iterator[Document]:
        """The documents that are not in yet. UserError where those before are other ones."""
        rest = iter(documents)
        while self.documents < saved["documents"] and (document := next(rest, None)) is not None:
            self.add(document)
        if (self.documents, self._hash.hexdigest()) != (saved["documents"], saved["sha256"]):
            self.forget()
            raise UserError(
                "the texts are not those of the packing that was cut short here: what it left is "
                "given up, run the same command again to begin anew"
            )
        return rest

    def add(self, document: Document) -> None:
        """One document more is in the shards."""
        self.documents += 1
        for part in (document.id, document.text):
            self._hash.update(part.encode("utf-8", "surrogatepass") + b"\0")

    def due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() - self._saved > SAVE_SECONDS

    def save(self, files: dict[str, Any]) -> None:
        """Note `files`, which are on the disk."""
        state = {
            "asked": self.asked, "documents": self.documents, "sha256": self._hash.hexdigest(),
            "files": files,
        }  # fmt: skip
        write_atomic(self.path, json.dumps(state))
        self._saved = time.monotonic()
