"""Finds single values in the pages of a Parquet file, as the format specifies them.

Arrow decodes whole row groups, which for one image costs as much as for a thousand. A column chunk
is a sequence of pages, each a header in Thrift's compact protocol and then its values; of images,
a page holds a few to a thousand. What is not understood here raises `UnknownLayoutError`, and the
caller leaves the row group to Arrow.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

Integers: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
DATA_PAGE, DICTIONARY_PAGE, DATA_PAGE_V2 = 0, 2, 3
PLAIN, PLAIN_DICTIONARY, RLE_DICTIONARY = 0, 2, 8
_RLE = 3  # how levels are encoded
_HEADER_READ = 256  # bytes; headers with long statistics are read again
_LONGEST_HEADER = 2**20
# Names of codecs in the footer, and in Arrow. The older LZ4 has no fixed framing.
UNCOMPRESSED = "UNCOMPRESSED"
_CODECS = {"SNAPPY": "snappy", "GZIP": "gzip", "ZSTD": "zstd", "BROTLI": "brotli",
           "LZ4_RAW": "lz4_raw"}  # fmt: skip


class UnknownLayoutError(ValueError):
    """The pages of a chunk are not laid out as this module reads them."""


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a column chunk.

    Attributes:
        kind: `DATA_PAGE`, `DATA_PAGE_V2` or `DICTIONARY_PAGE`.
        start: of what follows the header, in the file.
        stored_size: bytes in the file.
        size: bytes after decompression.
        values: number of values, nulls included.
        encoding: of the values.
        level_size: bytes of levels in front of the values, for `DATA_PAGE_V2`.
        is_compressed: whether the values are, if the chunk has a codec.
    """

    kind: int
    start: int
    stored_size: int
    size: int
    values: int
    encoding: int
    level_size: int
    is_compressed: bool


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
    """Read the header of a page."""
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
    page = _make_page(header, offset + length)
    numbers = (page.stored_size, page.size, page.values, page.encoding, page.level_size)
    if not all(isinstance(number, int) and number >= 0 for number in numbers) or (
        page.start + page.stored_size > end
    ):
        raise UnknownLayoutError(f"the page at byte {offset} exceeds its column chunk")
    return page


def _make_page(header: dict[int, Any], start: int) -> Page:
    try:
        kind, size, stored = header[1], header[2], header[3]
        if kind == DATA_PAGE and header[5][3] == _RLE:
            of = header[5]
            return Page(kind, start, stored, size, of[1], of[2], 0, True)
        if kind == DICTIONARY_PAGE:
            of = header[7]
            return Page(kind, start, stored, size, of[1], of[2], 0, True)
        if kind == DATA_PAGE_V2:
            of = header[8]
            return Page(kind, start, stored, size, of[1], of[4], of[5] + of[6], of.get(7, True))
    except (KeyError, TypeError) as error:
        raise UnknownLayoutError(f"the page header before byte {start} lacks a field") from error
    raise UnknownLayoutError(f"a page of kind {kind}")


def decompress(codec: str, content: bytes, size: int) -> bytes:
    """Decompress the body of a page."""
    if codec not in _CODECS:
        raise UnknownLayoutError(f"compressed with {codec}")
    try:
        unpacked: bytes = pa.decompress(content, size, codec=_CODECS[codec], asbytes=True)
    except (OSError, pa.ArrowException) as error:
        raise UnknownLayoutError(f"not {codec}") from error
    return unpacked


def find_values(
    read: Callable[[int, int], bytes], start: int, end: int, count: int
) -> tuple[Integers, Integers]:
    """Find the values of a plain page, each of which has its length in front of it."""
    starts, sizes = np.empty(count, np.int64), np.empty(count, np.int64)
    position = start
    for number in range(count):
        if position + 4 > end:
            break
        size = int.from_bytes(read(4, position), "little")
        starts[number], sizes[number] = position + 4, size
        position += 4 + size
    if position != end:
        raise UnknownLayoutError("values do not fill their page")
    return starts, sizes


def decode_hybrid(content: bytes, bit_width: int, count: int) -> Integers:
    """Decode numbers that are stored as runs and as packed bits."""
    if bit_width == 0:
        return np.zeros(count, np.int64)
    if bit_width > 32:
        raise UnknownLayoutError(f"numbers of {bit_width} bits")
    parts, position, found = [], 0, 0
    try:
        while found < count:
            header, position = _read_varint(content, position)
            if header & 1:
                size = (header >> 1) * bit_width
                bits = np.unpackbits(
                    np.frombuffer(content, np.uint8, size, position), bitorder="little"
                )
                weights = 1 << np.arange(bit_width, dtype=np.int64)
                part = bits.reshape(-1, bit_width) @ weights
            else:
                size = (bit_width + 7) // 8
                value = int.from_bytes(content[position : position + size], "little")
                part = np.full(header >> 1, value, np.int64)
            position += size
            found += len(part)
            parts.append(part)
            if not len(part):
                raise UnknownLayoutError("an empty run")
    except (IndexError, ValueError) as error:
        raise UnknownLayoutError("runs end before their count") from error
    return np.concatenate([np.zeros(0, np.int64), *parts])[:count]


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
