"""Makes records of a `datasets.Dataset`; its images stay in its Arrow files, found by row."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from ..images.image_sources import ArrowImage
from ..remote.file_places import describe_states
from ..sources.parquet import has_field, is_image_type
from ..validation_errors import ErrorCollector
from .record_index import find_repeated
from .record_table import RecordTable
from .records import Modality, RawRecord, RecordRules, check_record

if TYPE_CHECKING:
    import datasets

_ROWS_AT_ONCE = 1000
_NAME = "dataset"
_SAVE_FIRST = "Save it by dataset.save_to_disk(folder), and give datasets.load_from_disk(folder)."


def records_from_dataset(
    dataset: datasets.Dataset,
    *,
    columns: Mapping[str, str] | None = None,
    require_images: bool = True,
    ignore_fields: Collection[str] = (),
    modality: Modality | None = None,
) -> RecordTable:
    """Make records of a dataset in memory or in files; its images are not read.

    Args:
        dataset: Rows with the fields of records; packed images are in files.
        columns: Field of a record to the column that holds it, such as
            `{"image": "img", "captions": "sentences"}`; other columns are not read. Default: every
            column, named as the fields of a record.
        require_images: Whether a record without its image is an error.
        ignore_fields: Names of further fields, which are not read and not errors.
        modality: As in `load_records`.

    Returns:
        The records, in the dataset's order.

    Raises:
        DataValidationError: Records have errors, or the dataset lacks a column.
        ValueError: It has packed images that are not in files as they are, or a transform, or is
            not a `Dataset`.

    Examples:
        >>> import datasets
        >>> file = "my-images/captions.jsonl"
        >>> rows = datasets.load_dataset("json", data_files=file, split="train")
        >>> records = records_from_dataset(rows, require_images=False)
        >>> len(records), records[0].captions[0]
        (20, 'Two dogs on a beach.')
    """
    if not hasattr(dataset, "data"):
        raise ValueError(
            f"{type(dataset).__name__} is not a datasets.Dataset. For an IterableDataset use "
            "stream_dataset."
        )
    if dataset.format["type"] == "custom":
        raise ValueError(
            "The dataset has a transform, which is not applied here. Apply it by dataset.map, or "
            "remove it by dataset.reset_format()."
        )
    table = dataset.data.table
    sources = dict(columns) if columns else {name: name for name in table.column_names}
    errors = ErrorCollector()
    if lost := set(sources.values()) - set(table.column_names):
        errors.add(f"no column {', '.join(sorted(lost))}", _NAME)
        errors.raise_if_any(_NAME)
    indices = dataset._indices
    rows = np.arange(len(table)) if indices is None else np.asarray(indices.column(0))
    rules = RecordRules(Path(), require_images and modality != "text", ignore_fields, modality)
    rows_read = _iterate_rows(dataset, table, rows, sources)
    checked = (check_record(raw, errors, rules) for raw in rows_read)
    records = RecordTable.from_records(record for record in checked if record is not None)
    find_repeated(records, errors, modality=modality)
    errors.raise_if_any(_NAME)
    return records


def _iterate_rows(
    dataset: Any, table: Any, rows: np.ndarray[Any, Any], sources: Mapping[str, str]
) -> Iterator[RawRecord]:
    image_column = sources.get("image")
    is_packed = image_column is not None and is_image_type(table.schema.field(image_column).type)
    labels = [name for name in sources.values() if not (is_packed and name == image_column)]
    images = _Images(dataset, table, str(image_column)) if is_packed else None
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        part = rows[start : start + _ROWS_AT_ONCE]
        columns = table.select(labels).take(pa.array(part)).to_pylist()
        for number, (row, values) in enumerate(zip(part.tolist(), columns, strict=True), start):
            fields = {
                field: values[column]
                for field, column in sources.items()
                if column in values and values[column] is not None
            }
            image = None if images is None else images.find(row)
            packed = image if isinstance(image, ArrowImage) else None
            if isinstance(image, str):
                fields["image"] = image
            place, default_name = f"{_NAME} row {number}", f"{_NAME}/{row}"
            yield RawRecord(place, fields, packed=packed, default_name=default_name)


class _Images:
    """Finds the images of a dataset in its Arrow files."""

    def __init__(self, dataset: Any, table: Any, column: str) -> None:
        values = table.column(column)
        self._paths = pc.struct_field(values, "path") if has_field(values.type, "path") else None
        if pa.types.is_struct(values.type):
            has_bytes = has_field(values.type, "bytes")
            values = pc.struct_field(values, "bytes") if has_bytes else pa.nulls(len(table))
        self._sizes = np.zeros(len(table), np.int64) - 1
        self._parts: list[_Part] = []
        self._first_rows = [0]
        if values.null_count == len(table):
            return
        self._sizes = _measure(values)
        for part in _list_parts(dataset.data, column):
            first = self._first_rows[-1]
            if not np.array_equal(part.measure(), self._sizes[first : first + part.num_rows]):
                break
            self._parts.append(part)
            self._first_rows.append(first + part.num_rows)
        describe_states(list({part.file: None for part in self._parts if part.file is not None}))
        if self._first_rows[-1] != len(table):
            raise ValueError(
                "Images of the dataset are in memory, or its files cannot be read as they are. "
                f"{_SAVE_FIRST}"
            )

    def find(self, row: int) -> ArrowImage | str | None:
        """Return the address of a row's image, or its path; None if it has neither."""
        size = int(self._sizes[row])
        if size >= 0:
            number = int(np.searchsorted(self._first_rows, row, side="right")) - 1
            part = self._parts[number]
            assert part.file is not None
            within = part.start + row - self._first_rows[number]
            return ArrowImage(part.file, part.column, within, size)
        return None if self._paths is None else self._paths[row].as_py()


@dataclass(frozen=True)
class _Part:
    """Consecutive rows of one file; no file for rows in memory."""

    num_rows: int
    file: Path | None = None
    column: str = ""
    start: int = 0

    def measure(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return the size of the image of each row, -1 for none; nothing for other columns."""
        if self.file is None:
            return np.full(self.num_rows, -1)
        with pa.memory_map(str(self.file)) as mapped:
            table = pa.ipc.open_stream(mapped).read_all().slice(self.start, self.num_rows)
            if self.column not in table.column_names:
                return np.empty(0, np.int64)
            values = table.column(self.column)
            if has_field(values.type, "bytes"):
                values = pc.struct_field(values, "bytes")
            if pa.types.is_struct(values.type):
                return np.empty(0, np.int64)
            return _measure(values)


def _list_parts(data: Any, column: str) -> Iterator[_Part]:
    """Yield the parts of a table of `datasets`, in their order."""
    if not hasattr(data, "blocks"):
        yield _find_part(data, column)
        return
    # Blocks are below each other, and beside each other within a row of them.
    for row in data.blocks:
        found = [block for block in row if column in block.column_names]
        yield _find_part(found[0], column) if found else _Part(len(row[0]))


def _find_part(block: Any, column: str) -> _Part:
    """Find the rows and the column of a block in its file, from all that was done to the block."""
    in_memory = _Part(len(block))
    if not hasattr(block, "replays"):
        return in_memory
    file = Path(block.path)
    with pa.memory_map(str(file)) as mapped:
        columns = [(name, name) for name in pa.ipc.open_stream(mapped).schema.names]
    start = 0
    for change, arguments, options in block.replays:
        if change == "slice" and not options:
            start += arguments[0]
        elif change in _COLUMN_CHANGES and len(arguments) == 1 and not options:
            columns = _COLUMN_CHANGES[change](columns, arguments[0])
        elif change not in _CHANGES_OF_TYPE:
            return in_memory  # other rows, or other columns
    source = next((source for source, name in columns if name == column), None)
    return in_memory if source is None else _Part(len(block), file, source, start)


_Columns: TypeAlias = list[tuple[str, str]]  # name in the file, and in the dataset
_COLUMN_CHANGES: dict[str, Callable[[_Columns, Any], _Columns]] = {
    "drop": lambda columns, names: [pair for pair in columns if pair[1] not in names],
    "remove_column": lambda columns, number: [*columns[:number], *columns[number + 1 :]],
    "rename_columns": lambda columns, names: [
        (source, name) for (source, _), name in zip(columns, names, strict=True)
    ],
    "select": lambda columns, names: [
        pair for name in names for pair in columns if pair[1] == name
    ],
}
_CHANGES_OF_TYPE = ("cast", "combine_chunks", "replace_schema_metadata")


def _measure(values: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the size of each image from its offsets; -1 for null."""
    sizes = pc.fill_null(pc.binary_length(values), -1).cast(pa.int64())
    measured: np.ndarray[Any, np.dtype[np.int64]] = sizes.to_numpy()
    return measured
