"""Joins captions that others published to records, by the URL or the key of their images.

Memory holds 12 bytes a record: the hashes of all keys in order, and where the captions of each are
in a temporary file. Both sides are read in batches, whatever their order. A hash finds a match, and
then the texts themselves must be equal.

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

import gzip
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from ..._suggestions import counted, list_first
from ..atomic_files import FREE_TEMPORARY_FOLDER, explain_full_disk, temporary_folder
from ..key_arrays import count_distinct
from ..record_fields import LONG_CAPTION_FIELDS, SHORT_CAPTION_FIELDS, clean_text
from ..records.record_columns import SCHEMA, hash_text, rebatch
from ..records.record_table import Array, RecordTable
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
_TEXTS = pa.list_(pa.string())
_SPOOL = pa.schema([("key", pa.string()), ("captions", _TEXTS), ("long_captions", _TEXTS)])


class CaptionRow(NamedTuple):
    """Cleaned captions of one image, none of them blank; None for a key or language it lacks."""

    key: str | None
    captions: list[str]
    long_captions: list[str]
    lang: str | None = None


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
    key_column: str | None = None,
    replace: bool = False,
    keep_unmatched: bool = True,
    output: Path | None = None,
) -> CaptionJoin:
    """Add published captions to records.

    Args:
        records: The records; joined by URL, they carry it, as img2dataset's do.
        captions_from: File of captions; see the top of this module.
        on: `url`, or `key`, which is the name of an image without folder and suffix.
        lang: Language of the captions; records in others count as without a row. Default: that of
            all records.
        key_column: Column that holds it. Default: one of the usual names.
        replace: Whether the joined captions replace a record's own, those of each length that the
            row has. Default: they come after them, without repeating one.
        keep_unmatched: Whether records without a row stay, with their own captions.
        output: Arrow file for the joined records, which is then mapped; None keeps them in memory.

    Returns:
        The joined records, in their order, and counts of both sides.

    Raises:
        ValueError: No record matches, records carry no URL or are in several languages of which
            none is named, a key is that of several images, or the file cannot be read.
        OSError: The temporary folder or the disk of `output` is full.

    Examples:
        >>> images = load_records("cc3m")  # doctest: +SKIP
        >>> joined = join_captions(images, "cc3m_captions.csv", on="url")  # doctest: +SKIP
        >>> print(joined)  # doctest: +SKIP
    """
    lang = _choose_language(records, lang)
    langs = (batch.column(0) for batch in records.iterate_columns(("lang",)))
    is_lang = np.concatenate([pa.compute.equal(found, lang) for found in langs])
    keys = _sort_keys(records.select(np.flatnonzero(is_lang)), on)
    with tempfile.TemporaryDirectory(dir=temporary_folder()) as folder, ExitStack() as stack:
        with _explain_full_disk(Path(folder)):
            counts = ErrorCollector()
            spool = _Spool(Path(folder) / "captions.arrow", keys, counts, lang)
            for rows in read_caption_rows(captions_from, on, key_column=key_column):
                spool.add(rows)
            spool.map(stack)
        if not spool.num_rows:
            shown = _show(counts.places.get(_NO_RECORD, ()), counts.counts[_NO_RECORD])
            raise ValueError(
                f"No record of {len(records)} matches a row of {captions_from} by {on}{shown}; "
                f"{counted(counts.counts[_OTHER_LANGUAGE], 'row')} in another language than "
                f"{lang!r}. Correct the file, or what it is joined by."
            )
        join = _Join(on, lang, spool, replace, keep_unmatched)
        table = _collect(map(join.fill, records.iterate_columns(SCHEMA.names)), output)
    table.skipped = dict(records.skipped)
    return CaptionJoin(
        records=table,
        matched=len(records) - counts.counts[_NO_ROW],
        unmatched_records=counts.counts[_NO_ROW],
        first_unmatched_records=tuple(counts.places.get(_NO_ROW, ())),
        unmatched_rows=counts.counts[_NO_RECORD],
        first_unmatched_rows=tuple(counts.places.get(_NO_RECORD, ())),
        repeated_rows=counts.counts[_REPEATED],
        other_language_rows=counts.counts[_OTHER_LANGUAGE],
    )


class _Spool:
    """Rows that match, in a file, found by the hash of their key.

    `keys` are the (N,) sorted hashes of the records' keys; `_places` has the row of the first of
    equal ones, or -1.
    """

    def __init__(self, file: Path, keys: Array, counts: ErrorCollector, lang: str) -> None:
        self._file, self._keys, self.counts, self._lang = file, keys, counts, lang
        self._places = np.full(len(keys), -1, np.int32)
        self._writer = pa.ipc.new_file(str(file), _SPOOL)
        self._starts = [0]

    @property
    def num_rows(self) -> int:
        return self._starts[-1]

    def add(self, rows: list[CaptionRow]) -> None:
        """Write the rows that match, one of each key."""
        named = [row for row in rows if row.key is not None and (row.captions or row.long_captions)]
        found, is_match = self._locate([row.key for row in named])
        kept: list[CaptionRow] = []
        for row, place, matches in zip(named, found.tolist(), is_match.tolist(), strict=True):
            if row.lang not in (None, self._lang):
                self.counts.add(_OTHER_LANGUAGE, str(row.key))
            elif not matches:
                self.counts.add(_NO_RECORD, str(row.key))
            elif self._places[place] >= 0:
                self.counts.add(_REPEATED, str(row.key))
            else:
                self._places[place] = self.num_rows + len(kept)
                kept.append(row)
        if kept:
            columns = zip(list(zip(*kept, strict=True))[:-1], _SPOOL, strict=True)
            arrays = [pa.array(column, field.type) for column, field in columns]
            self._writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=_SPOOL))
            self._starts.append(self.num_rows + len(kept))

    def map(self, stack: ExitStack) -> None:
        """Map the file, until the stack ends."""
        self._writer.close()
        reader = pa.ipc.open_file(stack.enter_context(pa.memory_map(str(self._file))))
        self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]

    def _locate(self, keys: Sequence[str | None]) -> tuple[Array, Array]:
        """Return the place of each key among those of the records, and whether it is there."""
        hashes = np.array([hash_text(key or "") for key in keys], np.int64)
        found = np.minimum(np.searchsorted(self._keys, hashes), len(self._keys) - 1)
        is_given = np.array([key is not None for key in keys], np.bool_)
        return found, (self._keys[found] == hashes) & is_given

    def find(self, keys: Sequence[str | None]) -> list[CaptionRow | None]:
        """Find the row of each key."""
        places, is_match = self._locate(keys)
        numbers = np.where(is_match, self._places[places], -1)
        found: list[CaptionRow | None] = [None] * len(keys)
        batches = np.searchsorted(self._starts, numbers, side="right") - 1
        for batch in np.unique(batches[numbers >= 0]).tolist():
            items = np.flatnonzero(batches == batch)
            rows = self._batches[batch].take(pa.array(numbers[items] - self._starts[batch]))
            columns = (column.to_pylist() for column in rows.columns)
            for item, row in zip(items.tolist(), map(CaptionRow, *columns), strict=True):
                found[item] = row
        return found


def _choose_language(records: RecordTable, lang: str | None) -> str:
    """Return the language of the captions: as it is given, or that of all records."""
    batches = records.iterate_columns(("lang",))
    found = sorted({one for batch in batches for one in batch.column(0).unique().to_pylist()})
    if lang is None and len(found) == 1:
        return str(found[0])
    if lang is None or lang not in found:
        given = "" if lang is None else f", and not in {lang!r}"
        raise ValueError(
            f"The records are in {', '.join(map(repr, found))}{given}. Name the language of the "
            "captions by lang (--captions-lang): records in other languages do not get them."
        )
    return lang


def _sort_keys(records: RecordTable, on: JoinColumn) -> Array:
    """Return the hashes of all keys in order; (N,) int64, equal ones included."""
    keys, stop = np.empty(len(records), np.int64), 0
    for batch in records.iterate_columns([_COLUMNS[on]]):
        found = [key for key in _list_keys(batch, on) if key is not None]
        start, stop = stop, stop + len(found)
        keys[start:stop] = [hash_text(key) for key in found]
    if stop == 0:
        raise ValueError(
            f"None of {len(records)} records has a {on}. Join by the other, or load a source whose "
            "records have one."
        )
    keys = keys[:stop]
    keys.sort()
    if on == "key":
        num_keys = 1 + int((keys[1:] != keys[:-1]).sum())
        num_names = count_distinct(partial(records.iterate_numbers, "name_key"), len(records))
        if num_keys < num_names:
            raise ValueError(
                f"{num_names} images have {num_keys} keys: some are those of several images, as "
                "happens with several datasets. Load each dataset alone, or join by url."
            )
    return keys


def _list_keys(batch: Any, on: JoinColumn) -> list[str | None]:
    values = batch.column(_COLUMNS[on]).to_pylist()
    if on == "url":
        return [None if value is None else value.strip() for value in values]
    return [make_key(value) for value in values]


@dataclass
class _Join:
    """Adds the rows of a spool to records, and counts those without one."""

    on: JoinColumn
    lang: str
    spool: _Spool
    replace: bool
    keep_unmatched: bool

    def fill(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Return a batch of records with the captions of their rows."""
        langs = batch.column("lang").to_pylist()
        keys = [
            key if one == self.lang else None
            for key, one in zip(_list_keys(batch, self.on), langs, strict=True)
        ]
        rows = self.spool.find(keys)
        columns = {name: batch.column(name).to_pylist() for name in ("captions", "long_captions")}
        for item, (row, key) in enumerate(zip(rows, keys, strict=True)):
            if row is None:
                self.spool.counts.add(_NO_ROW, batch.column("name")[item].as_py())
                continue
            if row.key != key:
                raise ValueError(
                    f"The {self.on}s {key} and {row.key} have the same hash of 64 bits. Remove the "
                    "row of the second one."
                )
            for name, new in (("captions", row.captions), ("long_captions", row.long_captions)):
                if new:
                    own = [] if self.replace else columns[name][item]
                    columns[name][item] = list(dict.fromkeys([*own, *new]))
        joined = _replace_texts(batch, columns)
        if self.keep_unmatched:
            return joined
        return joined.filter(pa.array([row is not None for row in rows]))


def _replace_texts(batch: Any, columns: dict[str, list[list[str]]]) -> pa.RecordBatch:
    texts = zip(columns["captions"], columns["long_captions"], strict=True)
    new = {
        **columns,
        "text_keys": [[hash_text(text) for text in (*short, *long)] for short, long in texts],
    }
    arrays = [
        pa.array(new[field.name], field.type) if field.name in new else batch.column(field.name)
        for field in SCHEMA
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)


def _collect(batches: Iterator[pa.RecordBatch], output: Path | None) -> RecordTable:
    """Make a table of batches of any length."""
    if output is None:
        return RecordTable(list(rebatch(batches)))
    unfinished = output.with_name(f"{output.name}.tmp")
    try:
        with _explain_full_disk(output.parent), pa.OSFile(str(unfinished), "wb") as opened:
            with pa.ipc.new_file(opened, SCHEMA) as writer:
                for batch in rebatch(batches):
                    writer.write_batch(batch)
        unfinished.replace(output)
    finally:
        unfinished.unlink(missing_ok=True)
    return RecordTable.open(output)


def _explain_full_disk(folder: Path) -> AbstractContextManager[None]:
    return explain_full_disk(folder, "for the joined captions", FREE_TEMPORARY_FOLDER)


def _show(names: Sequence[str], total: int) -> str:
    return f" ({list_first(names, total=total)})" if names else ""


def read_caption_rows(
    source: str | Path, on: JoinColumn, *, key_column: str | None = None
) -> Iterator[list[CaptionRow]]:
    """Yield the rows of a file of captions, some thousands at a time."""
    for file in _find_files(Path(source)):
        rows, column = enumerate(_read(file, key_column)), None
        while part := list(islice(rows, _ROWS_AT_ONCE)):
            if column is None:
                column = _choose_column(file, part[0][1], on, key_column)
            yield [_make_row(row, column, on, f"{file} row {number}") for number, row in part]


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
    known = {*_SHORT, *_LONG, *_KEY_COLUMNS["url"], *_KEY_COLUMNS["key"], key_column, "lang"}

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
    except (pa.ArrowException, UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{file}: broken ({error}). Download it again.") from error
