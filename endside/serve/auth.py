"""API keys: one per line of a file, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from endside.errors import UserError
from endside.serve.errors import ApiError

SHORTEST = 16  # characters; anything shorter can be guessed


def read_keys(path: Path) -> tuple[bytes, ...]:
    """Digests of the keys in a file; empty lines and lines that begin with # are passed over."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --api-key-file {path}: {error}") from error
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise UserError(f"{path} holds no key: write one per line")
    short = [number for number, key in enumerate(keys, 1) if len(key) < SHORTEST]
    if short:
        raise UserError(
            f"{path}: key {short[0]} is shorter than {SHORTEST} characters: make it long"
        )
    return tuple(map(_digest, keys))


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8")).digest()


def check(header: str | None, keys: tuple[bytes, ...]) -> None:
    """Raises ApiError 401 unless the header `Authorization` carries one of the keys."""
    if not keys:
        return
    scheme, _, key = (header or "").partition(" ")
    given = _digest(key.strip()) if scheme.lower() == "bearer" else b""
    # Every key is compared, so the time says nothing about which one came close.
    if not sum(hmac.compare_digest(given, one) for one in keys):
        raise ApiError(
            401, "no valid API key: send the header `Authorization: Bearer KEY`",
            code="invalid_api_key",
        )  # fmt: skip
