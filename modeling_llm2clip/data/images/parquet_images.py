"""Reads single images from Parquet files in place, one row group at a time.

Arrow decodes whole row groups, and the last few are cached, so reading images in order decodes each
group once. Reading a random image decodes its whole group, which is fast for small groups, as
written by `datasets`. For large groups, a warning shows a command that rewrites the file.
"""

from __future__ import annotations

import warnings
from bisect import bisect_right
from functools import lru_cache
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from ..remote.file_locations import FileLocation, open_file, require_unchanged
from ..remote.remote_files import FileInfo

_FILES_KEPT = 2**14  # about 2 kB each
_GROUPS_KEPT = 4  # threads that decode images in order need one or two
_LARGE_GROUP = 2**26  # bytes of images, which take about 20 ms to decode


class ColumnLayout(NamedTuple):
    """The location of the images in one column of a file.

    Attributes:
        leaf: Path of the bytes in the schema, such as `image.bytes`.
        first_rows: First row of each group, followed by the total number of rows.
        sizes: Stored bytes of the column in each group.
        num_nulls: Number of rows without bytes in each group; None if the footer does not state it.
        footer: Arrow's metadata of the file.
    """

    leaf: str
    first_rows: tuple[int, ...]
    sizes: tuple[int, ...]
    num_nulls: tuple[int | None, ...]
    footer: Any

    def find_group(self, row: int) -> int:
        """Return the number of the row group that contains a row."""
        return bisect_right(self.first_rows, row) - 1


_LOCKS = [Lock() for _ in range(64)]
_warned: set[FileLocation] = set()


def read_image_bytes(file: FileLocation, column: str, row: int) -> bytes:
    """Read the encoded image of a row."""
    state = require_unchanged(file)
    layout = find_column_layout(file, column, state)
    number = layout.find_group(row)
    if not 0 <= number < len(layout.sizes):
        raise ValueError(f"{file} has no row {row}.")
    values = read_group_column(file, column, state, number)
    value = values[row - layout.first_rows[number]].as_py()
    if value is None:
        raise ValueError(f"{file}: row {row} has no image in {column!r}.")
    return bytes(value)


def count_group_bytes(file: FileLocation, column: str, row: int) -> int:
    """Return the stored size in bytes of the column in the row's group, from the footer."""
    layout = find_column_layout(file, column, require_unchanged(file))
    return layout.sizes[layout.find_group(row)]


def mark_images(file: FileLocation, column: str, state: FileInfo, group: int) -> Any:
    """Mark the rows of a group that have an image; read the group if the footer does not tell."""
    layout = find_column_layout(file, column, state)
    num_rows = layout.first_rows[group + 1] - layout.first_rows[group]
    num_nulls = layout.num_nulls[group]
    if num_nulls in (0, num_rows):
        return np.full(num_rows, not num_nulls)
    return np.asarray(read_group_column(file, column, state, group).is_valid())


@lru_cache(maxsize=_FILES_KEPT)
def find_column_layout(file: FileLocation, column: str, state: FileInfo) -> ColumnLayout:  # noqa: ARG001
    """Read the layout of a column from the footer of a file."""
    try:
        with open_file(file) as opened:
            footer = pq.read_metadata(opened)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file}: not a Parquet file, or broken ({error}).") from error
    paths = [footer.schema.column(number).path for number in range(footer.num_columns)]
    leaf = next((path for path in (f"{column}.bytes", column) if path in paths), None)
    if leaf is None:
        raise ValueError(f"{file} has no column {column!r} of images.")
    groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
    chunks = [group.column(paths.index(leaf)) for group in groups]
    counts = [chunk.statistics for chunk in chunks]
    return ColumnLayout(
        leaf,
        (0, *np.cumsum([group.num_rows for group in groups], dtype=int).tolist()),
        tuple(chunk.total_compressed_size for chunk in chunks),
        tuple(c.null_count if c is not None and c.has_null_count else None for c in counts),
        footer,
    )


def read_group_column(file: FileLocation, column: str, state: FileInfo, group: int) -> Any:
    """Read a column in one row group, from the cache if it was read recently."""
    with _LOCKS[hash((file, group)) % len(_LOCKS)]:  # threads that need the same group share a read
        return _read_group_column(file, column, state, group)


@lru_cache(maxsize=_GROUPS_KEPT)
def _read_group_column(file: FileLocation, column: str, state: FileInfo, group: int) -> Any:
    layout = find_column_layout(file, column, state)
    try:
        with (
            open_file(file) as source,
            pq.ParquetFile(source, metadata=layout.footer) as opened,
        ):
            table = opened.read_row_group(group, columns=[layout.leaf], use_threads=False)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file}: row group {group} cannot be read ({error}).") from error
    values = table.column(0)
    # Arrow mistakes some damaged page headers for the end of the group.
    if len(values) != layout.first_rows[group + 1] - layout.first_rows[group]:
        raise ValueError(f"{file}: row group {group} is broken. Download the file again.")
    if pa.types.is_struct(values.type):
        values = pa.chunked_array([chunk.flatten()[0] for chunk in values.chunks])
    if values.nbytes > _LARGE_GROUP and file not in _warned:
        _warned.add(file)
        warnings.warn(
            f"{file}: a row group has {values.nbytes / 2**20:,.0f} MiB of images, all of which are "
            "read to load any one of them. Rewrite the file in row groups of 100 rows: python "
            f"-c \"import pyarrow.parquet as pq; pq.write_table(pq.read_table('{file}'), "
            "'new.parquet', row_group_size=100)\"",
            stacklevel=2,
        )
    return values
