"""Checks that a name means one image, which may have a record per language."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from ..._suggestions import MAX_LISTED, counted, list_first
from ..images.image_sources import ImageSource, count_bytes
from ..key_arrays import Array
from .record_columns import IMAGE_COLUMNS, NO_IMAGE, ROWS_PER_BATCH
from .record_table import RecordTable


def require_images(records: RecordTable) -> None:
    """Check that there are records, and that each has its image."""
    if not len(records):
        raise ValueError("There are no images. Give a dataset with at least one.")
    without = np.flatnonzero(records.read_numbers("image_kind") == NO_IMAGE)
    if len(without):
        names = (name for (name,) in records.take(without[:MAX_LISTED], ("name",)))
        raise ValueError(
            f"{counted(len(without), 'record')} without an image: "
            f"{list_first(names, total=len(without))}. Read the dataset with "
            "its images."
        )


def select_one_per_image(records: RecordTable) -> RecordTable:
    """Select the first record of each image."""
    firsts = records.find_first_rows("name_key")
    rows = np.arange(len(records), dtype=firsts.dtype)
    again = np.flatnonzero(firsts != rows)
    if not len(again):
        return records
    refuse_ambiguous_names(find_ambiguous_names(records, again, firsts[again]))
    return records.select(np.flatnonzero(firsts == rows))


def refuse_ambiguous_names(names: Iterable[str]) -> None:
    """Raise for names that are those of several images."""
    if ambiguous := list(names):
        raise ValueError(
            f"{counted(len(ambiguous), 'name')} shared by several images: "
            f"{list_first(ambiguous)}. Give every image a name of its own; several "
            "languages may share one."
        )


def find_ambiguous_names(records: RecordTable, again: Array, firsts: Array) -> dict[str, None]:
    """Find the names of records whose image is not that of the first record of the name.

    The images are compared by their addresses, and where these differ, as bytes.
    """
    found: dict[str, None] = {}
    for start in range(0, len(again), ROWS_PER_BATCH):
        pairs = [rows[start : start + ROWS_PER_BATCH] for rows in (again, firsts)]
        [one], [other] = (records.select(rows).iterate_columns(IMAGE_COLUMNS) for rows in pairs)
        differ = np.zeros(len(pairs[0]), np.bool_)
        for mine, its in zip(one.columns, other.columns, strict=True):
            # Both null counts as equal: a file has no member.
            both = mine.is_null().to_numpy(False) & its.is_null().to_numpy(False)
            equal = pa.compute.equal(mine, its).fill_null(False).to_numpy(False)
            differ |= ~(both | equal)
        for record, first in zip(pairs[0][differ].tolist(), pairs[1][differ].tolist(), strict=True):
            if not _have_same_bytes(records[record].image, records[first].image):
                found[records[record].name] = None
    return found


def _have_same_bytes(one: ImageSource | None, other: ImageSource | None) -> bool:
    """Compare two images that have one name, as in tar shards with one sample per language."""
    assert one is not None and other is not None
    if count_bytes(one) != count_bytes(other):
        return False
    return one.read_bytes() == other.read_bytes()
