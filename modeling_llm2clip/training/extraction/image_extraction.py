"""Images into a store of embeddings of the frozen vision tower, taken before the projection."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import torch

from ...configs.extract_config import ExtractConfig
from ...data.captions.distinct_texts import TextNumbers
from ...data.images.image_sources import ImageSource, count_bytes
from ...data.records.data_hashes import hash_image_sizes, hash_texts
from ...data.records.record_columns import IMAGE_COLUMNS, NO_IMAGE, ROWS_PER_BATCH
from ...data.records.record_table import RecordTable
from ...data.store.embedding_store_writer import EmbeddingStoreWriter, StoreItems
from ...data.store.store_index import make_batch
from ...encoding.encode import default_batch_size, iterate_image_batches, split_evenly
from ...model_folders.fingerprint import fingerprint_vision
from ...modeling_llm2clip import LLM2CLIPVisionModel
from ...processing_llm2clip import LLM2CLIPProcessor
from .extraction_plan import ExtractionPlan, PreparedShard, find_first_occurrences, plan_store

Array: TypeAlias = np.ndarray[Any, Any]
_NAMES_SHOWN = 5
_ITEM_COLUMNS = ("name", "group_id", "lang", "key", "group_key")


def plan_images(
    folder: Path, records: RecordTable, config: ExtractConfig, device: torch.device
) -> ExtractionPlan:
    """Plan the embeddings of all images; loads the vision tower alone.

    Records in several languages share the row of their image.

    Args:
        folder: Model folder.
        records: The dataset, with images.
        config: Options of the extraction.
        device: Where the vision tower runs.

    Raises:
        ValueError: There are no images, or a record has none.
    """
    _require_images(records)
    processor = LLM2CLIPProcessor.from_pretrained(folder)
    model = LLM2CLIPVisionModel.from_pretrained(folder)
    fingerprint = fingerprint_vision(folder)
    model = model.to(device)
    batch_size = config.batch_size or default_batch_size(device)
    manifest = plan_store(
        "vision_embeds",
        config,
        fingerprint=fingerprint,
        dim=model.visual_projection.in_features,
        plan={
            "data": hash_texts(records),
            "images": hash_image_sizes(records),
            "batch_size": str(batch_size),
        },
    )

    def open_shards(writer: EmbeddingStoreWriter) -> _ImageShards:
        return _ImageShards(
            model, processor, records, writer, batch_size=batch_size, num_workers=config.num_workers
        )

    return ExtractionPlan(
        manifest, lambda scratch: list_image_items(records, scratch), open_shards, " images"
    )


def list_image_items(records: RecordTable, scratch: Path) -> StoreItems:
    """Number the images of a dataset, by their names.

    Args:
        records: The dataset.
        scratch: Empty folder for temporary files, about as large as all names.

    Raises:
        ValueError: One name is that of two images.
    """
    numbers = TextNumbers(scratch, len(records))
    for batch in records.iterate_columns(("name", "name_key")):
        numbers.add(batch.column("name"), np.asarray(batch.column("name_key")))
    numbers.number()
    _require_one_image_per_name(records, numbers)
    return StoreItems(
        num_rows=numbers.num_distinct,
        num_items=len(records),
        counts={"images": len(records), "distinct": numbers.num_distinct},
        batches=_make_batches(records, numbers),
    )


def _make_batches(records: RecordTable, numbers: TextNumbers) -> Iterator[pa.RecordBatch]:
    for batch, rows in zip(records.iterate_columns(_ITEM_COLUMNS), numbers, strict=True):
        yield make_batch(batch, np.ones(len(rows), np.int32), np.arange(len(rows) + 1), rows)


class _ImageShards:
    """Prepares shards of images."""

    def __init__(
        self,
        model: LLM2CLIPVisionModel,
        processor: LLM2CLIPProcessor,
        records: RecordTable,
        writer: EmbeddingStoreWriter,
        *,
        batch_size: int,
        num_workers: int,
    ) -> None:
        self._model = model
        self._processor = processor
        self._records = records
        self._batch_size = batch_size
        self._num_workers = num_workers
        self._occurrences = find_first_occurrences(writer)

    def __call__(self, rows: range) -> PreparedShard:
        images: list[ImageSource | None] = []
        for first, items, _ in self._occurrences.find(rows):
            images += self._records.select(first + items).iterate_images()
        return PreparedShard(
            batches=[np.array(places) for places in split_evenly(len(rows), size=self._batch_size)],
            encode=lambda batches: iterate_image_batches(
                self._model,
                self._processor,
                images,
                [places.tolist() for places in batches],
                num_workers=self._num_workers,
            ),
        )


def _require_images(records: RecordTable) -> None:
    if not len(records):
        raise ValueError("There are no images. Give a dataset with at least one.")
    without = np.flatnonzero(records.read_numbers("image_kind") == NO_IMAGE)
    if len(without):
        names = [name for (name,) in records.take(without[:_NAMES_SHOWN], ("name",))]
        raise ValueError(
            f"{len(without)} records have no image: {names}. Read the dataset with its images."
        )


def _require_one_image_per_name(records: RecordTable, numbers: TextNumbers) -> None:
    """Compare the images of a name: by their addresses, and where these differ, as bytes."""
    if numbers.num_distinct == len(records):
        return
    first_records = np.empty(numbers.num_distinct, np.int64)
    start = num_named = 0
    ambiguous: dict[str, None] = {}
    for rows in numbers:
        these = np.arange(start, start + len(rows))
        new, places = np.unique(rows[rows >= num_named], return_index=True)
        first_records[new] = these[rows >= num_named][places]
        num_named += len(new)
        firsts = first_records[rows]
        again = these[firsts != these]
        ambiguous.update(_find_ambiguous(records, again, firsts[firsts != these]))
        start += len(rows)
    if ambiguous:
        raise ValueError(
            f"{len(ambiguous)} names are those of several images: "
            f"{list(ambiguous)[:_NAMES_SHOWN]}. Give every image a name of its own; several "
            "languages may share one."
        )


def _find_ambiguous(records: RecordTable, again: Array, firsts: Array) -> dict[str, None]:
    """Return the names of records whose image is not that of the first record of the name."""
    found: dict[str, None] = {}
    for start in range(0, len(again), ROWS_PER_BATCH):
        pairs = [rows[start : start + ROWS_PER_BATCH] for rows in (again, firsts)]
        [one], [other] = (records.select(rows).iterate_columns(IMAGE_COLUMNS) for rows in pairs)
        differ = np.zeros(len(pairs[0]), np.bool_)
        for mine, its in zip(one.columns, other.columns, strict=True):
            # Both null counts as equal: a file has no member.
            both = mine.is_null().to_numpy(False) & its.is_null().to_numpy(False)
            equal = pa.compute.equal(mine, its).fill_null(False).to_numpy(False)
            differ |= ~(both | equal)
        for record, first in zip(pairs[0][differ].tolist(), pairs[1][differ].tolist(), strict=True):
            if not _have_same_bytes(records[record].image, records[first].image):
                found[records[record].name] = None
    return found


def _have_same_bytes(one: ImageSource | None, other: ImageSource | None) -> bool:
    """Whether two places have the same image, as tar shards have with one sample per language."""
    assert one is not None and other is not None
    if count_bytes(one) != count_bytes(other):
        return False
    return one.read_bytes() == other.read_bytes()
