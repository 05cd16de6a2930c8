"""Checks that a name means one image, which may have a record per language."""

from __future__ import annotations

import numpy as np

from ..._suggestions import MAX_LISTED, counted, list_first
from ..images.image_sources import ImageSource, count_bytes
from ..key_arrays import Array
from .record_columns import IMAGE_COLUMNS, NO_IMAGE, ROWS_PER_BATCH, make_image
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
    firsts = find_first_records(records)
    is_first = firsts == np.arange(len(records), dtype=firsts.dtype)
    return records if is_first.all() else records.select(is_first)


def find_first_records(records: RecordTable) -> Array:
    """Find the first record of the image of each record; refuse names of several images."""
    firsts = records.find_first_rows("name_key")
    again = np.flatnonzero(firsts != np.arange(len(records), dtype=firsts.dtype))
    ambiguous: dict[str, None] = {}
    for start in range(0, len(again), ROWS_PER_BATCH):
        rows = again[start : start + ROWS_PER_BATCH]
        sides = (records.take(numbers, IMAGE_COLUMNS) for numbers in (rows, firsts[rows]))
        for row, image, first in zip(rows.tolist(), *sides, strict=True):
            # As in tar shards with a sample per language, images of one name may be copies.
            if image != first and not _have_same_bytes(make_image(*image), make_image(*first)):
                ambiguous[records[row].name] = None
    if ambiguous:
        raise ValueError(
            f"{counted(len(ambiguous), 'name')} shared by several images: "
            f"{list_first(ambiguous)}. Give every image a name of its own; several "
            "languages may share one."
        )
    return firsts


def _have_same_bytes(one: ImageSource | None, other: ImageSource | None) -> bool:
    assert one is not None and other is not None
    return count_bytes(one) == count_bytes(other) and one.read_bytes() == other.read_bytes()
