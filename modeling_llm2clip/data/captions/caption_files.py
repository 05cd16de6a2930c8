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

import gzip
import zlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from ..record_fields import LONG_CAPTION_FIELDS, SHORT_CAPTION_FIELDS, clean_text
from ..sources.csv_files import iterate_csv, require_distinct
from ..sources.json_files import iterate_lines, parse_object

JoinColumn = Literal["key", "url"]
_KEY_COLUMNS: dict[JoinColumn, tuple[str, ...]] = {
    "url": ("url", "URL", "Image Path"),
    "key": ("key", "Image Path", "file_name", "image"),
}
_SHORT = (*SHORT_CAPTION_FIELDS, "raw_caption", "org_caption")
_LONG = (*LONG_CAPTION_FIELDS, "re_caption")
_ROWS_AT_ONCE = 8192


class CaptionRow(NamedTuple):
    """Captions of one image, from one row.

    Attributes:
        key: URL or key; None if the row has none.
        captions: That are not blank, cleaned.
        long_captions: That are not blank, cleaned.
    """

    key: str | None
    captions: list[str]
    long_captions: list[str]


def read_caption_rows(
    source: str | Path, on: JoinColumn, *, key_column: str | None = None
) -> Iterator[list[CaptionRow]]:
    """Yield the rows of a file of captions, some thousands at a time."""
    for file in _find_files(Path(source)):
        rows, column = _read(file, key_column), None
        while part := list(islice(rows, _ROWS_AT_ONCE)):
            if column is None:
                column = _choose_column(file, part[0], on, key_column)
            yield [_make_row(row, column, on) for row in part]


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


def _read(file: Path, key_column: str | None) -> Iterator[dict[str, Any]]:
    wanted = {*_SHORT, *_LONG, *_KEY_COLUMNS["url"], *_KEY_COLUMNS["key"], key_column}

    def choose(names: Sequence[str]) -> list[str]:
        """Choose the columns to read: all of them, for the error, if none can be joined by."""
        chosen = [name for name in names if name in wanted]
        return chosen if set(chosen) - {*_SHORT, *_LONG} else list(names)

    name = file.name.lower().removesuffix(".gz")
    try:
        if name.endswith(".parquet"):
            with pq.ParquetFile(file) as opened:
                columns = choose(opened.schema_arrow.names)
                require_distinct(columns, file)
                for batch in opened.iter_batches(_ROWS_AT_ONCE, columns=columns):
                    yield from batch.to_pylist()
        elif name.endswith((".csv", ".tsv")):
            yield from (row for _, row in iterate_csv(file, choose=choose))
        elif name.endswith(".jsonl"):
            yield from _read_json_lines(file)
        else:
            raise ValueError(f"{file}: give .csv, .tsv, .jsonl or .parquet.")
    except (pa.ArrowException, UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{file}: broken ({error}). Download it again.") from error


def _read_json_lines(file: Path) -> Iterator[dict[str, Any]]:
    for number, line in iterate_lines(file):
        fields = parse_object(line)
        if isinstance(fields, str):
            raise ValueError(f"{file} line {number}: {fields}. Correct or remove it.")
        yield fields
