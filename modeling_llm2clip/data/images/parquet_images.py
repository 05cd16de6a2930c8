"""Reads single images out of Parquet files where they lie.

Arrow decodes whole row groups, which for one image costs as much as for a thousand. A column chunk
is a sequence of pages, each a header in Thrift's compact protocol and then its values; of images,
a page holds a few to a thousand. In uncompressed pages, as `datasets` writes them, an image is one
read at its offset; pages that are laid out otherwise are left to Arrow, row group by row group. The
places of row groups and pages are kept, and the row groups that Arrow read last.
"""

from __future__ import annotations

import io
import struct
import warnings
from bisect import bisect_right
from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from threading import Lock
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from ..byte_cache import ByteCache
from ..remote.file_places import FilePlace, find_version, open_place

Integers: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
_FILES_KEPT = 2**14  # about 2 kB each
_CHUNKS_KEPT = 2**13  # about 3 kB each
_BYTES_KEPT = 2**26
_DATA_PAGE, _DATA_PAGE_V2 = 0, 3
_PLAIN, _RLE = 0, 3  # encodings of values, and of levels
_HEADER_READ = 256  # bytes; headers with long statistics are read again
_LONGEST_HEADER = 2**20


class UnknownLayoutError(ValueError):
    """The pages of a chunk are not laid out as this module reads them."""


class Page(NamedTuple):
    """One page of a column chunk, from the end of its header on.

    Before the values are `level_size` bytes of levels; None if their length is in front.
    """

    first_row: int
    start: int
    end: int
    num_values: int
    level_size: int | None


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


_pages: ByteCache[list[Page]] = ByteCache(_CHUNKS_KEPT)  # of a chunk, as far as they were found
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
def find_layout(file: FilePlace, column: str, version: Hashable) -> ColumnLayout:  # noqa: ARG001
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
        page = _find_page(opened, _pages.find(key, lambda: ([], 1)), group, within)

        def locate() -> tuple[tuple[Integers, Integers], int]:
            found = _find_values(opened, page, has_levels=layout.has_levels)
            return found, found[0].nbytes * 2

        starts, sizes = _values.find((*key, page.start), locate)
        position = within - page.first_row
        return _read_at(opened, int(sizes[position]), int(starts[position]))


def _find_page(opened: io.RawIOBase, pages: list[Page], group: _Group, within: int) -> Page:
    """Return the page of a row; headers are read up to it."""
    end = group.start + group.stored_size
    with _finding:
        last = pages[-1] if pages else Page(0, group.start, group.start, 0, 0)
        while last.first_row + last.num_values <= within:
            if last.end >= end:
                raise UnknownLayoutError("pages end before their rows")
            last = _read_page(opened, last.first_row + last.num_values, last.end, end)
            pages.append(last)
        return pages[bisect_right(pages, within, key=attrgetter("first_row")) - 1]


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


def _read_at(file: io.RawIOBase, size: int, offset: int) -> bytes:
    """Read bytes of an open file."""
    file.seek(offset)
    content = file.read(size)
    while len(content) < size:
        more = file.read(size - len(content))
        if not more:
            raise UnknownLayoutError(f"the file ends before byte {offset + size}")
        content += more
    return content


def _read_page(file: io.RawIOBase, first_row: int, offset: int, end: int) -> Page:
    """Read the header of a page in a column chunk that ends at `end`."""
    wanted = _HEADER_READ
    while True:
        content = _read_at(file, min(wanted, end - offset), offset)
        try:
            header, length = read_struct(content)
            break
        except (IndexError, struct.error) as error:
            if wanted >= min(_LONGEST_HEADER, end - offset):
                raise UnknownLayoutError(f"no page header at byte {offset}") from error
            wanted *= 16
    try:
        page = _make_page(header, first_row, offset + length)
    except (KeyError, TypeError) as error:
        raise UnknownLayoutError(f"the page header at byte {offset} lacks a field") from error
    if not page.start <= page.end <= end or page.num_values < 0 or (page.level_size or 0) < 0:
        raise UnknownLayoutError(f"the page at byte {offset} exceeds its column chunk")
    return page


def _make_page(header: dict[int, Any], first_row: int, start: int) -> Page:
    kind, end = header[1], start + header[3]
    if kind == _DATA_PAGE and (of := header[5])[2] == _PLAIN and of[3] == _RLE:
        return Page(first_row, start, end, of[1], None)
    if kind == _DATA_PAGE_V2 and (of := header[8])[4] == _PLAIN:
        return Page(first_row, start, end, of[1], of[5] + of[6])
    raise UnknownLayoutError(f"a page of kind {kind} that is not plain")


def _find_values(file: io.RawIOBase, page: Page, *, has_levels: bool) -> tuple[Integers, Integers]:
    """Find offset and size of each value of a page without nulls, which has its length in front."""
    position = page.start + (page.level_size or 0)
    if page.level_size is None and has_levels:
        position += 4 + int.from_bytes(_read_at(file, 4, position), "little")
    starts, sizes = np.empty(page.num_values, np.int64), np.empty(page.num_values, np.int64)
    for number in range(page.num_values):
        if position + 4 > page.end:
            break
        size = int.from_bytes(_read_at(file, 4, position), "little")
        starts[number], sizes[number] = position + 4, size
        position += 4 + size
    if position != page.end:
        raise UnknownLayoutError("values do not fill their page")
    return starts, sizes


def read_struct(content: bytes, position: int = 0) -> tuple[dict[int, Any], int]:
    """Read a struct of Thrift's compact protocol."""
    fields: dict[int, Any] = {}
    number = 0
    while kind := content[position]:
        position += 1
        if kind >> 4:
            number += kind >> 4
        else:
            number, position = _read_integer(content, position)
        fields[number], position = _read_value(content, position, kind & 15)
    return fields, position + 1


def _read_value(content: bytes, position: int, kind: int) -> tuple[Any, int]:
    if kind in (1, 2):  # true and false
        return kind == 1, position
    if kind == 3:
        return content[position], position + 1
    if kind in (4, 5, 6):
        return _read_integer(content, position)
    if kind == 7:
        return struct.unpack_from("<d", content, position)[0], position + 8
    if kind == 8:
        size, position = _read_varint(content, position)
        if position + size > len(content):
            raise IndexError("a text that ends later")
        return content[position : position + size], position + size
    if kind == 12:
        return read_struct(content, position)
    raise UnknownLayoutError(f"a field of type {kind} in a page header")


def _read_integer(content: bytes, position: int) -> tuple[int, int]:
    value, position = _read_varint(content, position)
    return (value >> 1) ^ -(value & 1), position


def _read_varint(content: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[position]
        position += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, position
