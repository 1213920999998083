"""Text from the installed Python and from folders; what is no text is named, not guessed at."""

from __future__ import annotations

from pathlib import Path

import pytest

from endside.data.corpus import read, standard_library
from endside.errors import UserError


def library(folder: Path) -> Path:
    (folder / "pkg" / "tests").mkdir(parents=True)
    (folder / "pkg" / "__init__.py").write_text("")
    (folder / "pkg" / "deep.py").write_text(
        '"""About deep."""\nclass A:\n    """An A."""\n    def f(self):\n        """Does f."""\n'
        "    def g(self): pass\n"
    )
    (folder / "pkg" / "tests" / "test_deep.py").write_text("skipped = 1\n")
    (folder / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\nname = '\xe9'\n")
    return folder


def test_sources_and_docstrings_of_a_library(tmp_path: Path) -> None:
    root = library(tmp_path)
    sources = list(standard_library(("source",), folder=root))
    assert [document.id for document in sources] == ["source/latin.py", "source/pkg/deep.py"]
    assert "name = 'é'" in sources[0].text
    (docs,) = standard_library(("docstrings",), folder=root)
    assert docs.text == "pkg.deep\nAbout deep.\n\nA\nAn A.\n\nA.f\nDoes f.\n"
    assert docs.split_key == sources[1].split_key == "pkg/deep.py"


def test_the_installed_library_is_real_text_in_a_fixed_order() -> None:
    documents = list(standard_library(("topics", "docstrings")))
    ids = [document.id for document in documents]
    assert len(set(ids)) == len(ids)
    for kind in ("topics", "docstrings"):
        own = [name for name in ids if name.startswith(kind)]
        assert own == sorted(own)
    assert sum(len(document.text) for document in documents) > 1_000_000
    (heap,) = (document for document in documents if document.id == "docstrings/heapq.py")
    assert heap.text.startswith("heapq\nHeap queue algorithm (a.k.a. priority queue).")
    assert "\nmerge\nMerge multiple sorted inputs into a single sorted output." in heap.text
    assert not any("/test/" in name or "pydoc_data" in name for name in ids)


def test_a_folder_in_sorted_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.md").write_text("two")
    (tmp_path / "a.TXT").write_bytes(b"\xef\xbb\xbfone")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0")
    (tmp_path / "c.jsonl").write_text(
        '{"text": "three"}\n\n{"text": "four", "x": 1}\n{"text": ""}\n'
    )
    found = [(document.id, document.text) for document in read(tmp_path)]
    assert found == [
        ("a.TXT", "one"), ("b/two.md", "two"), ("c.jsonl:1", "three"), ("c.jsonl:3", "four"),
    ]  # fmt: skip
    assert [document.text for document in read(tmp_path / "b" / "two.md")] == ["two"]


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("x.txt", b"ab\0cd", "x.txt is binary (a zero byte at 2)"),
        ("x.txt", b"ab\xff", "x.txt is not UTF-8 (byte 2)"),
        ("x.jsonl", b'{"text": "a"}\n{"text"\n', "x.jsonl line 2 is not JSON"),
        ("x.jsonl", b'{"body": "a"}\n', 'x.jsonl line 1 has no "text"'),
        ("x.jsonl", b'{"text": 3}\n', 'x.jsonl line 1 has no "text"'),
        ("x.jsonl", b"[1]\n", 'x.jsonl line 1 has no "text"'),
        ("x.pdf", b"%PDF", "nothing to read in"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, name: str, content: bytes, part: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(read(tmp_path))
    assert part in str(caught.value)


def test_a_missing_corpus(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no corpus at"):
        list(read(tmp_path / "absent"))
