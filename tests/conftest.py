"""Fixtures every room shares."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def every_product_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small float32 products of training too, where the processor has tiles."""
    from endside.ops.linear import tiles

    for limit in ("SMALL", "THIN"):
        monkeypatch.setattr(tiles, limit, 0)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of published files ($ENDSIDE_TEST_DATA, else ../shared/data); skips where absent.

    Under CI with ../shared present the folder must be there: a skip would hide a broken set-up.
    """
    given = os.environ.get("ENDSIDE_TEST_DATA")
    folder = Path(given) if given else ROOT.parent / "shared" / "data"
    if folder.is_dir():
        return folder
    if given or (os.environ.get("CI") and (ROOT.parent / "shared").is_dir()):
        pytest.fail(f"published test data expected in {folder}")
    pytest.skip("no published test data: set ENDSIDE_TEST_DATA to a folder that holds it")
