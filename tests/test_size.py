"""`endside size` counts what is there."""

from __future__ import annotations

from pathlib import Path

from endside.size import measure, report


def test_counts_lines_files_and_functions(tmp_path: Path) -> None:
    (tmp_path / "ops").mkdir()
    (tmp_path / "ops" / "a.py").write_text(
        "def f():\n    def g():\n        return 1\n    return g\n"
    )
    (tmp_path / "ops" / "b.cc").write_text("int main() {\n}\n")
    (tmp_path / "ops" / "c.txt").write_text("not code\n")
    (tmp_path / "x.py").write_text("class A:\n    async def h(self):\n        pass\n")
    found = measure(tmp_path)
    assert found.lines == {"ops": 6, "x.py": 3}
    assert found.files == {"ops": 2, "x.py": 1}
    assert found.functions == (2, 2, 4)
    assert (found.quantile(0.5), found.quantile(1.0)) == (2, 4)
    table = report(tmp_path)
    assert "ops        6    2" in table
    assert "function length: median 2, p95 4, max 4 lines (3 functions)" in table


def test_empty_folder(tmp_path: Path) -> None:
    assert "median 0" in report(tmp_path)
