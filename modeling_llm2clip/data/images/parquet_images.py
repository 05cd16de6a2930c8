"""Reads single images out of Parquet files where they lie.

Of a file, row groups and their places are kept; of a column chunk, the places of its pages. An
image in uncompressed pages, as `datasets` writes them, is one read at its offset. Compressed pages
are decompressed whole, and the last ones are kept; a page may be a whole row group then, because
Arrow's writer puts all images of a group into one dictionary page.
"""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import lru_cache
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from ..byte_cache import ByteCache
from ..remote.file_places import FilePlace, find_version, open_place
from .parquet_pages import (
    DATA_PAGE_V2,
    DICTIONARY_PAGE,
    PLAIN,
    PLAIN_DICTIONARY,
    RLE_DICTIONARY,
    UNCOMPRESSED,
    Integers,
    Page,
    UnknownLayoutError,
    decode_hybrid,
    decompress,
    find_values,
    read_at,
    read_page,
)

_FILES_KEPT = 2**14  # about 2 kB each
_CHUNKS_KEPT = 2**13  # about 3 kB each
_BYTES_KEPT = 2**26


@dataclass(frozen=True)
class _Group:
    """The column's chunk of one row group."""

    first_row: int
    start: int
    stored_size: int
    may_have_nulls: bool
    has_only_nulls: bool
    codec: str


@dataclass(frozen=True)
class ColumnLayout:
    """Where the images of one column of a file are.

    Attributes:
        leaf: path of the bytes in the schema, such as `image.bytes`.
        groups: the row groups.
        max_level: definition level of a value that is not null.
        has_flat_bytes: whether pages hold byte strings, one a row at most.
        first_rows: of the groups, and the number of rows.
    """

    leaf: str
    groups: tuple[_Group, ...]
    max_level: int
    has_flat_bytes: bool
    first_rows: tuple[int, ...]

    def find_group(self, row: int) -> int:
        """Return the number of the row group that has a row."""
        return bisect_right(self.first_rows, row) - 1


@dataclass
class _Chunk:
    """The pages of a chunk that were found so far."""

    position: int
    next_row: int = 0
    dictionary: Page | None = None
    pages: list[Page] = field(default_factory=list)
    first_rows: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class _Values:
    """The values of a page: in memory, or (no content) in the file."""

    starts: Integers
    sizes: Integers
    content: bytes | None


_chunks: ByteCache[_Chunk] = ByteCache(_CHUNKS_KEPT)
_values: ByteCache[_Values] = ByteCache(_BYTES_KEPT)
_numbers: ByteCache[Integers] = ByteCache(_BYTES_KEPT // 8)
_tables: ByteCache[Any] = ByteCache(_BYTES_KEPT)
_finding = Lock()


def read_image_bytes(file: FilePlace, column: str, row: int) -> bytes:
    """Read the encoded image of a row."""
    version = find_version(file)
    layout = find_layout(file, column, version)
    number = layout.find_group(row)
    if not 0 <= number < len(layout.groups):
        raise ValueError(f"{file} has no row {row}.")
    group = layout.groups[number]
    within = row - group.first_row
    key = (file, version, column, number)
    try:
        if not layout.has_flat_bytes:
            raise UnknownLayoutError("not a flat column of bytes")
        content = _read_from_pages(file, key, layout, group, within)
    except UnknownLayoutError:
        content = _read_with_arrow(file, key, layout, number, within)
    if content is None:
        raise ValueError(f"{file}: row {row} has no image in {column!r}.")
    return content


def count_group_bytes(file: FilePlace, column: str, row: int) -> int:
    """Return how many bytes the column has in the row's group, as the footer states it."""
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
        start = chunk.data_page_offset
        if chunk.has_dictionary_page and chunk.dictionary_page_offset is not None:
            start = min(start, chunk.dictionary_page_offset)
        statistics = chunk.statistics
        is_known = statistics is not None and statistics.has_null_count
        nulls = statistics.null_count if is_known else None
        first_rows.append(row)
        size = chunk.total_compressed_size
        groups.append(
            _Group(row, start, size, nulls != 0, nulls == group.num_rows, chunk.compression)
        )
        row += group.num_rows
    is_flat = described.physical_type == "BYTE_ARRAY" and described.max_repetition_level == 0
    first_rows.append(row)  # behind the last one
    return ColumnLayout(
        leaf, tuple(groups), described.max_definition_level, is_flat, tuple(first_rows)
    )


def _read_from_pages(
    file: FilePlace, key: tuple[Hashable, ...], layout: ColumnLayout, group: _Group, within: int
) -> bytes | None:
    """Read a value of a chunk by the places of its pages; None if it is null."""
    with open_place(file) as opened:
        chunk = _chunks.find(key, lambda: (_Chunk(group.start), 1))
        page, number = _find_page(opened, chunk, group, within)
        position, count = within - chunk.first_rows[number], page.values
        is_plain = page.encoding == PLAIN
        if not is_plain or group.may_have_nulls:
            numbers = _numbers.find(
                (*key, number), lambda: _number_values(opened, page, group, layout.max_level)
            )
            position, count = int(numbers[position]), int(numbers.max()) + 1
            if position < 0:
                return None
        source = page if is_plain else chunk.dictionary
        if source is None:
            raise UnknownLayoutError("no dictionary in front of the pages")
        if not is_plain:
            number, count = -1, source.values
        values = _values.find(
            (*key, number), lambda: _locate(opened, source, count, group.codec, layout.max_level)
        )
        start, size = int(values.starts[position]), int(values.sizes[position])
        if values.content is None:
            return read_at(opened, size, start)
        return values.content[start : start + size]


def _find_page(opened: io.RawIOBase, chunk: _Chunk, group: _Group, within: int) -> tuple[Page, int]:
    """Return the page of a row, and its number; headers are read up to it."""
    end = group.start + group.stored_size
    with _finding:
        while chunk.next_row <= within:
            if chunk.position >= end:
                raise UnknownLayoutError("pages end before their rows")
            page = read_page(opened, chunk.position, end)
            chunk.position = page.start + page.stored_size
            if page.kind == DICTIONARY_PAGE:
                chunk.dictionary = page
            else:
                chunk.pages.append(page)
                chunk.first_rows.append(chunk.next_row)
                chunk.next_row += page.values
        number = bisect_right(chunk.first_rows, within) - 1
        return chunk.pages[number], number


def _number_values(
    opened: io.RawIOBase, page: Page, group: _Group, max_level: int
) -> tuple[Integers, int]:
    """Return the number of each row's value in a plain page, or in the dictionary; -1 for null."""
    body = _read_body(opened, page, group.codec)
    present = np.ones(page.values, bool)
    if max_level:
        present = _decode_levels(page, body, max_level) == max_level
    count = int(present.sum())
    numbers = np.full(page.values, -1, np.int64)
    if page.encoding == PLAIN:
        numbers[present] = np.arange(count)
    elif page.encoding in (RLE_DICTIONARY, PLAIN_DICTIONARY):
        start = _skip_levels(page, body[:4], max_level)
        if count:
            numbers[present] = decode_hybrid(body[start + 1 :], body[start], count)
    else:
        raise UnknownLayoutError(f"encoding {page.encoding}")
    return numbers, numbers.nbytes


def _read_body(opened: io.RawIOBase, page: Page, codec: str) -> bytes:
    """Read and decompress what follows the header; the levels of `DATA_PAGE_V2` are not packed."""
    stored = read_at(opened, page.stored_size, page.start)
    packed = stored[page.level_size :]
    if not page.is_compressed or not packed or codec == UNCOMPRESSED:
        return stored
    body = stored[: page.level_size] + decompress(codec, packed, page.size - page.level_size)
    if len(body) != page.size:
        raise UnknownLayoutError("a page of another size than its header says")
    return body


def _decode_levels(page: Page, body: bytes, max_level: int) -> Integers:
    """Decode the definition levels in front of the values."""
    if page.kind == DATA_PAGE_V2:
        encoded = body[: page.level_size]
    else:
        encoded = body[4 : 4 + int.from_bytes(body[:4], "little")]
    return decode_hybrid(encoded, max_level.bit_length(), page.values)


def _skip_levels(page: Page, first: bytes, max_level: int) -> int:
    """Return how many bytes of a body are levels, from its first four bytes."""
    if page.kind == DATA_PAGE_V2:
        return page.level_size
    if page.kind == DICTIONARY_PAGE or not max_level:
        return 0
    return 4 + int.from_bytes(first, "little")


def _locate(
    opened: io.RawIOBase, page: Page, count: int, codec: str, max_level: int
) -> tuple[_Values, int]:
    """Find the values of a plain page; uncompressed ones stay in the file."""
    if page.encoding not in (PLAIN, PLAIN_DICTIONARY):
        raise UnknownLayoutError(f"encoding {page.encoding}")
    if codec == UNCOMPRESSED or not page.is_compressed:
        first = read_at(opened, min(4, page.stored_size), page.start)
        start = page.start + _skip_levels(page, first, max_level)
        starts, sizes = find_values(
            lambda size, offset: read_at(opened, size, offset),
            start,
            page.start + page.stored_size,
            count,
        )
        return _Values(starts, sizes, None), starts.nbytes + sizes.nbytes
    body = _read_body(opened, page, codec)
    start = _skip_levels(page, body[:4], max_level)
    starts, sizes = find_values(
        lambda size, offset: body[offset : offset + size], start, len(body), count
    )
    return _Values(starts, sizes, body), len(body) + starts.nbytes + sizes.nbytes


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
