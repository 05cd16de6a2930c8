"""Read retrieval datasets from a user's own data: a folder in any supported format, or records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow.compute as pc  # type: ignore[import-untyped]

from ...data.records.data_hashes import hash_records
from ...data.records.record_loading import CollectedRecords, collect_records
from ...data.records.records import CaptionedImage
from ...data.validation_errors import ErrorCollector
from .dataset_spec import CLEANED_TEXTS, DatasetReading, DatasetSpec
from .retrieval_dataset import PublishedRecord

_DIGEST_SHOWN = 8  # hexadecimal digits
_OWN: dict[str, Any] = {
    "languages": (),
    "license": "yours",
    "citation": "none",
}
_CORRESPONDENCE = {"correspondence": "images of one group share their captions"}


def read_custom_folder(reading: DatasetReading, *, long: bool = False) -> Iterator[PublishedRecord]:
    """Yield the records of one language, with `captions` or `long_captions`.

    By default, errors in other languages also stop the reading. With `skip_invalid`, errors in
    other languages are ignored.
    """
    collected = _collect(reading)
    records = collected.records
    if records.skipped:
        reading.notes["rows_skipped"] = records.skipped
    reading.errors.extend(collected.stray)
    for errors in collected.lost:
        reading.errors.extend(errors)
        reading.num_errors_of_yielded += errors.total - 1
    invalid = {row for row, errors in collected.errors_of.items() if errors.total}
    for row, errors in collected.errors_of.items():
        if not reading.skip_invalid or records.read(row, ("lang",)) == (reading.lang,):
            reading.errors.extend(errors)
            reading.num_errors_of_yielded += errors.total
    batches = records.iterate_columns(("lang",))
    is_chosen = [np.asarray(pc.equal(batch.column(0), reading.lang)) for batch in batches]
    rows = np.flatnonzero(np.concatenate([[], *is_chosen]))
    for row, record in zip(rows.tolist(), records.select(rows), strict=True):
        yield _publish(record, long=long, is_valid=row not in invalid)


def _find_languages(reading: DatasetReading) -> tuple[str, ...]:
    """List the languages of a folder by first occurrence, without reporting errors."""
    collected = _collect(reading)
    batches = collected.records.iterate_columns(("lang",))
    languages = dict.fromkeys(lang for b in batches for lang in b.column(0).unique().to_pylist())
    if not languages:
        errors = ErrorCollector()
        for collected_errors in (collected.stray, *collected.lost):
            errors.extend(collected_errors)
        errors.raise_if_any(str(reading.folder))
        raise ValueError(f"{reading.folder} has no records. Add one for each image.")
    return tuple(languages)


def _collect(reading: DatasetReading) -> CollectedRecords:
    """Read the folder once for all languages."""
    fields = tuple(reading.ignore_fields), reading.caption_fields
    how = (reading.folder, reading.image_dir, reading.require_images, fields)
    if how not in reading.cache.records:
        reading.cache.records[how] = collect_records(
            str(reading.folder),
            image_dir=reading.image_dir,
            require_images=reading.require_images,
            ignore_fields=reading.ignore_fields,
            caption_fields=reading.caption_fields,
        )
    collected: CollectedRecords = reading.cache.records[how]
    return collected


def _publish(record: CaptionedImage, *, long: bool, is_valid: bool = True) -> PublishedRecord:
    return PublishedRecord(
        place=record.place,
        name=record.name,
        captions=record.long_captions if long else record.captions,
        image=record.image,
        group_id=record.group_id,
        is_valid=is_valid,
    )


def make_records_spec(records: Sequence[CaptionedImage], *, name: str | None = None) -> DatasetSpec:
    """Make the spec of records in memory; the default name contains their hash."""
    if not records:
        raise ValueError("Got no records to evaluate on. Pass at least one.")
    languages = tuple(dict.fromkeys(record.lang for record in records))

    def read(reading: DatasetReading) -> Iterator[PublishedRecord]:
        for record in records:
            if record.lang == reading.lang:
                yield _publish(record, long=False)

    return DatasetSpec(
        **{**_OWN, "languages": languages},
        name=name or f"records-{hash_records(records)[:_DIGEST_SHOWN]}",
        title="Records in memory",
        source="your program",
        files="none",
        protocol={"split": "all", "fields": "captions", **_CORRESPONDENCE, **CLEANED_TEXTS},
        read=read,
        origin="records",
    )


def _make_folder_spec(name: str, title: str, *, long: bool) -> DatasetSpec:
    return DatasetSpec(
        **_OWN,
        name=name,
        title=title,
        source="your disk",
        files="captions.jsonl and images, or Parquet, tar shards, COCO captions",
        protocol={
            "split": "all",
            "fields": "long_captions" if long else "captions",
            **_CORRESPONDENCE,
            **CLEANED_TEXTS,
        },
        read=partial(read_custom_folder, long=long),
        find_languages=_find_languages,
    )


DATASETS = (
    _make_folder_spec("folder", "Your own images with captions", long=False),
    _make_folder_spec("folder-long", "Your own images with their long captions", long=True),
)
