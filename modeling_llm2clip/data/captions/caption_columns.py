"""Captions of records as columns: the short ones of a record, then its long ones."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from ..key_arrays import Array
from ..records.record_table import CAPTION_COLUMNS, count_captions


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
    _, positions = locate_captions(batch)
    texts = pa.concat_arrays([short, long]).take(pa.array(positions))
    return FlatCaptions(texts, num_short, ends)


def locate_captions(batch: pa.RecordBatch) -> tuple[Array, Array]:
    """Find the captions of each record of a batch, the short ones before the long ones.

    Returns the row of each caption's record, and the caption's position in all captions of the
    batch followed by all long captions; (T,) int64 each, record by record."""
    num_short, num_long = (counts.astype(np.int64) for counts in count_captions(batch))
    counts = num_short + num_long
    row = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    first_short = np.cumsum(num_short) - num_short
    first_long = num_short.sum() + np.cumsum(num_long) - num_long - num_short
    is_short = within < num_short[row]
    return row, within + np.where(is_short, first_short[row], first_long[row])
