"""An index that a process of its own opens and searches, while this one imports torch.

From the shell, a search is mostly imports: about two seconds of LanceDB, five of torch and
transformers. Python imports one module at a time, so only another process does both at once.
"""

from __future__ import annotations

from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from types import TracebackType
from typing import Any

import numpy as np

from .index_about import About, AnnIndex
from .index_database import IndexDatabase

_opened: IndexDatabase | None = None  # in the other process


class DatabaseProcess(IndexDatabase):
    """Counts and searches as an `IndexDatabase` does; it writes nothing.

    Args:
        location: Folder or URI of the database.
        where: Filter that is tried as soon as the database is open; None for no filter.
    """

    def __init__(self, location: str, where: str | None = None) -> None:
        self.location = location
        # Not forked: this process may have threads by now.
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        self._opening: Future[About] = self._pool.submit(_open, location, where)

    def __enter__(self) -> DatabaseProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def wait(self) -> DatabaseProcess:
        """Wait until the database is open, and return it."""
        self.about = self._opening.result()
        return self

    def count(self, where: str | None = None) -> int:
        """Count the images."""
        return self._pool.submit(_count, where).result()

    def search(
        self,
        embedding: np.ndarray[Any, Any],
        *,
        top_k: int,
        where: str | None = None,
        ann: AnnIndex | None = None,
    ) -> list[dict[str, Any]]:
        """Find the images of the greatest cosine."""
        return self._pool.submit(_search, embedding, top_k, where, ann).result()


def _open(location: str, where: str | None) -> About:
    global _opened
    _opened = IndexDatabase.open(location)
    if where is not None:
        _opened.count(where)
    return _opened.about


def _count(where: str | None) -> int:
    assert _opened is not None
    return _opened.count(where)


def _search(
    embedding: np.ndarray[Any, Any], top_k: int, where: str | None, ann: AnnIndex | None
) -> list[dict[str, Any]]:
    assert _opened is not None
    return _opened.search(embedding, top_k=top_k, where=where, ann=ann)
