"""Reads a publisher's Parquet files through `datasets`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ....data.image_sources import ParquetImage, import_datasets, open_table
from ..dataset_spec import ReadRequest
from ..retrieval_dataset import EntryReader, RawRecord
from ..validation import DatasetValidator


@dataclass(frozen=True)
class Columns:
    """Which columns of a publisher's Parquet files hold what.

    Attributes:
        image, name, captions: names of columns; captions may be one text a row, or a list.
        only: columns of which other values are another part of the set, such as `split: test`.
        files: pattern of the files; `{lang}` is the language.
    """

    image: str
    name: str
    captions: str
    only: Mapping[str, str] = field(default_factory=dict)
    files: str = "**/*.parquet"


def read_either(
    request: ReadRequest, intake: DatasetValidator, *, columns: Columns, other: EntryReader
) -> Iterable[RawRecord]:
    """Read the folder's Parquet files where it has any, and the publisher's other form if not."""
    if has_parquet(request.folder):
        return _read_parquet(request, intake, columns=columns)
    return other(request, intake)


def has_parquet(folder: Path) -> bool:
    """Whether Parquet files lie in the folder or below it."""
    return folder.is_dir() and any(folder.rglob("*.parquet"))


def _read_parquet(
    request: ReadRequest, intake: DatasetValidator, *, columns: Columns
) -> Iterator[RawRecord]:
    """Yield one entry a row that the columns choose."""
    for place, file, row, fields in iterate_rows(request, intake, columns.files):
        missing = {columns.image, columns.name, columns.captions, *columns.only} - set(fields)
        if missing:
            intake.errors.add(f"no column {', '.join(sorted(missing))}", place)
            continue
        if any(fields[column] != value for column, value in columns.only.items()):
            continue
        captions = fields[columns.captions]
        name = fields[columns.name]
        texts = captions if isinstance(captions, list) else [captions]
        if name is None or not all(isinstance(text, str) for text in texts):
            intake.errors.add("no name, or captions that are no texts", place)
            continue
        image = ParquetImage(file, columns.image, row) if fields[columns.image] else None
        yield RawRecord(place, str(name), tuple(texts), image)


def iterate_rows(
    request: ReadRequest, intake: DatasetValidator, pattern: str
) -> Iterator[tuple[str, Path, int, dict[str, Any]]]:
    """Yield place, file, row and fields; of an image only whether it is there, not its bytes."""
    broken = (import_datasets().exceptions.DatasetGenerationError, ValueError, OSError)
    files = sorted(request.folder.glob(pattern.format(lang=request.lang)))
    if not files:
        raise ValueError(f"{intake.source}: no {pattern} in {request.folder} for {request.lang}.")
    for file in files:
        try:
            table = open_table(file)
        except broken as error:
            reason = str(error.__cause__ or error).partition("\n")[0]
            intake.errors.add("not a Parquet file, or broken", f"{file.name} ({reason})")
            continue
        images = [name for name, feature in table.features.items() if _is_image(feature)]
        texts = table.remove_columns(images)
        there = {name: table.data.column(name).is_valid().to_pylist() for name in images}
        for row, fields in enumerate(texts):
            yield (
                f"{file.name} row {row}",
                file,
                row,
                {**fields, **{name: there[name][row] for name in images}},
            )


def _is_image(feature: Any) -> bool:
    """Whether a column holds encoded images: `datasets`' own kind, or a struct with bytes."""
    return type(feature).__name__ == "Image" or (
        isinstance(feature, Mapping) and {"bytes", "path"} == set(feature)
    )
