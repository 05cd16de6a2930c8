"""Reads Parquet through `datasets`: a row is a record.

An image is a path, or `datasets`' image `{bytes, path}`, or the encoded image alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..image_sources import ParquetImage, import_datasets, open_table
from ..records import RawRecord
from ..validation_errors import ErrorCollector

_ROWS_AT_ONCE = 1000
_PACKED = object()  # an image whose bytes are in the file


def read_parquet(
    files: Sequence[Path],
    base: Path,
    errors: ErrorCollector,
    *,
    columns: Mapping[str, str] | None = None,
    only: Mapping[str, str] | None = None,
) -> Iterator[RawRecord]:
    """Yield a raw record per row; the bytes of images are not read.

    Args:
        files: Parquet files, in their order.
        base: folder that names and places are relative to.
        errors: gets the files that cannot be read, and those that lack a column.
        columns: field of a record to the column that holds it, such as
            `{"image": "img", "file_name": "id", "captions": "raw"}`; other columns are not read.
            Default: every column, named as the fields of a record.
        only: column to the value that a row must have, such as `{"split": "test"}`; other rows are
            skipped.

    Yields:
        The records, without the fields that are null.
    """
    only = only or {}
    for file in files:
        name = file.relative_to(base).as_posix()
        table = _open(file, name, errors)
        if table is None:
            continue
        sources = columns or {column: column for column in table.column_names}
        lost = {*sources.values(), *only} - set(table.column_names)
        if lost:
            errors.add(f"no column {', '.join(sorted(lost))}", name)
            continue
        for number, row, paths in _read_rows(file, table, {*sources.values(), *only}):
            if any(row[column] != value for column, value in only.items()):
                continue
            fields = {field: row[column] for field, column in sources.items()}
            path = paths.get(sources.get("image", ""))
            yield _make_record(f"{name} row {number}", fields, f"{name}/{path or number}")


def iterate_rows(
    files: Sequence[Path], base: Path, errors: ErrorCollector
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of Parquet files whose rows are not records, such as pairs of images.

    Args:
        files: Parquet files, in their order.
        base: folder that places are relative to.
        errors: gets the files that cannot be read.

    Yields:
        The place of the row, for errors, and its columns; an image whose bytes are in the file is
        a `ParquetImage`.
    """
    for file in files:
        name = file.relative_to(base).as_posix()
        table = _open(file, name, errors)
        if table is not None:
            for number, row, _ in _read_rows(file, table, table.column_names):
                yield f"{name} row {number}", row


def _open(file: Path, name: str, errors: ErrorCollector) -> Any:
    """Open a file; None if it cannot be read, which is noted."""
    broken = (import_datasets().exceptions.DatasetGenerationError, ValueError, OSError)
    try:
        return open_table(file)
    except broken as error:
        reason = str(error.__cause__ or error).partition("\n")[0]
        errors.add("not a Parquet file, or broken", f"{name} ({reason})")
        return None


def _make_record(place: str, fields: dict[str, Any], default_name: str) -> RawRecord:
    given = {name: value for name, value in fields.items() if value is not None}
    packed = None
    if isinstance(given.get("image"), ParquetImage):
        packed = given.pop("image")
    return RawRecord(place, given, packed=packed, default_name=default_name)


def _read_rows(
    file: Path, table: Any, columns: Collection[str]
) -> Iterator[tuple[int, dict[str, Any], dict[str, str | None]]]:
    """Yield number and columns of each row, and the path that each packed image came with."""
    chosen = table.data.select([name for name in table.column_names if name in columns])
    for start in range(0, len(table), _ROWS_AT_ONCE):
        part = chosen.slice(start, _ROWS_AT_ONCE)
        read = {name: _read_column(part.column(name)) for name in part.column_names}
        for offset in range(min(_ROWS_AT_ONCE, len(table) - start)):
            row: dict[str, Any] = {}
            paths: dict[str, str | None] = {}
            for name, (values, packed_paths) in read.items():
                row[name] = values[offset]
                if row[name] is _PACKED:
                    row[name] = ParquetImage(file, name, start + offset)
                    paths[name] = packed_paths[offset]
            yield start + offset, row, paths


def _read_column(column: Any) -> tuple[list[Any], list[Any]]:
    """Return the values, `_PACKED` for the bytes of an image, and the paths of images."""
    values: list[Any] = []
    paths: list[Any] = []
    for chunk in column.chunks:
        kind = str(chunk.type)
        names = []
        if kind.startswith("struct"):
            names = [chunk.type.field(index).name for index in range(chunk.type.num_fields)]
        nothing = [None] * len(chunk)
        valid = chunk.is_valid().to_pylist()
        if {"bytes", "path"} & set(names):
            # Fields of a struct are read without the others: no image's bytes are touched.
            of_chunk = chunk.field("path").to_pylist() if "path" in names else nothing
            packed = chunk.field("bytes").is_valid().to_pylist() if "bytes" in names else nothing
            values += [
                (_PACKED if has_bytes else path) if is_there else None
                for path, has_bytes, is_there in zip(of_chunk, packed, valid, strict=True)
            ]
            paths += of_chunk
        else:
            is_binary = "binary" in kind
            values += [_PACKED if v else None for v in valid] if is_binary else chunk.to_pylist()
            paths += nothing
    return values, paths
