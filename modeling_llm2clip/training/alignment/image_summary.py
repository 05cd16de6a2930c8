"""Write a summary of an alignment's training images to the model folder."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...configs.align_config import AlignConfig
from ...data.key_arrays import count_distinct
from ...data.records.record_table import Array, RecordTable
from ...encoding.encode import encode_images
from ...model_folders.fingerprint import fingerprint_vision
from ...model_folders.training_images import (
    FEWEST_JUDGED,
    TRAINING_IMAGES_FILE,
    DatasetSummary,
    TrainingImages,
    read_training_images,
    summarize_images,
    write_training_images,
)
from ...modeling_llm2clip import LLM2CLIPVisionModel
from ...scheduling.processes import choose_device
from .run_data import RecordData, RunData
from .sampling import rank_keys

# Enough images to estimate 128 clusters and their spread.
_STORED_SAMPLE = 4_096
# Fewer, because each image costs a forward pass of the vision tower.
_ENCODED_SAMPLE = 1_024


def write_image_summary(
    source: Path, folder: Path, data: RunData, config: AlignConfig, *, name: str | None
) -> dict[str, Any] | None:
    """Add a summary of the training images to the summaries that the source model already has.

    The summary covers all images of the dataset, including held-out images. For a stream, whose
    images are no longer available, the summary covers only the held-out images. A seeded sample is
    read from the image store, or encoded by the written model.
    """
    known = read_training_images(source)
    is_same_tower = config.vision_training == "frozen" or (
        fingerprint_vision(source) == fingerprint_vision(folder)
    )
    new = _summarize(folder, data, config, name=name or "unnamed data")
    if new is None:
        if not is_same_tower:  # summaries made with other weights are invalid
            (folder / TRAINING_IMAGES_FILE).unlink(missing_ok=True)
        return None
    if known is None or not is_same_tower:
        earlier = () if known is None else known.list_names()
        summary = TrainingImages((new,), not_summarized=earlier)
    else:
        summary = known.add(new)
    write_training_images(folder, summary)
    return {"name": new.name, "num_images": new.num_images, "num_measured": new.num_measured}


def _summarize(
    folder: Path, data: RunData, config: AlignConfig, *, name: str
) -> DatasetSummary | None:
    if isinstance(data, RecordData):
        dataset = data.dataset
    elif data.held_out is not None:
        dataset = data.held_out.dataset
    else:
        return None
    sample = _ENCODED_SAMPLE if dataset.reads_images else _STORED_SAMPLE
    items = sample_images(dataset.records, sample)
    if len(items) < 2 * FEWEST_JUDGED:
        return None
    if dataset.image_store is not None and not dataset.reads_images:
        vision_embeds = dataset.image_store.read(dataset.image_rows(items))
    else:
        model = LLM2CLIPVisionModel.from_pretrained(folder, local_files_only=True).eval()
        model.to(choose_device(config.device))
        images = list(dataset.records.select(items).iterate_images())
        vision_embeds = encode_images(model, dataset.processor, images, project=False)
    return summarize_images(vision_embeds, name=name, num_images=count_images(dataset.records))


def sample_images(records: RecordTable, size: int) -> Array:
    """Sample distinct images, independently of the order of the records.

    Memory does not grow with the number of records.
    """
    chosen, items = np.empty(0, np.uint64), np.empty(0, np.int64)
    start = 0
    for keys in records.iterate_numbers("name_key"):
        rows = np.arange(start, start + len(keys))
        start += len(keys)
        chosen, firsts = np.unique(
            np.concatenate([chosen, rank_keys(keys, seed=0)]), return_index=True
        )
        chosen, items = chosen[:size], np.concatenate([items, rows])[firsts[:size]]
    return items


def count_images(records: RecordTable) -> int:
    """Count the distinct images of a dataset, across all caption languages."""
    return count_distinct(partial(records.iterate_numbers, "name_key"), len(records))
