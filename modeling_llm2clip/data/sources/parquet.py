"""Reads Parquet, one record per row.

An image is a path, a `{bytes, path}` struct as in `datasets`, or the encoded image itself. Image
bytes are not read here if the footer says that a row group has bytes in all rows, or in none.
Output of img2dataset is read without changes; see `download_notes.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from ..images.image_sources import ParquetImage
from ..images.parquet_images import find_column_layout, mark_images
from ..record_fields import RawRecord
from ..remote.file_locations import FileLocation, describe_states, open_file, require_unchanged
from ..remote.remote_access import AccessError, name_reading_error
from ..validation_errors import ErrorCollector
from .download_notes import (
    DOWNLOAD_COLUMNS,
    KEY,
    choose_download_columns,
    find_failure,
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
    """Yield a raw record per row, without reading image bytes.

    `columns` maps fields of a record to columns, such as `{"image": "img"}`. By default, every
    column is read as the field of the same name. `only` maps columns to required values; other rows
    are skipped.
    """
    describe_states(files)
    for file in files:
        name = file.relative_to(base).as_posix()
        yield from read_parquet_file(file, name, errors, columns=columns, only=only)


def read_parquet_file(
    file: FileLocation,
    name: str,
    errors: ErrorCollector,
    *,
    columns: Mapping[str, str] | None = None,
    only: Mapping[str, str] | None = None,
) -> Iterator[RawRecord]:
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
        errors.note_columns(sources, name)
    read = {*sources.values(), *only, *(DOWNLOAD_COLUMNS if is_downloaded else ())}
    for number, row, paths in _read_all(file, opened, read, name, errors):
        if any(row[column] != value for column, value in only.items()):
            continue
        if is_downloaded and (failure := find_failure(row)):
            errors.skip(failure)
            continue
        path = row[KEY] if is_downloaded else paths.get(sources.get("image", ""))
        default_name = f"{name}/{path if isinstance(path, str) and path.strip() else number}"
        values = {field: row[column] for field, column in sources.items()}
        fields = {field: value for field, value in values.items() if value is not None}
        packed = fields.pop("image") if isinstance(fields.get("image"), ParquetImage) else None
        yield RawRecord(f"{name} row {number}", fields, packed=packed, default_name=default_name)


def iterate_rows(
    files: Sequence[Path], base: Path, errors: ErrorCollector
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place and columns of each row in files of other content, such as image pairs.

    An image whose bytes are in the file becomes a `ParquetImage`.
    """
    describe_states(files)
    for file in files:
        name = file.relative_to(base).as_posix()
        opened = _open(file, name, errors)
        if opened is not None:
            columns = opened.schema_arrow.names
            for number, row, _ in _read_all(file, opened, columns, name, errors):
                yield f"{name} row {number}", row


def _open(file: FileLocation, name: str, errors: ErrorCollector) -> Any:
    """Open a file; if it cannot be read, record the error and return None."""
    try:
        return pq.ParquetFile(file if isinstance(file, Path) else open_file(file))
    except AccessError:
        raise
    except (pa.ArrowException, OSError) as error:
        _add_broken(name, error, errors)
        return None


def _add_broken(name: str, error: Exception, errors: ErrorCollector) -> None:
    reason = str(error).partition("\n")[0]
    errors.add(name_reading_error(error) or "not a Parquet file, or broken", f"{name} ({reason})")


_Row: TypeAlias = tuple[int, dict[str, Any], dict[str, Any]]


def _read_all(
    file: FileLocation, opened: Any, columns: Collection[str], name: str, errors: ErrorCollector
) -> Iterator[_Row]:
    """Yield the rows up to the first unreadable one, and record that error."""
    try:
        yield from _read_rows(file, opened, columns)
    except AccessError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        _add_broken(name, error, errors)


def _read_rows(file: FileLocation, opened: Any, columns: Collection[str]) -> Iterator[_Row]:
    """Yield the number and columns of each row, and the stored paths of its images.

    An image is a `ParquetImage`, or a path if the file does not contain the image's bytes.
    """
    schema = opened.schema_arrow
    kinds = {name: schema.field(name).type for name in schema.names if name in columns}
    packed = [name for name, kind in kinds.items() if is_image_type(kind)]
    with_path = [name for name in packed if has_field(kinds[name], "path")]
    plain = [name for name in kinds if name not in packed]
    start, read = 0, [*plain, *(f"{name}.path" for name in with_path)]
    for batch in opened.iter_batches(_ROWS_AT_ONCE, columns=read):
        paths: dict[str, list[Any]] = {name: [None] * batch.num_rows for name in packed}
        paths |= {name: batch.column(name).flatten()[0].to_pylist() for name in with_path}
        values = {name: batch.column(name).to_pylist() for name in plain} | paths
        for name in packed:
            if not pa.types.is_struct(kinds[name]) or has_field(kinds[name], "bytes"):
                values[name] = _find_addresses(file, name, start, paths[name])
        for offset in range(batch.num_rows):
            row, of_row = (
                {name: column[offset] for name, column in columns.items()}
                for columns in (values, paths)
            )
            yield start + offset, row, of_row
        start += batch.num_rows


def _find_addresses(file: FileLocation, column: str, start: int, paths: list[Any]) -> list[Any]:
    """Return `ParquetImage`s for consecutive rows; keep the paths of images without bytes."""
    state = require_unchanged(file)
    layout = find_column_layout(file, column, state)
    addresses, row = list(paths), start
    while row < start + len(paths):
        number = layout.find_group(row)
        has_bytes = mark_images(file, column, state, number)[row - layout.first_rows[number] :]
        for is_image in has_bytes[: start + len(paths) - row]:
            if is_image:
                addresses[row - start] = ParquetImage(file, column, row, layout.sizes[number])
            row += 1
    return addresses


def is_image_type(kind: Any) -> bool:
    """Return whether a column of this type holds images: `{bytes, path}`, or only bytes."""
    types = pa.types
    if types.is_struct(kind):
        parts = {kind.field(index).name: kind.field(index).type for index in range(kind.num_fields)}
        content = parts.get("bytes", pa.null())
        return bool(parts.keys() & {"bytes", "path"}) and (
            types.is_null(content) or (not types.is_struct(content) and is_image_type(content))
        )
    return bool(
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_binary_view(kind)
        or types.is_fixed_size_binary(kind)
    )


def has_field(kind: Any, name: str) -> bool:
    return bool(pa.types.is_struct(kind) and kind.get_field_index(name) >= 0)
