"""endside: the whole life of a small language model, from text to answers on an end device.

    from endside import LLM
    LLM("openbmb/MiniCPM4-0.5B").generate("Hello", max_tokens=64).text

Importing the package loads nothing heavy: each name is fetched when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from endside.api import LLM, Generation, Piece

__all__ = ["LLM", "Generation", "Piece", "__version__"]


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("endside")
        except PackageNotFoundError:
            return "0+source"
    if name in __all__:
        from endside import api

        return getattr(api, name)
    raise AttributeError(f"module 'endside' has no attribute {name!r}")
