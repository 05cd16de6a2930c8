"""Reads single images out of Parquet files where they lie.

Of a file, row groups and their places are kept; of a column chunk, the places of its pages. An
image in uncompressed pages, as `datasets` writes them, is one read at its offset. Of others, Arrow
reads the whole row group, and the last ones are kept.
"""

from __future__ import annotations

import io
import warnings
from bisect import bisect_right
from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import lru_cache
from threading import Lock
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from ..byte_cache import ByteCache
from ..remote.file_places import FilePlace, find_version, open_place
from .parquet_pages import Integers, Page, UnknownLayoutError, find_values, read_at, read_page

_FILES_KEPT = 2**14  # about 2 kB each
_CHUNKS_KEPT = 2**13  # about 3 kB each
_BYTES_KEPT = 2**26


@dataclass(frozen=True)
class _Group:
    """The column's chunk of one row group; an obstacle leaves its pages to Arrow."""

    first_row: int
    start: int
    stored_size: int
    may_have_nulls: bool
    has_only_nulls: bool
    obstacle: str


@dataclass(frozen=True)
class ColumnLayout:
    """Where the images of one column of a file are.

    Attributes:
        leaf: Path of the bytes in the schema, such as `image.bytes`.
        groups: The row groups.
        has_levels: Whether values may be null, so that levels are in front of them.
        first_rows: First row of each group, and the number of rows.
    """

    leaf: str
    groups: tuple[_Group, ...]
    has_levels: bool
    first_rows: tuple[int, ...]

    def find_group(self, row: int) -> int:
        """Return the number of the row group that has a row."""
        return bisect_right(self.first_rows, row) - 1


@dataclass
class _Chunk:
    """The pages of a chunk that were found so far."""

    position: int
    next_row: int = 0
    pages: list[Page] = field(default_factory=list)
    first_rows: list[int] = field(default_factory=list)


_chunks: ByteCache[_Chunk] = ByteCache(_CHUNKS_KEPT)
_values: ByteCache[tuple[Integers, Integers]] = ByteCache(_BYTES_KEPT)
_tables: ByteCache[Any] = ByteCache(_BYTES_KEPT)
_finding = Lock()
_warned: set[str] = set()


def read_image_bytes(file: FilePlace, column: str, row: int) -> bytes:
    """Read the encoded image of a row; a local file that has changed is read again."""
    version = find_version(file)
    layout = find_layout(file, column, version)
    number = layout.find_group(row)
    if not 0 <= number < len(layout.groups):
        raise ValueError(f"{file} has no row {row}.")
    group = layout.groups[number]
    within = row - group.first_row
    key = (file, version, column, number)
    content: bytes | None
    try:
        if group.obstacle:
            raise UnknownLayoutError(group.obstacle)
        content = _read_from_pages(file, key, layout, group, within)
    except UnknownLayoutError as error:
        _warn_once(file, str(error))
        content = _read_with_arrow(file, key, layout, number, within)
    if content is None:
        raise ValueError(f"{file}: row {row} has no image in {column!r}.")
    return content


def _warn_once(file: FilePlace, obstacle: str) -> None:
    if obstacle in _warned:
        return
    _warned.add(obstacle)
    warnings.warn(
        f"{file}: for each image a whole row group is read ({obstacle}), which is slow at random. "
        "Write such files anew, with compression='none' and use_dictionary=False, with statistics "
        "and no nulls.",
        stacklevel=2,
    )


def count_group_bytes(file: FilePlace, column: str, row: int) -> int:
    """Return the stored bytes of the column in the row's group, from the footer."""
    layout = find_layout(file, column, find_version(file))
    return layout.groups[layout.find_group(row)].stored_size


@lru_cache(maxsize=_FILES_KEPT)
def find_layout(file: FilePlace, column: str, version: int) -> ColumnLayout:  # noqa: ARG001
    """Read where a column's images are from the footer of a file."""
    try:
        with open_place(file) as opened:
            footer = pq.read_metadata(opened)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file}: not a Parquet file, or broken ({error}).") from error
    paths = [footer.schema.column(number).path for number in range(footer.num_columns)]
    leaf = next((path for path in (f"{column}.bytes", column) if path in paths), None)
    if leaf is None:
        raise ValueError(f"{file} has no column {column!r} of images.")
    number = paths.index(leaf)
    described = footer.schema.column(number)
    groups, first_rows, row = [], [], 0
    for index in range(footer.num_row_groups):
        group = footer.row_group(index)
        chunk = group.column(number)
        statistics = chunk.statistics
        is_known = statistics is not None and statistics.has_null_count
        nulls = statistics.null_count if is_known else None
        obstacle = _find_obstacle(described, chunk, nulls)
        first_rows.append(row)
        size = chunk.total_compressed_size
        groups.append(
            _Group(row, chunk.data_page_offset, size, nulls != 0, nulls == group.num_rows, obstacle)
        )
        row += group.num_rows
    first_rows.append(row)  # behind the last one
    return ColumnLayout(leaf, tuple(groups), described.max_definition_level > 0, tuple(first_rows))


def _find_obstacle(described: Any, chunk: Any, nulls: int | None) -> str:
    """Say why a chunk is left to Arrow; empty if its pages are read here."""
    if described.physical_type != "BYTE_ARRAY" or described.max_repetition_level:
        return "not a flat column of bytes"
    if chunk.compression != "UNCOMPRESSED":
        return f"compressed with {chunk.compression}"
    if chunk.has_dictionary_page:
        return "written with a dictionary"
    if nulls is None and described.max_definition_level:
        return "no statistics, which would count the rows without an image"
    return "rows without an image among them" if nulls else ""


def _read_from_pages(
    file: FilePlace, key: tuple[Hashable, ...], layout: ColumnLayout, group: _Group, within: int
) -> bytes:
    with open_place(file) as opened:
        chunk = _chunks.find(key, lambda: (_Chunk(group.start), 1))
        page, number = _find_page(opened, chunk, group, within)

        def locate() -> tuple[tuple[Integers, Integers], int]:
            found = find_values(opened, page, has_levels=layout.has_levels)
            return found, found[0].nbytes * 2

        starts, sizes = _values.find((*key, number), locate)
        position = within - chunk.first_rows[number]
        return read_at(opened, int(sizes[position]), int(starts[position]))


def _find_page(opened: io.RawIOBase, chunk: _Chunk, group: _Group, within: int) -> tuple[Page, int]:
    """Return the page of a row, and its number; headers are read up to it."""
    end = group.start + group.stored_size
    with _finding:
        while chunk.next_row <= within:
            if chunk.position >= end:
                raise UnknownLayoutError("pages end before their rows")
            page = read_page(opened, chunk.position, end)
            chunk.position = page.end
            chunk.pages.append(page)
            chunk.first_rows.append(chunk.next_row)
            chunk.next_row += page.num_values
        number = bisect_right(chunk.first_rows, within) - 1
        return chunk.pages[number], number


def _read_with_arrow(
    file: FilePlace, key: tuple[Hashable, ...], layout: ColumnLayout, group: int, within: int
) -> bytes | None:
    """Read a value out of a row group that Arrow decodes."""

    def decode() -> tuple[Any, int]:
        column = read_group_column(file, layout.leaf, group)
        # Arrow takes some damaged page headers for the end of the group.
        if len(column) != layout.first_rows[group + 1] - layout.first_rows[group]:
            raise ValueError(f"{file}: row group {group} is broken. Download the file again.")
        return column, column.nbytes

    value = _tables.find(key, decode)[within].as_py()
    return None if value is None else bytes(value)


def read_group_column(file: FilePlace, leaf: str, group: int) -> Any:
    """Read the bytes of a column in one row group."""
    try:
        with open_place(file) as source, pq.ParquetFile(source) as opened:
            column = opened.read_row_group(group, columns=[leaf], use_threads=False).column(0)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file}: row group {group} cannot be read ({error}).") from error
    if pa.types.is_struct(column.type):
        column = pa.chunked_array([chunk.flatten()[0] for chunk in column.chunks])
    return column
