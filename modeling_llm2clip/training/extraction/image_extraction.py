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
from ...data.images.image_sources import ImageSource
from ...data.records.data_hashes import hash_image_sizes, hash_texts
from ...data.records.record_table import RecordTable
from ...data.records.shared_images import (
    find_ambiguous_names,
    refuse_ambiguous_names,
    require_images,
)
from ...data.store.embedding_store_writer import EmbeddingStoreWriter, StoreItems
from ...data.store.store_index import make_batch
from ...encoding.batches import split_evenly
from ...encoding.encode import TorchEncoder
from ...encoding.encoder_interface import Encoder
from ...model_folders.fingerprint import fingerprint_vision
from ...modeling_llm2clip import LLM2CLIPVisionModel
from ...processing_llm2clip import LLM2CLIPProcessor
from ...scheduling.shard_computation import PreparedShard
from .extraction_plan import ExtractionPlan, find_first_occurrences, plan_store

Array: TypeAlias = np.ndarray[Any, Any]
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
    require_images(records)
    processor = LLM2CLIPProcessor.from_pretrained(folder)
    model = LLM2CLIPVisionModel.from_pretrained(folder)
    fingerprint = fingerprint_vision(folder)
    model = model.to(device)
    encoder = TorchEncoder(model, processor)
    batch_size = config.batch_size or encoder.batch_size
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
            encoder, records, writer, batch_size=batch_size, num_workers=config.num_workers
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
        encoder: Encoder,
        records: RecordTable,
        writer: EmbeddingStoreWriter,
        *,
        batch_size: int,
        num_workers: int | None,
    ) -> None:
        self._encoder = encoder
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
            encode=lambda batches: (
                batch.embeds
                for batch in self._encoder.iterate_images(
                    images,
                    [places.tolist() for places in batches],
                    project=False,
                    num_workers=self._num_workers,
                )
            ),
        )


def _require_one_image_per_name(records: RecordTable, numbers: TextNumbers) -> None:
    """Compare the images of a name."""
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
        ambiguous.update(find_ambiguous_names(records, again, firsts[firsts != these]))
        start += len(rows)
    refuse_ambiguous_names(ambiguous)
