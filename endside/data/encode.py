"""Documents to ids in several processes, in the order and with the result of one.

Documents travel in chunks of about a MiB, and no more chunks are under way than keep every process
busy, so memory stays bounded whatever the corpus.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from endside.data.document import Document
from endside.data.pack import Encode
from endside.tokenizer import Tokenizer

CHUNK = 1 << 20  # characters


def in_processes(tokenizer: Path, count: int) -> Encode:
    """encode(documents) -> each document and its ids, by `count` processes with that tokenizer."""

    def encode(documents: Iterable[Document]) -> Iterator[tuple[Document, Sequence[int]]]:
        # A fork would copy threads of the tokenizer's library half alive.
        pool = ProcessPoolExecutor(count, get_context("spawn"), _begin, (tokenizer,))
        under_way: deque[tuple[list[Document], Future[list[np.ndarray]]]] = deque()
        with pool:
            try:
                for chunk in _chunks(documents):
                    texts = [document.text for document in chunk]
                    under_way.append((chunk, pool.submit(_encode, texts)))
                    if len(under_way) > 2 * count:
                        yield from _finished(*under_way.popleft())
                while under_way:
                    yield from _finished(*under_way.popleft())
            finally:
                pool.shutdown(cancel_futures=True)

    return encode


def _finished(
    chunk: list[Document], future: Future[list[np.ndarray]]
) -> Iterator[tuple[Document, Sequence[int]]]:
    return zip(chunk, future.result(), strict=True)  # type: ignore[return-value]


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document.text)
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


# One per process, set when it begins.
_OWN: dict[str, Tokenizer] = {}


def _begin(folder: Path) -> None:
    _OWN["tokenizer"] = Tokenizer.load(folder)


def _encode(texts: list[str]) -> list[np.ndarray]:
    encode = _OWN["tokenizer"].encode
    return [np.array(encode(text, bos=False), dtype=np.int64) for text in texts]
