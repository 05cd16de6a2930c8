"""Reads records as a `DataConfig` says, for commands and recipes."""

from __future__ import annotations

import sys
from pathlib import Path

from tqdm import tqdm

from .._suggestions import counted
from ..configs.data_config import DataConfig
from .captions.caption_joins import join_captions
from .record_fields import Modality
from .records.record_loading import load_records
from .records.record_table import RecordTable


def read_configured_records(
    data: str | Path,
    config: DataConfig,
    *,
    require_images: bool,
    check_images: bool,
    modality: Modality | None = None,
    show_progress: bool = True,
) -> RecordTable:
    """Read all records; what was skipped or not joined is printed to stderr."""
    records = load_records(
        data,
        image_dir=config.image_dir,
        require_images=require_images or check_images,
        check_images=check_images,
        ignore_fields=config.ignore_fields,
        cache=config.cache,
        show_progress=show_progress,
        modality=modality,
    )
    for reason, count in records.skipped.items():
        tqdm.write(f"{data}: skipped {counted(count, 'row')}: {reason}.", file=sys.stderr)
    if config.captions_from is None:
        return records
    joined = join_captions(
        records,
        config.captions_from,
        on=config.join_on,
        lang=config.captions_lang,
    )
    tqdm.write(f"{config.captions_from}: {joined}", file=sys.stderr)
    return joined.records
