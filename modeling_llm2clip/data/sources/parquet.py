"""Reads Parquet: a row is a record.

An image is a path, or `datasets`' image `{bytes, path}`, or the encoded image alone. Bytes of
images are not read: the footer says which row groups have them all, or none. What img2dataset
writes is read as it is; see `download_notes.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from ..images.image_sources import ParquetImage
from ..images.parquet_images import ColumnLayout, find_layout, read_group_column
from ..record_fields import RawRecord, list_fields_read
from ..remote.file_places import FilePlace, find_version, open_place
from ..remote.remote_access import AccessError, name_reading_error
from ..validation_errors import ErrorCollector
from .download_notes import (
    DOWNLOAD_COLUMNS,
    KEY,
    choose_download_columns,
    describe_failure,
    has_failed,
    is_download,
)

_ROWS_AT_ONCE = 1000


def read_parquet(
    files: Sequence[Path],
    base: Path,
    errors: ErrorCollector,
    *,
    columns: Mapping[str, str] | None = None,
    only: Mapping[str, str] | None = None,
) -> Iterator[RawRecord]:
    """Yield a raw record per row; the bytes of images are not read.

    `columns` maps fields of a record to the columns that are read, such as `{"image": "img"}`; by
    default all are, by their names. `only` maps columns to the value that a row must have."""
    for file in files:
        name = file.relative_to(base).as_posix()
        yield from read_parquet_file(file, name, errors, columns=columns, only=only)


def read_parquet_file(
    file: FilePlace,
    name: str,
    errors: ErrorCollector,
    *,
    columns: Mapping[str, str] | None = None,
    only: Mapping[str, str] | None = None,
) -> Iterator[RawRecord]:
    """Yield a raw record per row of one file; the bytes of images are not read."""
    only = only or {}
    opened = _open(file, name, errors)
    if opened is None:
        return
    names = opened.schema_arrow.names
    if len(set(names)) < len(names):
        errors.add("two columns of one name", name)
        return
    sources = columns or {column: column for column in names}
    is_downloaded = columns is None and is_download(names)
    if is_downloaded:
        sources = choose_download_columns(names)
    lost = {*sources.values(), *only} - set(names)
    if lost:
        errors.add(f"no column {', '.join(sorted(lost))}", name)
        return
    if columns is None and opened.metadata.num_rows:
        errors.note_columns(list_fields_read(sources), name)
    read = {*sources.values(), *only, *(DOWNLOAD_COLUMNS if is_downloaded else ())}
    reader = _FileReader(file, opened, read)
    for number, row, paths in _read_all(reader, name, errors):
        if any(row[column] != value for column, value in only.items()):
            continue
        if is_downloaded and has_failed(row):
            errors.skip(describe_failure(row))
            continue
        fields = {field: row[column] for field, column in sources.items()}
        path = row[KEY] if is_downloaded else paths.get(sources.get("image", ""))
        has_path = path and path.strip()
        yield _make_record(f"{name} row {number}", fields, f"{name}/{path if has_path else number}")


def iterate_rows(
    files: Sequence[Path], base: Path, errors: ErrorCollector
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield place and columns of rows that are not records, such as pairs of images.

    An image whose bytes are in the file is a `ParquetImage`."""
    for file in files:
        name = file.relative_to(base).as_posix()
        opened = _open(file, name, errors)
        if opened is not None:
            reader = _FileReader(file, opened, opened.schema_arrow.names)
            for number, row, _ in _read_all(reader, name, errors):
                yield f"{name} row {number}", row


def _open(file: FilePlace, name: str, errors: ErrorCollector) -> Any:
    """Open a file; None if it cannot be read, which is noted."""
    try:
        return pq.ParquetFile(file if isinstance(file, Path) else open_place(file))
    except AccessError:
        raise
    except (pa.ArrowException, OSError) as error:
        _add_broken(name, error, errors)
        return None


def _add_broken(name: str, error: Exception, errors: ErrorCollector) -> None:
    reason = str(error).partition("\n")[0]
    kind = name_reading_error(error) or "not a Parquet file, or broken"
    errors.add(kind, f"{name} ({reason})")


def _make_record(place: str, fields: dict[str, Any], default_name: str) -> RawRecord:
    given = {name: value for name, value in fields.items() if value is not None}
    packed = None
    if isinstance(given.get("image"), ParquetImage):
        packed = given.pop("image")
    return RawRecord(place, given, packed=packed, default_name=default_name)


_Row: TypeAlias = tuple[int, dict[str, Any], dict[str, Any]]


def _read_all(reader: _FileReader, name: str, errors: ErrorCollector) -> Iterator[_Row]:
    """Yield the rows up to the first that cannot be read, which is noted."""
    try:
        yield from reader.read_rows()
    except AccessError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        _add_broken(name, error, errors)


class _FileReader:
    """Reads some columns of a file, but of images only whether they are there."""

    def __init__(self, file: FilePlace, opened: Any, columns: Collection[str]) -> None:
        self._file = file
        self._opened = opened
        schema = opened.schema_arrow
        self._columns = {n: schema.field(n).type for n in schema.names if n in columns}
        self._packed = {name for name, kind in self._columns.items() if is_image_type(kind)}

    def read_rows(self) -> Iterator[_Row]:
        """Yield number and columns of each row, and the path that each image came with."""
        with_path = {name for name in self._packed if _has_field(self._columns[name], "path")}
        leaves = [name for name in self._columns if name not in self._packed]
        start = 0
        read = [*leaves, *(f"{name}.path" for name in with_path)]
        for batch in self._opened.iter_batches(_ROWS_AT_ONCE, columns=read):
            size = batch.num_rows
            paths = dict.fromkeys(self._packed, [None] * size)
            paths |= {name: batch.column(name).flatten()[0].to_pylist() for name in with_path}
            values = {
                name: self._address(name, start, paths[name])
                if name in self._packed
                else batch.column(name).to_pylist()
                for name in self._columns
            }
            for offset in range(size):
                row, of_row = (
                    {name: column[offset] for name, column in columns.items()}
                    for columns in (values, paths)
                )
                yield start + offset, row, of_row
            start += size

    def _address(self, name: str, start: int, paths: list[Any]) -> list[Any]:
        """Return the addresses of images, or their paths where the file has no bytes of them."""
        kind = self._columns[name]
        if pa.types.is_struct(kind) and not _has_field(kind, "bytes"):
            return paths
        layout = find_layout(self._file, name, find_version(self._file))
        found, row = list(paths), start
        while row < start + len(paths):
            number = layout.find_group(row)
            group = layout.groups[number]
            end = min(start + len(paths), layout.first_rows[number + 1])
            there = self._find_bytes(name, layout, number)
            for one in range(row, end):
                if there[one - group.first_row]:
                    found[one - start] = ParquetImage(self._file, name, one, group.stored_size)
            row = end
        return found

    def _find_bytes(self, name: str, layout: ColumnLayout, number: int) -> Any:
        """Find which rows of a group have bytes; what was found of the last group is kept."""
        key = (name, number)
        if getattr(self, "_mask", (None,))[0] != key:
            group = layout.groups[number]
            if group.may_have_nulls and not group.has_only_nulls:  # only by reading the bytes
                mask = np.asarray(read_group_column(self._file, layout.leaf, number).is_valid())
            else:
                mask = np.full(
                    layout.first_rows[number + 1] - group.first_row, not group.has_only_nulls
                )
            self._mask = key, mask
        return self._mask[1]


def is_image_type(kind: Any) -> bool:
    """Tell whether a column of this type holds images: `{bytes, path}`, or bytes alone."""
    types = pa.types
    if types.is_struct(kind):
        names = {kind.field(index).name for index in range(kind.num_fields)}
        return bool(names & {"bytes", "path"})
    return any(
        is_bytes(kind)
        for is_bytes in (
            types.is_binary,
            types.is_large_binary,
            types.is_binary_view,
            types.is_fixed_size_binary,
        )
    )


def _has_field(kind: Any, name: str) -> bool:
    return bool(pa.types.is_struct(kind) and kind.get_field_index(name) >= 0)
