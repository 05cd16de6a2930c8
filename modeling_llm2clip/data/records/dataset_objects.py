"""Converts a `datasets.Dataset` to records, copying its rows to a Parquet file."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from ..atomic_files import FREE_TEMPORARY_FOLDER, explain_full_disk, temporary_folder
from ..remote.file_locations import describe_states
from ..sources.parquet import read_parquet_file
from ..validation_errors import ErrorCollector
from .record_index import find_repeated
from .record_table import RecordTable
from .records import Modality, RecordRules, check_record

if TYPE_CHECKING:
    import datasets

_NAME = "dataset"
_ROWS_PER_GROUP = 100  # a random image costs the decoding of its whole row group


def records_from_dataset(
    dataset: datasets.Dataset,
    *,
    columns: Mapping[str, str] | None = None,
    require_images: bool = True,
    ignore_fields: Collection[str] = (),
    modality: Modality | None = None,
) -> RecordTable:
    """Convert a `datasets.Dataset` to records.

    The rows are copied to a Parquet file in the temporary folder (`$TMPDIR`), which exists as long
    as this process runs; images are read from that file. For a run that will be resumed, write the
    file yourself with `dataset.to_parquet(file, batch_size=100)` and pass it to `load_records`.

    Args:
        dataset: Rows with the fields of records.
        columns: Record field → column that holds the field, such as `{"image": "img", "captions":
            "sentences"}`; other columns are not read. Default: all columns, which must be named
            like the record fields.
        require_images: Whether a record without an image is an error.
        ignore_fields: Names of fields to ignore, whether they are known or not.
        modality: As in `load_records`.

    Returns:
        The records, in the dataset's order. Rows from img2dataset become records only if their
        image was downloaded; `skipped` counts the other rows.

    Raises:
        DataValidationError: Records have errors.
        ValueError: The dataset lacks a column, has a transform, or is not a `Dataset`.
        OSError: The temporary folder is full.

    Examples:
        >>> import datasets
        >>> file = "my-images/captions.jsonl"
        >>> rows = datasets.load_dataset("json", data_files=file, split="train")
        >>> records = records_from_dataset(rows, require_images=False)
        >>> len(records), records[0].captions[0]
        (20, 'Two dogs on a beach.')
    """
    if isinstance(getattr(dataset, "data", {}), dict):
        raise ValueError(
            f"{type(dataset).__name__} is not a datasets.Dataset. For an IterableDataset, use "
            "stream_dataset; for a DatasetDict, pass one split."
        )
    if dataset.format["type"] == "custom":
        raise ValueError(
            "The dataset has a transform, which is not applied here. Apply it with dataset.map, or "
            "remove it with dataset.reset_format()."
        )
    if columns is not None:
        dataset = dataset.select_columns(sorted(set(columns.values())))
    file = temporary_folder() / f"{uuid4().hex}.parquet"
    with explain_full_disk(file.parent, "for the copy of the dataset", FREE_TEMPORARY_FOLDER):
        dataset.to_parquet(file, batch_size=_ROWS_PER_GROUP)
    describe_states([file])
    errors = ErrorCollector()
    rules = RecordRules(Path(), require_images and modality != "text", ignore_fields, modality)
    checked = (
        # Rows are named by number, because many datasets have the same path for all images.
        check_record(raw._replace(default_name=raw.place.replace(" row ", "/")), errors, rules)
        for raw in read_parquet_file(file, _NAME, errors, columns=columns)
    )
    records = RecordTable.from_records(record for record in checked if record is not None)
    find_repeated(records, errors, modality=modality)
    errors.raise_if_any(_NAME)
    records.skipped = dict(errors.skipped)
    return records
