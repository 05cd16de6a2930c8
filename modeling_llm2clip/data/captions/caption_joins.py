"""Joins captions that others published to records, by the URL or the key of their images.

The keys of the records and the captions of their rows are in a temporary SQLite table, so memory
does not grow with either side. Both sides are read in batches, in any order.

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
| `lang` | language of the captions; rows in another one than the join's are counted and not used |
"""

from __future__ import annotations

import errno
import json
import sqlite3
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple
from uuid import uuid4

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from tqdm import tqdm

from ..._suggestions import counted, list_first
from ...configs.data_config import DataConfig
from ..atomic_files import FREE_TEMPORARY_FOLDER, explain_full_disk, temporary_folder
from ..key_arrays import count_distinct
from ..record_fields import LONG_CAPTION_FIELDS, SHORT_CAPTION_FIELDS, Modality, clean_text
from ..records.record_columns import SCHEMA, TEXTS, make_text_keys
from ..records.record_index import write_index
from ..records.record_loading import load_records
from ..records.record_table import CAPTION_COLUMNS, RecordTable
from ..sources.csv_files import iterate_csv, require_distinct
from ..sources.json_files import iterate_lines, parse_object
from ..validation_errors import ErrorCollector

JoinColumn = Literal["key", "url"]
_KEY_COLUMNS: dict[JoinColumn, tuple[str, ...]] = {
    "url": ("url", "URL", "Image Path"),
    "key": ("key", "Image Path", "file_name", "image"),
}
_COLUMNS: dict[JoinColumn, str] = {"url": "url", "key": "name"}  # of records
_SHORT = (*SHORT_CAPTION_FIELDS, "raw_caption", "org_caption")
_LONG = (*LONG_CAPTION_FIELDS, "re_caption")
_ROWS_AT_ONCE = 8192
_NO_ROW, _NO_RECORD, _REPEATED = "record without a row", "row without a record", "row repeated"
_OTHER_LANGUAGE = "row in another language"
# A cache of 64 MiB; the table is lost with its process anyway, so it needs no journal.
_CREATE = """
PRAGMA cache_size = -65536;
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
CREATE TABLE rows (key TEXT PRIMARY KEY, captions TEXT, long_captions TEXT) WITHOUT ROWID;
"""


class CaptionRow(NamedTuple):
    """Cleaned captions of one image, none of them blank; None for a key or language it lacks."""

    key: str | None
    captions: list[str]
    long_captions: list[str]
    lang: str | None


@dataclass(frozen=True)
class CaptionJoin:
    """Records with joined captions, and what did not match.

    Attributes:
        records: The records.
        matched: Number of records that got captions.
        unmatched_records: Number of records that got none.
        first_unmatched_records: Names of the first of them.
        unmatched_rows: Rows of captions without a record.
        first_unmatched_rows: URLs or keys of the first of them.
        repeated_rows: Rows of an image that an earlier row had already; they are not used.
        other_language_rows: Rows in another language, which are not used.
    """

    records: RecordTable
    matched: int
    unmatched_records: int
    first_unmatched_records: tuple[str, ...]
    unmatched_rows: int
    first_unmatched_rows: tuple[str, ...]
    repeated_rows: int
    other_language_rows: int

    def __str__(self) -> str:
        return (
            f"{counted(self.matched, 'record')} matched; without a row: {self.unmatched_records:,}"
            f"{_show(self.first_unmatched_records, self.unmatched_records)}; "
            f"{counted(self.unmatched_rows, 'row')} without a record"
            f"{_show(self.first_unmatched_rows, self.unmatched_rows)}; "
            f"{counted(self.repeated_rows, 'row')} for an image that has one; "
            f"{counted(self.other_language_rows, 'row')} in another language."
        )


def join_captions(
    records: RecordTable,
    captions_from: str | Path,
    *,
    on: JoinColumn,
    lang: str | None = None,
    replace: bool = False,
) -> CaptionJoin:
    """Add published captions to records.

    Args:
        records: The records; joined by URL, they carry it, as img2dataset's do.
        captions_from: File of captions; see the top of this module.
        on: `url`, or `key`, which is the name of an image without folder and suffix.
        lang: Language of the captions; records in others count as without a row. Default: that of
            all records.
        replace: Whether the joined captions replace a record's own, those of each length that the
            row has. Default: they come after them, without repeating one.

    Returns:
        The joined records, in their order, and counts of both sides. A large table is in the
        temporary folder while this process runs.

    Raises:
        ValueError: No record matches, records carry no URL or are in several languages of which
            none is named, a key is that of several images, or the file cannot be read.
        OSError: The temporary folder is full.

    Examples:
        >>> images = load_records("cc3m")  # doctest: +SKIP
        >>> joined = join_captions(images, "cc3m_captions.csv", on="url")  # doctest: +SKIP
        >>> print(joined)  # doctest: +SKIP
    """
    folder = temporary_folder()
    database, output = folder / f"{uuid4().hex}.sqlite", folder / f"{uuid4().hex}.arrow"
    try:
        with _explain_full_disk(folder), closing(sqlite3.connect(database)) as connection:
            join = _Join(on, _choose_language(records, lang), replace, connection)
            join.add_keys(records)
            for row in read_caption_rows(captions_from, on):
                join.add_row(row)
            counts, places = join.counts.counts, join.counts.places
            if not join.num_matching:
                raise ValueError(
                    f"No record of {len(records)} matches a row of {captions_from} by {on}"
                    f"{_show(places.get(_NO_RECORD, ()), counts[_NO_RECORD])}; "
                    f"{counted(counts[_OTHER_LANGUAGE], 'row')} in another language than "
                    f"{join.lang!r}. Correct the file, or what it is joined by."
                )
            table = write_index(map(join.fill, records.iterate_columns(SCHEMA.names)), output)
    finally:
        database.unlink(missing_ok=True)
    table.skipped = dict(records.skipped)
    return CaptionJoin(
        records=table,
        matched=len(records) - counts[_NO_ROW],
        unmatched_records=counts[_NO_ROW],
        first_unmatched_records=tuple(places.get(_NO_ROW, ())),
        unmatched_rows=counts[_NO_RECORD],
        first_unmatched_rows=tuple(places.get(_NO_RECORD, ())),
        repeated_rows=counts[_REPEATED],
        other_language_rows=counts[_OTHER_LANGUAGE],
    )


@contextmanager
def _explain_full_disk(folder: Path) -> Iterator[None]:
    with explain_full_disk(folder, "for the joined captions", FREE_TEMPORARY_FOLDER):
        try:
            yield
        except sqlite3.OperationalError as error:  # without a number of the operating system
            raise OSError(errno.ENOSPC, str(error)) from error


@dataclass
class _Join:
    """Brings rows to the records of one language by their keys, and counts what has no match."""

    on: JoinColumn
    lang: str
    replace: bool
    database: sqlite3.Connection
    counts: ErrorCollector = field(default_factory=ErrorCollector)
    num_matching: int = 0

    def add_keys(self, records: RecordTable) -> None:
        """Add the keys of the records."""
        self.database.executescript(_CREATE)
        num_records = 0
        for batch in records.iterate_columns((_COLUMNS[self.on], "lang")):
            keys = [(key,) for key in self._list_keys(batch) if key is not None]
            num_records += len(keys)
            self.database.executemany("INSERT OR IGNORE INTO rows (key) VALUES (?)", sorted(keys))
        if not num_records:
            raise ValueError(
                f"None of {len(records)} records has a {self.on}. Join by the other, or load a "
                "source whose records have one."
            )
        if self.on == "key":
            self._require_distinct(records)

    def _require_distinct(self, records: RecordTable) -> None:
        """Refuse keys that are those of several images."""
        (num_keys,) = self.database.execute("SELECT count(*) FROM rows").fetchone()
        is_lang = (
            pa.compute.equal(b.column(0), self.lang) for b in records.iterate_columns(("lang",))
        )
        records = records.select(np.concatenate(list(is_lang)))
        num_names = count_distinct(partial(records.iterate_numbers, "name_key"), len(records))
        if num_keys < num_names:
            raise ValueError(
                f"{num_names} images have {num_keys} keys: some are those of several images, as "
                "happens with several datasets. Load each dataset alone, or join by url."
            )

    def add_row(self, row: CaptionRow) -> None:
        """Add a row, unless its image has one already or no record."""
        if row.key is None or not (row.captions or row.long_captions):
            return
        if row.lang not in (None, self.lang):
            self.counts.add(_OTHER_LANGUAGE, row.key)
            return
        texts = json.dumps(row.captions), json.dumps(row.long_captions)
        updated = self.database.execute(
            "UPDATE rows SET captions = ?, long_captions = ? WHERE key = ? AND captions IS NULL",
            (*texts, row.key),
        )
        self.num_matching += updated.rowcount
        if not updated.rowcount:
            query = self.database.execute("SELECT 1 FROM rows WHERE key = ?", (row.key,))
            self.counts.add(_REPEATED if query.fetchone() else _NO_RECORD, row.key)

    def fill(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Return a batch of records with the captions of their rows."""
        columns = [batch.column(name).to_pylist() for name in CAPTION_COLUMNS]
        query = "SELECT captions, long_captions FROM rows WHERE key = ? AND captions NOT NULL"
        for item, key in enumerate(self._list_keys(batch)):
            row = self.database.execute(query, (key,)).fetchone()
            if row is None:
                self.counts.add(_NO_ROW, batch.column("name")[item].as_py())
                continue
            for column, new in zip(columns, map(json.loads, row), strict=True):
                if new:
                    old = [] if self.replace else column[item]
                    column[item] = list(dict.fromkeys([*old, *new]))
        for name, column in zip(CAPTION_COLUMNS, columns, strict=True):
            batch = batch.set_column(SCHEMA.get_field_index(name), name, pa.array(column, TEXTS))
        keys = make_text_keys([(*short, *long) for short, long in zip(*columns, strict=True)])
        return batch.set_column(SCHEMA.get_field_index("text_keys"), "text_keys", keys)

    def _list_keys(self, batch: pa.RecordBatch) -> list[str | None]:
        """List the keys of records; None for those without one, and in other languages."""
        names = batch.column(_COLUMNS[self.on]).to_pylist()
        clean = str.strip if self.on == "url" else make_key
        return [
            None if name is None or lang != self.lang else clean(name)
            for name, lang in zip(names, batch.column("lang").to_pylist(), strict=True)
        ]


def _choose_language(records: RecordTable, lang: str | None) -> str:
    """Return the language of the captions: as it is given, or that of all records."""
    batches = records.iterate_columns(("lang",))
    langs = sorted({name for batch in batches for name in batch.column(0).unique().to_pylist()})
    if lang is None and len(langs) == 1:
        return str(langs[0])
    if lang is None or lang not in langs:
        other = "" if lang is None else f", and not in {lang!r}"
        raise ValueError(
            f"The records are in {', '.join(map(repr, langs))}{other}. Name the language of the "
            "captions by lang (--captions-lang): records in other languages do not get them."
        )
    return lang


def _show(names: Sequence[str], total: int) -> str:
    return f" ({list_first(names, total=total)})" if names else ""


def read_caption_rows(source: str | Path, on: JoinColumn) -> Iterator[CaptionRow]:
    """Yield the rows of a file of captions."""
    for file in _find_files(Path(source)):
        column = None
        for number, row in enumerate(_read(file)):
            column = column or _choose_column(file, row, on)
            yield _make_row(row, column, on, f"{file} row {number}")


def make_key(name: str) -> str:
    """Return the key of an image: its name without folder and suffix."""
    return PurePosixPath(name).name.partition(".")[0]


def _make_row(row: dict[str, Any], column: str, on: JoinColumn, place: str) -> CaptionRow:
    value, lang = row.get(column), row.get("lang")
    key = None if value is None or not str(value).strip() else str(value).strip()
    if key is not None and on == "key":
        key = make_key(key)
    if not isinstance(lang, str | None):
        raise ValueError(f"{place}: 'lang' is {lang!r}, not a text. Correct it.")
    lang = (lang or "").strip() or None
    return CaptionRow(key, _list_texts(row, _SHORT, place), _list_texts(row, _LONG, place), lang)


def _list_texts(row: dict[str, Any], names: Sequence[str], place: str) -> list[str]:
    texts: dict[str, None] = {}
    for name in names:
        value = row.get(name)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(text, str | None) for text in values):
            raise ValueError(
                f"{place}: {name!r} is a {type(value).__name__}, not a text or a list of texts. "
                "Correct it."
            )
        texts |= dict.fromkeys(cleaned for text in values if text and (cleaned := clean_text(text)))
    return list(texts)


def _choose_column(file: Path, row: dict[str, Any], on: JoinColumn) -> str:
    column = next((name for name in _KEY_COLUMNS[on] if name in row), None)
    if column is None:
        raise ValueError(
            f"{file} has none of the columns {', '.join(_KEY_COLUMNS[on])}, but {', '.join(row)}. "
            f"Rename the one that holds the {on}."
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


def _read(file: Path) -> Iterator[dict[str, Any]]:
    known = {*_SHORT, *_LONG, *_KEY_COLUMNS["url"], *_KEY_COLUMNS["key"], "lang"}

    def choose(names: Sequence[str]) -> list[str]:
        """Choose the columns to read: all of them, for the error, if none can be joined by."""
        chosen = [name for name in names if name in known]
        return chosen if set(chosen) - {*_SHORT, *_LONG, "lang"} else list(names)

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
            for number, line in iterate_lines(file):
                fields = parse_object(line)
                if isinstance(fields, str):
                    raise ValueError(f"{file} line {number}: {fields}. Correct or remove it.")
                yield fields
        else:
            raise ValueError(f"{file}: give .csv, .tsv, .jsonl or .parquet.")
    except (pa.ArrowException, OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
        if getattr(error, "errno", None) is not None:  # of the disk, not of the content
            raise
        raise ValueError(f"{file}: broken ({error}). Download it again.") from error


def read_configured_records(
    data: str | Path,
    config: DataConfig,
    *,
    require_images: bool,
    check_images: bool | None,
    modality: Modality | None = None,
    show_progress: bool = True,
) -> RecordTable:
    """Read records as a `DataConfig` says; print to stderr the counts of rows left out."""
    records = load_records(
        data,
        image_dir=config.image_dir,
        require_images=require_images or bool(check_images),
        check_images=check_images,
        ignore_fields=config.ignore_fields,
        cache=config.cache,
        show_progress=show_progress,
        modality=modality,
    )
    for reason, count in records.skipped.items():
        tqdm.write(f"{data}: skipped {counted(count, 'row')}: {reason}.", file=sys.stderr)
    if config.captions_from is None:
        return records
    joined = join_captions(
        records,
        config.captions_from,
        on=config.join_on,
        lang=config.captions_lang,
    )
    tqdm.write(f"{config.captions_from}: {joined}", file=sys.stderr)
    return joined.records
