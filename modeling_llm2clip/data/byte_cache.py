"""A cache of a bounded size in bytes, which threads share."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Generic, TypeVar

T = TypeVar("T")


class ByteCache(Generic[T]):
    """Keeps the values that were used last, up to a size in bytes; the last one in any case."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._values: OrderedDict[Hashable, tuple[T, int]] = OrderedDict()
        self._total = 0
        self._lock = Lock()
        self._making: dict[Hashable, Lock] = {}

    def find(self, key: Hashable, make: Callable[[], tuple[T, int]]) -> T:
        """Return a value, made if it is not kept; threads that want the same one wait for it."""
        with self._lock:
            if key in self._values:
                return self._use(key)
            making = self._making.setdefault(key, Lock())
        with making:
            with self._lock:
                if key in self._values:
                    return self._use(key)
            try:
                value, size = make()
                self._keep(key, value, size)
            finally:
                with self._lock:
                    self._making.pop(key, None)
            return value

    def _use(self, key: Hashable) -> T:
        self._values.move_to_end(key)
        return self._values[key][0]

    def _keep(self, key: Hashable, value: T, size: int) -> None:
        with self._lock:
            if key not in self._values:
                self._values[key] = value, size
                self._total += size
            while self._total > self._limit and len(self._values) > 1:
                _, (_, removed) = self._values.popitem(last=False)
                self._total -= removed
