"""The plan of an extraction by modality, in this process or in one that Ray starts."""

from __future__ import annotations

from pathlib import Path

import torch

from ...configs.extract_config import ExtractConfig
from ...data.records.record_table import RecordTable
from ...data.records.records import Modality
from ...model_folders.model_folder import find_model_folder
from ...scheduling.processes import choose_device
from ...scheduling.shard_computation import ShardWorker
from .caption_extraction import plan_captions
from .extraction_plan import ExtractionPlan
from .image_extraction import plan_images
from .shared_work import SharedWork


def make_plan(
    folder: Path,
    table: RecordTable,
    config: ExtractConfig,
    device: torch.device,
    modality: Modality,
) -> ExtractionPlan:
    """Load the tower that is needed, and plan a store.

    Args:
        folder: Model folder.
        table: The dataset.
        config: Options of the extraction.
        device: Where the tower runs.
        modality: What is extracted.
    """
    make = plan_captions if modality == "text" else plan_images
    return make(folder, table, config, device)


def make_worker(
    model: str | Path,
    work: SharedWork,
    config: ExtractConfig,
    modality: Modality,
) -> ShardWorker:
    """Load the tower that is needed, for shards that something else hands out.

    Args:
        model: Folder or Hub id of the model.
        work: The store and the records.
        config: Options of the extraction.
        modality: What is extracted.
    """
    writer, table = work.open()
    folder = find_model_folder(model)
    plan = make_plan(folder, table, config, choose_device(config.device), modality)
    return ShardWorker(writer, plan.open_shards(writer))
