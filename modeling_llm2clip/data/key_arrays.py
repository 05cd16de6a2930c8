"""Groups and counts 64-bit keys that arrive in chunks, without holding all of them in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, Any]
Chunks: TypeAlias = Callable[[], Iterable[Array]]

# Each pass reads all keys and holds one range of them, at about 40 bytes per key: few passes are
# fast, many passes need little memory.
_FEW_KEYS = 2**17  # compared in one pass
_FEW_PASSES = 8  # unless a range would have more keys than:
_MANY_KEYS = 2**21
_MOST_PASSES = 32


def find_first_rows(chunks: Chunks, num_rows: int) -> Array:
    """Return, for each row, the first row with the same key: (N,) int32 or int64.

    The keys are read several times; each pass compares one range of keys.
    """
    dtype = np.int32 if num_rows <= np.iinfo(np.int32).max else np.int64
    first = np.empty(num_rows, dtype)
    for keys, rows in iterate_ranges(chunks, num_rows, dtype):
        order = np.argsort(keys, kind="stable")
        keys, rows = keys[order], rows[order]
        starts = np.flatnonzero(np.diff(keys, prepend=keys[:1] + 1) != 0)
        first[rows] = np.repeat(rows[starts], np.diff(starts, append=len(rows)))
    return first


def count_distinct(chunks: Chunks, num_keys: int) -> int:
    # np.unique(keys) would hash the keys, which takes longer than sorting them.
    ranges = (np.sort(keys) for keys, _ in iterate_ranges(chunks, num_keys))
    return sum(int((keys[1:] != keys[:-1]).sum()) + bool(len(keys)) for keys in ranges)


def sort_rows(values: Array) -> Array:
    """Sort row numbers by (N,) values below 2^31, then by row number, using little memory."""
    if len(values) > np.iinfo(np.int32).max:
        return np.argsort(values, kind="stable")
    codes = values.astype(np.int64)
    codes <<= 32
    codes |= np.arange(len(values), dtype=np.int32)
    codes.sort()
    codes &= 2**32 - 1
    return codes.astype(np.int32)


def group_positions(numbers: Array) -> Iterator[tuple[int, Array]]:
    """Yield each distinct number in an (N,) array with its positions, in ascending order."""
    order = np.argsort(numbers, kind="stable")
    distinct, starts = np.unique(numbers[order], return_index=True)
    stops = [*starts[1:].tolist(), len(numbers)]
    for number, start, stop in zip(distinct.tolist(), starts.tolist(), stops, strict=False):
        yield number, order[start:stop]


def contains_keys(sorted_keys: Array, keys: Array) -> Array:
    """Return for each of (N,) keys whether the ascending `sorted_keys` contain it, (N,) bool."""
    if not len(sorted_keys):
        return np.zeros(len(keys), np.bool_)
    positions = np.searchsorted(sorted_keys, keys).clip(max=len(sorted_keys) - 1)
    return np.asarray(sorted_keys[positions] == keys)


def iterate_ranges(
    chunks: Chunks, num_keys: int, dtype: Any = np.int64
) -> Iterator[tuple[Array, Array]]:
    """Yield keys and their row numbers, one range of leading key bits at a time.

    The ranges depend on the number of keys, not on their order.
    """
    num_passes = min(_MOST_PASSES, max(_FEW_PASSES, -(-num_keys // _MANY_KEYS)))
    num_passes = min(num_passes, -(-num_keys // _FEW_KEYS))
    num_bits = max(0, num_passes - 1).bit_length()
    for number in range(2**num_bits):
        keys, rows, start = [], [], 0
        for chunk in chunks():
            inside = slice(None)
            if num_bits:
                inside = (chunk.view(np.uint64) >> np.uint64(64 - num_bits)) == number
            keys.append(chunk[inside])
            rows.append(np.arange(start, start + len(chunk), dtype=dtype)[inside])
            start += len(chunk)
        if keys:
            yield np.concatenate(keys), np.concatenate(rows)
