"""How captioned images are read, and how they are streamed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from .config_fields import Config, Range


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """How a stage reads its captioned images."""

    image_dir: Path | None = None
    """Folder of the images. Default: beside the data."""
    ignore_fields: tuple[str, ...] = ()
    """Fields of your own in the data that are not read. Default: none."""
    check_images: bool | None = None
    """Decode every image before anything else, once for all runs that find the same index in the
    cache. Default: where the stage decodes images, unless it resumes or they are not on this
    machine."""
    captions_from: Path | None = None
    """File of captions that others published for these images: CSV, JSON lines or Parquet. They are
    added to the data's own. Default: none."""
    join_on: Literal["url", "key"] = "url"
    """What captions_from is joined by: an image's URL, or its name without folder and suffix."""
    captions_lang: str | None = None
    """Language of captions_from; records in other languages do not get them. Default: that of all
    records."""
    cache: bool = True
    """Keep the index of large data in the user's cache, and find it there the next time."""


@dataclass(frozen=True, kw_only=True)
class StreamConfig(Config):
    """How `align` streams shards, which it does for every URL."""

    stream: bool = False
    """Read local shards, too, one after the other through a shuffle buffer, and not at random."""
    buffer_size: Annotated[int, Range(min=1)] = 1000
    """Samples that each worker shuffles."""
    max_lost_share: Annotated[float, Range(min=0, max=1)] = 0.01
    """Share of each worker's samples, or of its shards, that may be broken or missing."""
