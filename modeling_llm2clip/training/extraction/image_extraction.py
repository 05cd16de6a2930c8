"""Stage 2 for a frozen vision tower: images into a store of embeddings, before the projection."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from ...data.data_hashes import count_bytes, hash_image_sizes, hash_records
from ...data.embedding_store import StoreManifest
from ...data.embedding_store_writer import EmbeddingStoreWriter
from ...data.image_sources import ImageSource
from ...data.records import CaptionedImage
from ...encoding.image_encoding import default_batch_size, encode_images
from ...model_folders.fingerprint import fingerprint_vision
from ...modeling_llm2clip import LLM2CLIPVisionModel
from ...processing_llm2clip import LLM2CLIPProcessor
from ..graceful_stop import StopRequest
from .extract import (
    ExtractionArguments,
    ExtractionReport,
    StoreProgress,
    choose_device,
    pack_records,
    write_missing_shards,
)

_ERRORS_SHOWN = 5


def extract_images(
    model_folder: str | Path,
    records: Sequence[CaptionedImage],
    output: str | Path,
    arguments: ExtractionArguments | None = None,
    *,
    stop: StopRequest | None = None,
) -> ExtractionReport:
    """Compute the embeddings of all images into a store, or go on with one.

    Only the image half of the model is loaded. Records in several languages share the row of
    their image. Arguments and errors as `extract_captions`; an image that is missing or broken
    raises ValueError, and whole shards stay. So does one of another size in bytes than in an
    earlier run, and a name that stands for two images.
    """
    arguments = arguments or ExtractionArguments()
    device = choose_device(arguments)
    images = _list_images(records)
    row_of = {name: row for row, name in enumerate(images)}
    index = pack_records(
        records, short=[[row_of[r.name]] for r in records], long=[[] for _ in records]
    )
    processor = LLM2CLIPProcessor.from_pretrained(model_folder)
    model = LLM2CLIPVisionModel.from_pretrained(model_folder)
    fingerprint = fingerprint_vision(model_folder)
    model = model.to(device)
    batch_size = arguments.batch_size or default_batch_size(device)
    manifest = StoreManifest(
        content="vision_embeds",
        fingerprint=fingerprint,
        dtype=arguments.dtype,
        dim=model.visual_projection.in_features,
        num_rows=len(images),
        num_items=len(records),
        rows_per_shard=arguments.rows_per_shard,
        plan={
            "data": hash_records(records),
            "images": hash_image_sizes(records),
            "batch_size": str(batch_size),
        },
        counts={"images": len(records), "distinct": len(images)},
        index_bytes=len(index),
        index_sha256=hashlib.sha256(index).hexdigest(),
    )
    in_order = list(images.values())

    def compute(rows: range, tell: Callable[[int], object]) -> Tensor:
        return encode_images(
            model,
            processor,
            in_order[rows.start : rows.stop],
            batch_size=batch_size,
            num_workers=arguments.num_workers,
            on_batch=tell,
        )

    writer = EmbeddingStoreWriter.open(output, manifest, index)
    progress = StoreProgress(writer, unit=" images", shown=arguments.show_progress)
    return write_missing_shards(writer, compute, stop=stop, progress=progress)


def _list_images(records: Sequence[CaptionedImage]) -> dict[str, ImageSource]:
    """Images by name, each once, in the order of the records."""
    if not records:
        raise ValueError("There are no images. Give a data set with at least one.")
    if without := [record.name for record in records if record.image is None]:
        raise ValueError(
            f"{len(without)} records have no image: {without[:_ERRORS_SHOWN]}. Read the data set "
            "with its images."
        )
    images: dict[str, ImageSource] = {}
    unlike: dict[str, None] = {}
    for record in records:
        assert record.image is not None
        first = images.setdefault(record.name, record.image)
        if first != record.image and not _hold_the_same(first, record.image):
            unlike[record.name] = None
    if unlike:
        raise ValueError(
            f"{len(unlike)} names stand for several images: {list(unlike)[:_ERRORS_SHOWN]}. Give "
            "every image a name of its own; several languages may share one."
        )
    return images


def _hold_the_same(one: ImageSource, other: ImageSource) -> bool:
    """Whether two places hold the same bytes, as they do in shards with a member a language."""
    if count_bytes(one) != count_bytes(other):
        return False
    return one.read_bytes() == other.read_bytes()
