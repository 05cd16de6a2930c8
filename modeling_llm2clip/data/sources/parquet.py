"""Reads Parquet through `datasets`: one row a record, columns as in the schema.

The column `image` is a path, or `datasets`' image `{bytes, path}`, or the encoded image alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..image_sources import ParquetImage, import_datasets, open_table
from ..records import RawRecord
from ..validation_errors import ErrorCollector

_ROWS_AT_ONCE = 1000


def read_parquet(files: Sequence[Path], base: Path, errors: ErrorCollector) -> Iterator[RawRecord]:
    """Yield one raw record a row; the bytes of images are left where they are.

    Args:
        files: Parquet files, in their order.
        base: folder that names are relative to.
        errors: gets the files that cannot be read.
    """
    broken = (import_datasets().exceptions.DatasetGenerationError, ValueError, OSError)
    for file in files:
        name = file.relative_to(base).as_posix()
        try:
            table = open_table(file)
        except broken as error:
            reason = str(error.__cause__ or error).partition("\n")[0]
            errors.add("not a Parquet file, or broken", f"{name} ({reason})")
            continue
        yield from _read_rows(file, name, table)


def _read_rows(file: Path, name: str, table: Any) -> Iterator[RawRecord]:
    columns = [column for column in table.column_names if column != "image"]
    has_image = "image" in table.column_names
    for start in range(0, len(table), _ROWS_AT_ONCE):
        rows = table.data.slice(start, _ROWS_AT_ONCE)
        texts = rows.select(columns).to_pylist() if columns else [{} for _ in range(len(rows))]
        images = _describe_images(rows.column("image")) if has_image else [None] * len(texts)
        for offset, (fields, image) in enumerate(zip(texts, images, strict=True)):
            number = start + offset
            place = f"{name} row {number}"
            given = {k: v for k, v in fields.items() if v is not None}
            if isinstance(image, str):
                given["image"] = image
            packed = ParquetImage(file, "image", number) if isinstance(image, tuple) else None
            inner = (image[0] if isinstance(image, tuple) else None) or str(number)
            yield RawRecord(place, given, packed=packed, default_name=f"{name}/{inner}")


def _describe_images(column: Any) -> list[str | tuple[str | None] | None]:
    """For each row: a path, or (the packed image's own path or None,), or None for no image."""
    described: list[str | tuple[str | None] | None] = []
    for chunk in column.chunks:
        kind = str(chunk.type)
        if kind.startswith("struct"):
            # Fields of a struct are read without the others: no image's bytes are touched.
            names = [chunk.type.field(index).name for index in range(chunk.type.num_fields)]
            nothing = [None] * len(chunk)
            paths = chunk.field("path").to_pylist() if "path" in names else nothing
            packed = chunk.field("bytes").is_valid().to_pylist() if "bytes" in names else nothing
            valid = chunk.is_valid().to_pylist()
            for path, has_bytes, is_there in zip(paths, packed, valid, strict=True):
                described.append((path,) if has_bytes and is_there else path if is_there else None)
        elif "binary" in kind:
            described += [
                (None,) if is_there else None for is_there in chunk.is_valid().to_pylist()
            ]
        else:
            described += chunk.to_pylist()
    return described
