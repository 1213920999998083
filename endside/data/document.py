"""A document: the unit every data step reads, filters and packs."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Document:
    """One text and where it is from.

    Documents of one `group` share words (a module's docstrings and its source), so they fall on the
    same side of the held-out split; by default a document is a group of its own.
    """

    id: str  # unique in its corpus, stable between runs and machines
    text: str
    source: str  # which reader found it
    group: str = ""
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def split_key(self) -> str:
        """What the held-out split hashes."""
        return self.group or self.id
