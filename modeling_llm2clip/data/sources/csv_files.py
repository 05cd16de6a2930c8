"""Reads CSV and TSV, in UTF-8 with or without a byte order mark, also packed with gzip.

The first row has the names of the columns. Cells of CSV are quoted as in RFC 4180. In TSV, a quote
is part of its cell, unless it encloses all of it: others' quotes would join lines.
"""

from __future__ import annotations

import csv
import gzip
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from ..._suggestions import counted
from ..record_fields import RawRecord
from ..validation_errors import ErrorCollector

_LARGEST_CELL = 2**26  # characters: images in base64 may lie beside captions


def read_csv_file(file: Path, name: str, errors: ErrorCollector) -> Iterator[RawRecord]:
    """Yield a raw record per row: a text, named by its row from 0. Empty cells count as absent.

    Only texts are in CSV; records of images are in JSON lines, Parquet or tar.
    """
    rows = iterate_cells(file, name)
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
    file: Path, *, choose: Callable[[list[str]], list[str]] = list, fill: bool = False
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield line number and cells of each row, by the names of the columns that are chosen.

    Raises ValueError if a row has not as many cells as the header, or two of these have one name;
    with `fill` a row may have fewer.
    """
    rows = iterate_cells(file, str(file))
    _, header = next(rows, (0, []))
    chosen = choose(header)
    require_distinct(chosen, file)
    places = [header.index(column) for column in chosen]
    for number, row in rows:
        row += [""] * (len(header) - len(row) if fill else 0)
        if len(row) != len(header):
            raise ValueError(
                f"{file} line {number}: {counted(len(row), 'cell')} for "
                f"{counted(len(header), 'column')}. Cells with commas, tabs or line breaks "
                "need quotes, and CSV instead of TSV."
            )
        yield number, {column: row[place] for column, place in zip(chosen, places, strict=True)}


def require_distinct(columns: Sequence[str], file: Path) -> None:
    if repeated := [column for column, count in Counter(columns).items() if count > 1]:
        raise ValueError(f"{file} has two columns named {repeated[0]!r}. Rename one.")


def iterate_cells(file: Path, name: str) -> Iterator[tuple[int, list[str]]]:
    """Yield line number and cells of each row that is not empty, up to the first invalid one."""
    is_tsv = file.name.lower().removesuffix(".gz").endswith(".tsv")
    newline = "\n" if is_tsv else ""
    opened: IO[str]
    if file.suffix.lower() == ".gz":
        opened = gzip.open(file, "rt", encoding="utf-8-sig", newline=newline)
    else:
        opened = file.open(encoding="utf-8-sig", newline=newline)
    with opened:
        yield from _split_lines(opened, name) if is_tsv else _parse(opened, name)


def _parse(opened: IO[str], name: str) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(max(_LARGEST_CELL, csv.field_size_limit()))  # holds for the process
    rows = csv.reader(opened, strict=True)
    try:
        for row in rows:
            if row:
                yield rows.line_num, row
    except csv.Error as error:
        raise ValueError(
            f"{name} line {rows.line_num}: {error}. Put cells that begin with a quote into quotes, "
            "and double those inside."
        ) from error


def _split_lines(opened: IO[str], name: str) -> Iterator[tuple[int, list[str]]]:
    for number, ended in enumerate(opened, start=1):
        line = ended.rstrip("\r\n")
        if "\r" in line:  # a whole file with such ends would be one line, and have no rows
            raise ValueError(
                f"{name} line {number}: a carriage return without a line feed. Write a line feed "
                "where it ends a line, and a space where it is inside a cell."
            )
        if line:
            yield number, [_unquote(cell) for cell in line.split("\t")]


def _unquote(cell: str) -> str:
    inside = cell[1:-1]
    is_quoted = len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inside.replace('""', "")
    return inside.replace('""', '"') if is_quoted else cell
