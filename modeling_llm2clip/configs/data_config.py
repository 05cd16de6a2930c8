"""How captioned images are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .config_fields import Config


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """How a stage reads its captioned images."""

    image_dir: Path | None = None
    """Folder of the images. Default: beside the data."""
    ignore_fields: tuple[str, ...] = ()
    """Fields of your own in the data that are not read. Default: none."""
    check_images: bool | None = None
    """Decode every image before anything else. Default: where the stage decodes images, unless it
    resumes."""
    cache: bool = True
    """Keep the index of large data in the user's cache, and find it there the next time."""
