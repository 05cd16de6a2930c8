"""Finds single values in uncompressed pages of a Parquet file, as the format specifies them.

Arrow decodes whole row groups, which for one image costs as much as for a thousand. A column chunk
is a sequence of pages, each a header in Thrift's compact protocol and then its values; of images,
a page holds a few to a thousand. What is not understood here raises `UnknownLayoutError`, and the
caller leaves the row group to Arrow.
"""

from __future__ import annotations

import io
import struct
from typing import Any, NamedTuple, TypeAlias

import numpy as np

Integers: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
_DATA_PAGE, _DATA_PAGE_V2 = 0, 3
_PLAIN, _RLE = 0, 3  # encodings of values, and of levels
_HEADER_READ = 256  # bytes; headers with long statistics are read again
_LONGEST_HEADER = 2**20


class UnknownLayoutError(ValueError):
    """The pages of a chunk are not laid out as this module reads them."""


class Page(NamedTuple):
    """One page of a column chunk.

    Attributes:
        start: Offset of what follows the header.
        end: Offset behind the page.
        num_values: Number of values.
        level_size: Bytes of levels in front of the values; None if their length is in front.
    """

    start: int
    end: int
    num_values: int
    level_size: int | None


def read_at(file: io.RawIOBase, size: int, offset: int) -> bytes:
    """Read bytes of an open file."""
    file.seek(offset)
    content = file.read(size)
    while len(content) < size:
        more = file.read(size - len(content))
        if not more:
            raise UnknownLayoutError(f"the file ends before byte {offset + size}")
        content += more
    return content


def read_page(file: io.RawIOBase, offset: int, end: int) -> Page:
    """Read the header of a page in a column chunk that ends at `end`."""
    wanted = _HEADER_READ
    while True:
        content = read_at(file, min(wanted, end - offset), offset)
        try:
            header, length = read_struct(content)
            break
        except (IndexError, struct.error) as error:
            if wanted >= min(_LONGEST_HEADER, end - offset):
                raise UnknownLayoutError(f"no page header at byte {offset}") from error
            wanted *= 16
    try:
        page = _make_page(header, offset + length)
    except (KeyError, TypeError) as error:
        raise UnknownLayoutError(f"the page header at byte {offset} lacks a field") from error
    if not page.start <= page.end <= end or page.num_values < 0 or (page.level_size or 0) < 0:
        raise UnknownLayoutError(f"the page at byte {offset} exceeds its column chunk")
    return page


def _make_page(header: dict[int, Any], start: int) -> Page:
    kind, end = header[1], start + header[3]
    if kind == _DATA_PAGE and (of := header[5])[2] == _PLAIN and of[3] == _RLE:
        return Page(start, end, of[1], None)
    if kind == _DATA_PAGE_V2 and (of := header[8])[4] == _PLAIN:
        return Page(start, end, of[1], of[5] + of[6])
    raise UnknownLayoutError(f"a page of kind {kind} that is not plain")


def find_values(file: io.RawIOBase, page: Page, *, has_levels: bool) -> tuple[Integers, Integers]:
    """Find offset and size of each value of a page without nulls, which has its length in front."""
    position = page.start + (page.level_size or 0)
    if page.level_size is None and has_levels:
        position += 4 + int.from_bytes(read_at(file, 4, position), "little")
    starts, sizes = np.empty(page.num_values, np.int64), np.empty(page.num_values, np.int64)
    for number in range(page.num_values):
        if position + 4 > page.end:
            break
        size = int.from_bytes(read_at(file, 4, position), "little")
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
