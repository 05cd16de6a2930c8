"""Reads CSV: a header with the names of fields, then a text per row.

Only files of texts are CSV; records of images are in JSON lines, Parquet or tar. Cells are texts,
and an empty one means that a field is absent.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from ..record_fields import RawRecord
from ..validation_errors import ErrorCollector


def read_csv_file(file: Path, name: str, errors: ErrorCollector) -> Iterator[RawRecord]:
    """Yield a raw record per row."""
    with file.open(encoding="utf-8-sig", newline="") as opened:
        rows = csv.reader(opened, strict=True)
        try:
            header = next(rows, [])
            if len(set(header)) < len(header):
                errors.add("two columns of one name", name)
                return
            for number, row in enumerate(row for row in rows if row):
                place = f"{name} row {number}"
                if len(row) != len(header):
                    errors.add("not as many cells as columns", place)
                    continue
                fields = {field: cell for field, cell in zip(header, row, strict=True) if cell}
                yield RawRecord(place, fields, text_name=f"{name}/{number}")
        except (csv.Error, UnicodeDecodeError) as error:
            errors.add("not CSV, or not UTF-8", f"{name} after line {rows.line_num} ({error})")
