"""Captions of records as columns: the short ones of a record, then its long ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from ..key_arrays import Array
from ..records.record_table import CAPTION_COLUMNS, RecordTable, count_captions
from ..store.store_index import StoreIndex
from .sentence_views import add_views


class FlatCaptions(NamedTuple):
    """The captions of n records, how many of each are short, and the n + 1 ends of all records."""

    texts: pa.Array
    num_short: Array
    ends: Array


def flatten_captions(batch: pa.RecordBatch) -> FlatCaptions:
    """Put the captions of the records of a batch into one column."""
    short, long = (batch.column(name).flatten() for name in CAPTION_COLUMNS)
    num_short, num_long = count_captions(batch)
    ends = np.concatenate([[0], np.cumsum(num_short + num_long, dtype=np.int64)])
    if not len(long):
        return FlatCaptions(short, num_short, ends)
    _, places = locate_captions(batch)
    texts = pa.concat_arrays([short, long]).take(pa.array(places))
    return FlatCaptions(texts, num_short, ends)


def locate_captions(batch: pa.RecordBatch) -> tuple[Array, Array]:
    """Find the captions of each record of a batch, the short ones before the long ones.

    Returns for each caption, record by record, the row of its record, and its place in all captions
    of the batch followed by all long captions; (T,) int64 each."""
    num_short, num_long = (counts.astype(np.int64) for counts in count_captions(batch))
    counts = num_short + num_long
    row = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    first_short = np.cumsum(num_short) - num_short
    first_long = num_short.sum() + np.cumsum(num_long) - num_long - num_short
    is_short = within < num_short[row]
    return row, within + np.where(is_short, first_short[row], first_long[row])


class FirstOccurrences:
    """Finds where each row of a store occurs first in its index, shard by shard.

    Rows are numbered by first occurrence, so a row is new where its number exceeds all before.
    """

    def __init__(self, index: StoreIndex, rows_per_shard: int) -> None:
        self._index = index
        self._rows_per_shard = rows_per_shard
        self._first_items = _find_first_items(index, rows_per_shard)

    def find(self, rows: range) -> Iterator[tuple[int, Array, Array]]:
        """Find the first occurrences of the rows of a shard."""
        newest = rows.start - 1
        for first, ends, numbers in self._index.iterate_rows(
            self._first_items[rows.start // self._rows_per_shard]
        ):
            highest = np.maximum.accumulate(np.maximum(numbers, newest))
            before = np.concatenate([[newest], highest[:-1]])
            places = np.flatnonzero((numbers > before) & (numbers < rows.stop))
            items = np.searchsorted(ends, places, side="right") - 1
            if len(places):
                yield first, items, places - ends[items]
            newest = int(highest[-1]) if len(highest) else newest
            if newest >= rows.stop - 1:
                return


def iterate_first_captions(
    table: RecordTable, occurrences: FirstOccurrences, rows: range, *, num_views: int = 0
) -> Iterator[str]:
    """Yield the captions of the rows of a shard, of which long ones have views."""
    for first, items, numbers in occurrences.find(rows):
        start, stop = int(items[0]), int(items[-1]) + 1
        chosen = table.select(np.arange(first + start, first + stop))
        [batch] = chosen.iterate_columns(CAPTION_COLUMNS)
        flat = flatten_captions(add_views(batch, num_views))
        yield from flat.texts.take(pa.array(flat.ends[items - start] + numbers)).to_pylist()


def _find_first_items(index: StoreIndex, rows_per_shard: int) -> list[int]:
    """Find the item in which the first row of each shard occurs first."""
    first_items: list[int] = []
    newest = -1
    for first, ends, rows in index.iterate_rows():
        if not len(rows):
            continue
        highest = np.maximum.accumulate(np.maximum(rows, newest))
        newest = int(highest[-1])
        first_rows = np.arange(len(first_items) * rows_per_shard, newest + 1, rows_per_shard)
        items = np.searchsorted(ends, np.searchsorted(highest, first_rows), side="right") - 1
        first_items += (first + items).tolist()
    return first_items
