"""Reads CSV in UTF-8, with or without a byte order mark.

The first row is the header. Cells are quoted as in RFC 4180.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from ..._suggestions import counted
from ..record_fields import RawRecord
from ..validation_errors import ErrorCollector

_LARGEST_CELL = 2**26  # characters; some files have base64 images next to captions


def read_csv_file(file: Path, name: str, errors: ErrorCollector) -> Iterator[RawRecord]:
    """Yield a raw record per row: a text, named by its row number from 0.

    An empty cell is treated as an absent field. CSV is only for texts; records with images use JSON
    lines, Parquet or tar.
    """
    rows = _iterate_cells(file, name)
    try:
        _, header = next(rows, (0, []))
        if len(set(header)) < len(header):
            errors.add("two columns of one name", name)
            return
        for number, (_, row) in enumerate(rows):
            place = f"{name} row {number}"
            if len(row) != len(header):
                errors.add("not as many cells as columns", place)
                continue
            fields = {field: cell for field, cell in zip(header, row, strict=True) if cell}
            yield RawRecord(place, fields, text_name=f"{name}/{number}")
    except ValueError as error:
        errors.add("not CSV, or not UTF-8", f"{name} ({error})")


def iterate_csv(
    file: Path, *, check: Callable[[list[str]], object] = list, fill: bool = False
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the line number of each row, and its cells by column name.

    `check` receives the header and may raise. With `fill`, a row may have fewer cells than the
    header.
    """
    rows = _iterate_cells(file, str(file))
    _, header = next(rows, (0, []))
    check(header)
    if repeated := [column for column, count in Counter(header).items() if count > 1]:
        raise ValueError(f"{file} has two columns named {repeated[0]!r}. Rename one.")
    for number, row in rows:
        row += [""] * (len(header) - len(row) if fill else 0)
        if len(row) != len(header):
            raise ValueError(
                f"{file} line {number}: {counted(len(row), 'cell')} for "
                f"{counted(len(header), 'column')}. Quote cells that contain commas or line breaks."
            )
        yield number, dict(zip(header, row, strict=True))


def _iterate_cells(file: Path, name: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the line number and the cells of each row that is not empty."""
    csv.field_size_limit(max(_LARGEST_CELL, csv.field_size_limit()))  # for the whole process
    with file.open(encoding="utf-8-sig", newline="") as opened:
        rows = csv.reader(opened, strict=True)
        try:
            yield from ((rows.line_num, row) for row in rows if row)
        except csv.Error as error:
            raise ValueError(
                f"{name} line {rows.line_num}: {error}. Quote cells that contain quotes, and "
                "double the quotes inside."
            ) from error
