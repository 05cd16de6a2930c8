"""Reading of captioned images for the training stages."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from ..configs.data_config import DataConfig, StreamConfig

if TYPE_CHECKING:
    from ..data.records.record_table import RecordTable
    from ..data.records.records import Modality
    from ..data.streams.record_streams import RecordStream


def require_data(data: str, reading: DataConfig) -> None:
    """Raise ValueError for data that do not exist, before anything is imported.

    Args:
        data: Folder, file, pattern of files or URL.
        reading: How they are read.
    """
    from ..data.remote.remote_files import is_remote

    if not is_remote(data) and not Path(data).exists() and not re.search(r"[*?[{]", data):
        raise ValueError(
            f"{data}: no such data. Give a folder, *.parquet, *.tar, a COCO *.json file, a URL, or "
            "a .txt file that names shards."
        )
    if reading.image_dir is not None and not reading.image_dir.is_dir():
        raise ValueError(f"image_dir={reading.image_dir}: no such folder.")


def is_streamed(data: str, streaming: StreamConfig) -> bool:
    """Whether data are streamed: what is elsewhere always, local shards if asked for.

    Args:
        data: Folder, file, pattern, URL or command.
        streaming: How they are streamed.
    """
    from ..data.remote.shard_urls import has_remote_shards

    return streaming.stream or has_remote_shards(data)


def stream_captioned_images(
    data: str, reading: DataConfig, streaming: StreamConfig
) -> RecordStream:
    """Open a stream of shards.

    Args:
        data: Folder, pattern, URL or command.
        reading: How the data are read.
        streaming: How they are streamed.

    Raises:
        ValueError: There are no shards, they cannot be reached, or options are of no use to a
            stream.
    """
    from ..data.streams.record_streams import stream_records

    if reading.image_dir is not None or reading.check_images or reading.captions_from is not None:
        raise ValueError(
            "A stream brings its images and captions, and decodes each image once: leave "
            "--image-dir, --check-images and --captions-from out."
        )
    return stream_records(
        data,
        buffer_size=streaming.buffer_size,
        max_lost_share=streaming.max_lost_share,
        ignore_fields=reading.ignore_fields,
    )


def read_captioned_images(
    data: str,
    reading: DataConfig,
    *,
    require_images: bool,
    resume: bool = False,
    modality: Modality | None = None,
    show_progress: bool = True,
) -> RecordTable:
    """Read all records.

    Args:
        data: Folder, file, pattern of files or URL.
        reading: How they are read.
        require_images: Whether the command decodes the images. Those on this machine are then
            checked first.
        resume: Whether a run continues, which has checked them.
        modality: What alone is read, so that records need not be pairs; None for both.
        show_progress: Show progress bars.

    Raises:
        DataValidationError: Records are invalid; every error is named at once.
    """
    from ..data.configured_records import read_configured_records
    from ..data.remote.shard_urls import has_remote_shards

    check_images = reading.check_images
    if check_images is None:
        check_images = require_images and not resume and not has_remote_shards(data)
    return read_configured_records(
        data,
        reading,
        require_images=require_images,
        check_images=check_images,
        modality=modality,
        show_progress=show_progress,
    )
