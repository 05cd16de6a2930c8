"""Records of a dataset as columns that all processes share without loading all into memory.

A `RecordTable` is a sequence of `CaptionedImage`s that are created on access. Behind it is an Arrow
table, usually mapped from an index file (`record_index.py`). Code that needs all records works on
columns (`keys`, `group_keys`, `count_texts`) or in batches (`iterate_columns`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from ..._suggestions import MAX_LISTED, counted, list_first
from ..images.image_sources import ImageSource, count_bytes
from ..key_arrays import Array, find_first_rows, group_positions
from ..remote.file_locations import FileLocation, list_states, use_states
from ..remote.remote_files import FileInfo
from ..sources.json_files import parse_json
from .record_columns import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    NO_IMAGE,
    PLAIN_COLUMNS,
    ROWS_PER_BATCH,
    SCHEMA,
    count_captions,
    count_items,
    make_batches,
    make_image,
)
from .records import CaptionedImage

_RECORD_COLUMNS = (*PLAIN_COLUMNS, *IMAGE_COLUMNS)


class RecordTable(Sequence[CaptionedImage]):
    """A sequence of records, stored as columns.

    A table can be pickled for worker processes, which map the table's file again or receive a copy
    of the records in memory.

    Args:
        batches: Batches of `record_columns.SCHEMA` with `ROWS_PER_BATCH` rows each; the last one
            may be smaller.
        file: File that the batches are mapped from; None if the batches are in memory.
        rows: Rows of the batches that belong to the table, in the table's order; None for all rows.
        skipped: Reason why rows of the source are not records → number of such rows.

    Examples:
        >>> records = load_records("my-images")
        >>> len(records), records[0].captions[0]
        (20, 'Two dogs on a beach.')
    """

    def __init__(
        self,
        batches: Sequence[pa.RecordBatch],
        *,
        file: Path | None = None,
        rows: Array | None = None,
        skipped: Mapping[str, int] | None = None,
    ) -> None:
        self._batches = batches
        self.file = file
        self.rows = rows
        self.skipped = dict(skipped or {})
        self._length = sum(batch.num_rows for batch in batches) if rows is None else len(rows)

    @classmethod
    def from_records(cls, records: Iterable[CaptionedImage]) -> RecordTable:
        """Make an in-memory table of records.

        Args:
            records: Records; a `RecordTable` is returned unchanged.

        Raises:
            UnicodeEncodeError: A text has a lone surrogate, half of a character.
        """
        if isinstance(records, RecordTable):
            return records
        return cls(list(make_batches(records)))

    @classmethod
    def open(cls, file: Path) -> RecordTable:
        """Map an index file.

        Args:
            file: Arrow file of `record_columns.SCHEMA`.

        Raises:
            OSError: The file cannot be read.
            ValueError: The file is damaged, or has other columns.
        """
        with pa.memory_map(str(file)) as mapped:
            reader = pa.ipc.open_file(mapped)
            if reader.schema != SCHEMA:
                raise ValueError(f"{file} is not an index of records. Remove it.")
            batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        return cls(batches, file=file, skipped=read_skipped(file))

    def __reduce__(self) -> tuple[Callable[..., RecordTable], tuple[Any, ...]]:
        batches = list(self._batches) if self.file is None else []
        # Passed on so that workers notice image files that changed after the records were read.
        return _unpickle, (batches, self.file, self.rows, self.skipped, list_states())

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, item: int) -> CaptionedImage: ...
    @overload
    def __getitem__(self, item: slice) -> RecordTable: ...
    def __getitem__(self, item: int | slice) -> CaptionedImage | RecordTable:
        if isinstance(item, slice):
            return self.select(np.arange(*item.indices(len(self))))
        if not -len(self) <= item < len(self):
            raise IndexError(f"There is no record {item}: the dataset has {len(self)}.")
        return _make_record(*self.read(item % len(self), _RECORD_COLUMNS))

    def __iter__(self) -> Iterator[CaptionedImage]:
        for batch in self.iterate_columns(_RECORD_COLUMNS):
            yield from map(_make_record, *(column.to_pylist() for column in batch.columns))

    def iterate_images(self) -> Iterator[ImageSource | None]:
        """Yield the location of each record's image, in the table's order."""
        for batch in self.iterate_columns(IMAGE_COLUMNS):
            yield from map(make_image, *(column.to_pylist() for column in batch.columns))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str | bytes):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def select(self, rows: Sequence[int] | Array) -> RecordTable:
        """Return a table of some of the records; only row numbers are copied.

        Args:
            rows: Record numbers of this table, in any order, or an (N,) bool mask.

        Raises:
            IndexError: A number is out of range, or a mask has the wrong length.
        """
        return RecordTable(self._batches, file=self.file, rows=_shrink(self._locate(rows)))

    def _locate(self, rows: Sequence[int] | Array) -> Array:
        """Return the rows that records have in the batches."""
        numbers = np.asarray(rows) if len(rows) else np.empty(0, np.int64)
        if numbers.dtype == np.bool_ and numbers.shape == (len(self),):
            numbers = np.flatnonzero(numbers)
        is_valid = numbers.dtype.kind in "iu" and numbers.ndim == 1
        if not is_valid or (len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(self)):
            raise IndexError(
                f"rows must be record numbers from 0 to {len(self) - 1}, or a mask of {len(self)} "
                f"values, not {rows!r}."
            )
        return numbers if self.rows is None else self.rows[numbers]

    @property
    def keys(self) -> Array:
        """(N,) int64: hash of each record's name and language, copied from the columns."""
        return self.read_numbers("key")

    @property
    def group_keys(self) -> Array:
        """(N,) int64: hash of each record's group id, copied from the columns."""
        return self.read_numbers("group_key")

    def count_texts(self, rows: Array | None = None) -> tuple[Array, Array]:
        """Count the captions of each record.

        Args:
            rows: (M,) record numbers; None for all.

        Returns:
            Numbers of short and of long captions, (N,) or (M,) int32 each.
        """
        short, long = (self._read(name, count_items, np.int32, rows) for name in CAPTION_COLUMNS)
        return short, long

    def read_numbers(self, name: str, rows: Array | None = None) -> Array:
        """Read a column of numbers.

        Args:
            name: Name of the column.
            rows: (M,) record numbers; None for all.

        Returns:
            (N,) or (M,), in the column's dtype.
        """
        return self._read(name, np.asarray, SCHEMA.field(name).type.to_pandas_dtype(), rows)

    def _read(
        self, name: str, read: Callable[[pa.Array], Array], dtype: Any, rows: Array | None
    ) -> Array:
        """Read one number per record from a column."""
        if rows is None:
            values, stop = np.empty(len(self), dtype), 0
            for batch in self.iterate_columns((name,)):
                start, stop = stop, stop + batch.num_rows
                values[start:stop] = read(batch.column(0))
            return values
        located = self._locate(rows)
        values = np.empty(len(located), dtype)
        for number, positions in group_positions(located // ROWS_PER_BATCH):
            within = located[positions] - number * ROWS_PER_BATCH
            values[positions] = read(self._batches[number].column(name))[within]
        return values

    def read_text_keys(self, rows: Array, numbers: Array) -> Array:
        """Read the key of one caption of each record.

        Args:
            rows: (M,) record numbers.
            numbers: (M,) caption numbers within each record, where short captions come before long
                captions.

        Returns:
            (M,) int64.
        """
        located = self._locate(rows)
        keys = np.empty(len(located), np.int64)
        for number, positions in group_positions(located // ROWS_PER_BATCH):
            column = self._batches[number].column("text_keys")
            starts = np.asarray(column.offsets)[located[positions] - number * ROWS_PER_BATCH]
            keys[positions] = np.asarray(column.values)[starts + numbers[positions]]
        return keys

    def iterate_numbers(self, name: str) -> Iterator[Array]:
        """Yield a column of numbers in batches of `ROWS_PER_BATCH`, one batch in memory at a time.

        Args:
            name: Name of the column. Of a column of lists, all items are yielded.
        """
        for (column,) in self.iterate_columns((name,)):
            yield np.asarray(column.flatten() if isinstance(column, pa.ListArray) else column)

    def find_first_rows(self, name: str) -> Array:
        """Return, for each record, the first record with the same number in a column.

        Args:
            name: Name of the column.
        """
        return find_first_rows(partial(self.iterate_numbers, name), len(self))

    def iterate_counts(self) -> Iterator[tuple[Array, Array]]:
        """Yield the number of short and of long captions of each record, in batches."""
        yield from map(count_captions, self.iterate_columns(CAPTION_COLUMNS))

    def iterate_columns(self, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield the given columns in batches, in the table's order.

        Args:
            names: Names of the columns.

        Yields:
            Batches of at most `ROWS_PER_BATCH` rows.
        """
        if self.rows is None:
            yield from self._read_through(names)
            return
        for start in range(0, len(self.rows), ROWS_PER_BATCH):
            yield self._take(names, self.rows[start : start + ROWS_PER_BATCH])

    def _read_through(self, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield columns of all batches.

        A file is read, not mapped, because mapped pages would count as resident memory.
        """
        if self.file is None:
            for batch in self._batches:
                yield batch.select(list(names))
            return
        fields = [SCHEMA.get_field_index(name) for name in names]
        options = pa.ipc.IpcReadOptions(included_fields=fields)
        with pa.OSFile(str(self.file)) as opened:
            reader = pa.ipc.open_file(opened, options=options)
            for number in range(reader.num_record_batches):
                yield reader.get_batch(number).select(list(names))

    def read(self, item: int, names: Sequence[str]) -> tuple[Any, ...]:
        """Read the given columns of one record.

        Args:
            item: Number of the record.
            names: Names of the columns.
        """
        row = item if self.rows is None else int(self.rows[item])
        batch, within = self._batches[row // ROWS_PER_BATCH], row % ROWS_PER_BATCH
        return tuple(batch.column(name)[within].as_py() for name in names)

    def take(self, rows: Sequence[int] | Array, names: Sequence[str]) -> list[tuple[Any, ...]]:
        """Read the given columns of the given records.

        Args:
            rows: At most `ROWS_PER_BATCH` record numbers.
            names: Names of the columns.

        Returns:
            One tuple of column values per record.
        """
        if not len(rows):
            return []
        batch = self._take(names, self._locate(rows))
        return list(zip(*(column.to_pylist() for column in batch.columns), strict=True))

    def _take(self, names: Sequence[str], rows: Array) -> pa.RecordBatch:
        """Gather at most `ROWS_PER_BATCH` rows of the batches, in the given order."""
        parts, order = [], []
        for number, positions in group_positions(rows // ROWS_PER_BATCH):
            within = pa.array(rows[positions] - number * ROWS_PER_BATCH)
            parts.append(self._batches[number].select(list(names)).take(within))
            order.append(positions)
        if len(parts) == 1:
            return parts[0]
        back = np.argsort(np.concatenate(order))
        return pa.Table.from_batches(parts).combine_chunks().to_batches()[0].take(pa.array(back))


def skipped_file(file: Path) -> Path:
    """Return the path of the file next to an index that counts rows that are not records."""
    return file.with_suffix(".skipped.json")


def read_skipped(file: Path) -> dict[str, int]:
    """Read the number of rows in an index's source that are not records, by reason."""
    notes = skipped_file(file)
    skipped: dict[str, int] = parse_json(notes.read_text("utf-8")) if notes.is_file() else {}
    return skipped


def _shrink(rows: Array) -> Array:
    """Store row numbers in 4 bytes each, enough for two billion records."""
    fits = not len(rows) or int(rows.max()) < np.iinfo(np.int32).max
    return rows.astype(np.int32 if fits else np.int64)


def _make_record(*values: Any) -> CaptionedImage:
    name, group_id, lang, captions, long_captions, keywords, place, url, *address = values
    texts = tuple(captions), tuple(long_captions), tuple(keywords)
    return CaptionedImage(make_image(*address), name, group_id, *texts, lang, place, url)


def _unpickle(
    batches: Sequence[pa.RecordBatch],
    file: Path | None,
    rows: Array | None,
    skipped: Mapping[str, int],
    states: dict[FileLocation, FileInfo],
) -> RecordTable:
    use_states(states)
    if file is not None:
        batches = RecordTable.open(file)._batches
    return RecordTable(batches, file=file, rows=rows, skipped=skipped)


def require_images(records: RecordTable) -> None:
    """Check that there are records, and that every record has an image."""
    if not len(records):
        raise ValueError("There are no images. Use a dataset with at least one.")
    without = np.flatnonzero(records.read_numbers("image_kind") == NO_IMAGE)
    if len(without):
        names = (name for (name,) in records.take(without[:MAX_LISTED], ("name",)))
        raise ValueError(
            f"{counted(len(without), 'record')} without an image: "
            f"{list_first(names, total=len(without))}. Read the dataset with "
            "its images."
        )


def select_one_per_image(records: RecordTable) -> RecordTable:
    """Select the first record of each image."""
    firsts = find_first_records(records)
    is_first = firsts == np.arange(len(records), dtype=firsts.dtype)
    return records if is_first.all() else records.select(is_first)


def find_first_records(records: RecordTable) -> Array:
    """Return each record's first record with the same image; refuse a name of different images."""
    firsts = records.find_first_rows("name_key")
    again = np.flatnonzero(firsts != np.arange(len(records), dtype=firsts.dtype))
    ambiguous: dict[str, None] = {}
    for start in range(0, len(again), ROWS_PER_BATCH):
        rows = again[start : start + ROWS_PER_BATCH]
        sides = (records.take(numbers, IMAGE_COLUMNS) for numbers in (rows, firsts[rows]))
        for row, image, first in zip(rows.tolist(), *sides, strict=True):
            # Images with the same name may be copies, as in tar shards with a sample per language.
            if image != first and not _have_same_bytes(make_image(*image), make_image(*first)):
                ambiguous[records[row].name] = None
    if ambiguous:
        raise ValueError(
            f"{counted(len(ambiguous), 'name')} shared by several images: "
            f"{list_first(ambiguous)}. Give every image its own name, which records in several "
            "languages may share."
        )
    return firsts


def _have_same_bytes(image: ImageSource | None, other: ImageSource | None) -> bool:
    assert image is not None and other is not None
    return count_bytes(image) == count_bytes(other) and image.read_bytes() == other.read_bytes()
