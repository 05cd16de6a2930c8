"""Reads files of captions that others published for images of known URLs or keys.

| file | what |
| --- | --- |
| `*.csv`, `*.csv.gz` | a header, then a row per image; quotes as in RFC 4180 |
| `*.tsv` | the same with tabs; a quote is part of its cell, unless it encloses all of it |
| `*.jsonl` | an object per line |
| `*.parquet`: a file, a folder, a pattern | a row per image |

Columns are named as the fields of a record, `captions`, `long_captions` and their published
variants, or as below; others are not read.

| column | meaning |
| --- | --- |
| `url`, `URL`, `Image Path` | joined by URL |
| `key`, `Image Path`, `file_name`, `image` | joined by key: the name without folder and suffix |
| `raw_caption`, `org_caption` | a caption |
| `re_caption` | a long caption, as Recap-DataComp-1B has it |
"""

from __future__ import annotations

import csv
import gzip
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal, NamedTuple

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from ..record_fields import LONG_CAPTION_FIELDS, SHORT_CAPTION_FIELDS, clean_text
from ..sources.json_files import iterate_lines, parse_object

JoinColumn = Literal["key", "url"]
_KEY_COLUMNS: dict[JoinColumn, tuple[str, ...]] = {
    "url": ("url", "URL", "Image Path"),
    "key": ("key", "Image Path", "file_name", "image"),
}
_SHORT = (*SHORT_CAPTION_FIELDS, "raw_caption", "org_caption")
_LONG = (*LONG_CAPTION_FIELDS, "re_caption")
_LARGEST_CELL = 2**26  # characters: images in base64 may lie beside captions
_ROWS_AT_ONCE = 8192


class CaptionRow(NamedTuple):
    """What a row says about an image.

    Attributes:
        key: URL or key; None if the row has none.
        captions: that are not blank, cleaned.
        long_captions: that are not blank, cleaned.
    """

    key: str | None
    captions: list[str]
    long_captions: list[str]


def read_caption_rows(
    source: str | Path, on: JoinColumn, *, key_column: str | None = None
) -> Iterator[list[CaptionRow]]:
    """Yield the rows of a file of captions, some thousands at a time."""
    for file in _find_files(Path(source)):
        column = None
        for rows in _read(file, key_column):
            if not rows:
                continue
            if column is None:
                column = _choose_column(file, rows[0], on, key_column)
            yield [_make_row(row, column, on) for row in rows]


def make_key(name: str) -> str:
    """Return the key of an image: its name without folder and suffix."""
    return PurePosixPath(name).name.partition(".")[0]


def _make_row(row: dict[str, Any], column: str, on: JoinColumn) -> CaptionRow:
    value = row.get(column)
    key = None if value is None or not str(value).strip() else str(value).strip()
    if key is not None and on == "key":
        key = make_key(key)
    return CaptionRow(key, _list_texts(row, _SHORT), _list_texts(row, _LONG))


def _list_texts(row: dict[str, Any], names: Sequence[str]) -> list[str]:
    found: dict[str, None] = {}
    for name in names:
        value = row.get(name)
        for text in [value] if isinstance(value, str) else value or ():
            if isinstance(text, str) and (cleaned := clean_text(text)):
                found[cleaned] = None
    return list(found)


def _choose_column(file: Path, row: dict[str, Any], on: JoinColumn, given: str | None) -> str:
    candidates = _KEY_COLUMNS[on] if given is None else (given,)
    column = next((name for name in candidates if name in row), None)
    if column is None:
        raise ValueError(
            f"{file} has none of the columns {', '.join(candidates)}, but {', '.join(row)}. Name "
            f"the one that holds the {on} by key_column."
        )
    if not set(row) & {*_SHORT, *_LONG}:
        raise ValueError(
            f"{file} has no column of captions. Rename it as a field of "
            "records, such as captions or long_captions."
        )
    return column


def _find_files(source: Path) -> list[Path]:
    if source.is_dir():
        files = sorted(source.glob("*.parquet"))
    elif "*" in str(source):
        files = sorted(source.parent.glob(source.name))
    else:
        files = [source] if source.is_file() else []
    if not files:
        raise ValueError(f"{source}: no such file of captions. Correct the path.")
    return files


def _choose(names: Sequence[str], wanted: Collection[str]) -> list[str]:
    """Choose the columns to read: all of them, for the error, if none can be joined by."""
    chosen = [name for name in names if name in wanted]
    return chosen if set(chosen) - {*_SHORT, *_LONG} else list(names)


def _read(file: Path, key_column: str | None) -> Iterator[list[dict[str, Any]]]:
    wanted = {*_SHORT, *_LONG, *_KEY_COLUMNS["url"], *_KEY_COLUMNS["key"]}
    if key_column is not None:
        wanted.add(key_column)
    name = file.name.lower().removesuffix(".gz")
    try:
        if name.endswith(".parquet"):
            yield from _read_parquet(file, wanted)
        elif name.endswith(".csv"):
            yield from _read_csv(file, wanted)
        elif name.endswith(".tsv"):
            yield from _read_tsv(file, wanted)
        elif name.endswith(".jsonl"):
            yield from _read_json_lines(file)
        else:
            raise ValueError(f"{file}: give .csv, .tsv, .jsonl or .parquet.")
    except (pa.ArrowException, UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{file}: broken ({error}). Download it again.") from error


def _read_parquet(file: Path, wanted: set[str]) -> Iterator[list[dict[str, Any]]]:
    with pq.ParquetFile(file) as opened:
        columns = _choose_distinct(file, opened.schema_arrow.names, wanted)
        for batch in opened.iter_batches(_ROWS_AT_ONCE, columns=columns):
            yield batch.to_pylist()


def _read_csv(file: Path, wanted: set[str]) -> Iterator[list[dict[str, Any]]]:
    csv.field_size_limit(max(_LARGEST_CELL, csv.field_size_limit()))  # there is one for a process
    with _open_text(file, newline="") as opened:
        rows = csv.reader(opened, strict=True)
        numbered = ((rows.line_num, row) for row in rows if row)
        try:
            yield from _make_dicts(file, numbered, wanted)
        except csv.Error as error:
            raise ValueError(
                f"{file} line {rows.line_num}: {error}. Put cells that begin with a quote into "
                "quotes, and double those inside."
            ) from error


def _read_tsv(file: Path, wanted: set[str]) -> Iterator[list[dict[str, Any]]]:
    """Read tab-separated lines, in which a quote at the beginning of a cell is part of a caption.

    Only a cell that is quoted from end to end loses its quotes. Others' quotes would join lines.
    """
    with _open_text(file, newline="\n") as opened:
        lines = ((number, line.rstrip("\r\n")) for number, line in enumerate(opened, start=1))
        numbered = ((n, _split_line(file, n, line)) for n, line in lines if line)
        yield from _make_dicts(file, numbered, wanted)


def _split_line(file: Path, number: int, line: str) -> list[str]:
    if "\r" in line:  # a whole file with such ends would be one line, and have no rows
        raise ValueError(
            f"{file} line {number}: a carriage return without a line feed. Write a line feed "
            "where it ends a line, and a space where it is inside a cell."
        )
    return [_unquote(cell) for cell in line.split("\t")]


def _open_text(file: Path, *, newline: str) -> IO[str]:
    if file.suffix.lower() == ".gz":
        return gzip.open(file, "rt", encoding="utf-8-sig", newline=newline)
    return file.open(encoding="utf-8-sig", newline=newline)


def _unquote(cell: str) -> str:
    inside = cell[1:-1]
    is_quoted = len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inside.replace('""', "")
    return inside.replace('""', '"') if is_quoted else cell


def _make_dicts(
    file: Path, rows: Iterator[tuple[int, list[str]]], wanted: set[str]
) -> Iterator[list[dict[str, Any]]]:
    """Make dictionaries of the columns that are read; the first row names all of them."""
    _, header = next(rows, (0, []))
    chosen = _choose_distinct(file, header, wanted)
    places = [header.index(name) for name in chosen]
    found: list[dict[str, Any]] = []
    for number, row in rows:
        if len(row) != len(header):
            raise ValueError(
                f"{file} line {number}: {len(row)} cells for {len(header)} columns. Cells with "
                "tabs or line breaks need quotes, and CSV instead of TSV."
            )
        found.append({name: row[place] for name, place in zip(chosen, places, strict=True)})
        if len(found) == _ROWS_AT_ONCE:
            yield found
            found = []
    yield found


def _choose_distinct(file: Path, names: Sequence[str], wanted: set[str]) -> list[str]:
    chosen = _choose(names, wanted)
    if repeated := [name for name, count in Counter(chosen).items() if count > 1]:
        raise ValueError(f"{file} has two columns named {repeated[0]!r}. Rename one.")
    return chosen


def _read_json_lines(file: Path) -> Iterator[list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    for number, line in iterate_lines(file):
        fields = parse_object(line)
        if isinstance(fields, str):
            raise ValueError(f"{file} line {number}: {fields}. Correct or remove it.")
        rows.append(fields)
        if len(rows) == _ROWS_AT_ONCE:
            yield rows
            rows = []
    yield rows
