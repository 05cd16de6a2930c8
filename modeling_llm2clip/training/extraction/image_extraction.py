"""Images into a store of embeddings of the frozen vision tower, taken before the projection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...configs.extract_config import ExtractConfig
from ...data.data_hashes import count_bytes, hash_image_sizes, hash_texts
from ...data.image_sources import ImageSource
from ...data.records import CaptionedImage
from ...encoding.encode import default_batch_size, encode_images
from ...model_folders.fingerprint import fingerprint_vision
from ...modeling_llm2clip import LLM2CLIPVisionModel
from ...processing_llm2clip import LLM2CLIPProcessor
from .extraction_plan import ExtractionPlan, make_manifest, pack_records

_NAMES_SHOWN = 5


def plan_images(
    folder: Path, records: Sequence[CaptionedImage], config: ExtractConfig, device: torch.device
) -> ExtractionPlan:
    """Plan the embeddings of all images; loads the vision tower alone.

    Records in several languages share the row of their image.

    Args:
        folder: Model folder.
        records: The dataset, with images.
        config: Options of the extraction.
        device: Where the vision tower runs.

    Raises:
        ValueError: There are no images, a record has none, or one name is that of two images.
    """
    images = _list_images(records)
    row_of = {name: row for row, name in enumerate(images)}
    index = pack_records(
        records, short=[[row_of[r.name]] for r in records], long=[[] for _ in records]
    )
    processor = LLM2CLIPProcessor.from_pretrained(folder)
    model = LLM2CLIPVisionModel.from_pretrained(folder)
    fingerprint = fingerprint_vision(folder)
    model = model.to(device)
    batch_size = config.batch_size or default_batch_size(device)
    manifest = make_manifest(
        "vision_embeds",
        config,
        index,
        fingerprint=fingerprint,
        dim=model.visual_projection.in_features,
        num_rows=len(images),
        num_items=len(records),
        plan={
            "data": hash_texts(records),
            "images": hash_image_sizes(records),
            "batch_size": str(batch_size),
        },
        counts={"images": len(records), "distinct": len(images)},
    )
    rows = list(images.values())

    def compute(chosen: range, on_batch: Callable[[int], object]) -> Tensor:
        return encode_images(
            model,
            processor,
            rows[chosen.start : chosen.stop],
            project=False,
            batch_size=batch_size,
            num_workers=config.num_workers,
            on_batch=lambda batch, _: on_batch(len(batch)),
        )

    return ExtractionPlan(manifest, index, compute, " images")


def _list_images(records: Sequence[CaptionedImage]) -> dict[str, ImageSource]:
    """Images by name, each once, in the order of the records."""
    if not records:
        raise ValueError("There are no images. Give a dataset with at least one.")
    if without := [record.name for record in records if record.image is None]:
        raise ValueError(
            f"{len(without)} records have no image: {without[:_NAMES_SHOWN]}. Read the dataset "
            "with its images."
        )
    images: dict[str, ImageSource] = {}
    ambiguous: dict[str, None] = {}
    for record in records:
        assert record.image is not None
        first = images.setdefault(record.name, record.image)
        if first != record.image and not _have_same_bytes(first, record.image):
            ambiguous[record.name] = None
    if ambiguous:
        raise ValueError(
            f"{len(ambiguous)} names are those of several images: "
            f"{list(ambiguous)[:_NAMES_SHOWN]}. Give every image a name of its own; several "
            "languages may share one."
        )
    return images


def _have_same_bytes(one: ImageSource, other: ImageSource) -> bool:
    """Whether two places have the same image, as tar shards have with one sample per language."""
    if count_bytes(one) != count_bytes(other):
        return False
    return one.read_bytes() == other.read_bytes()
