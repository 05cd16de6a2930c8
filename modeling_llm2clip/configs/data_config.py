"""Options of reading and streaming captioned images, and limits of images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Interval

from .config_fields import Config


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """Options of reading captioned images."""

    image_dir: Path | None = None
    """Folder of the images. Default: the folder of the data."""
    ignore_fields: tuple[str, ...] = ()
    """Fields of the data that are not read, known or not. Default: none."""
    check_images: bool | None = None
    """Decode every image first, once for all runs that use the same cached record table. Default:
    if the stage trains on images, unless it resumes or the images are remote."""
    cache: bool = True
    """Store the record table of large data in the user's cache, and reuse it."""


@dataclass(frozen=True, kw_only=True)
class ImageLimitsConfig(Config):
    """The limit of `ImageLimits` that a command sets; the environment sets the others."""

    max_megapixels: Annotated[float, Interval(gt=0)] | None = None
    """Maximum size of a decoded image, in millions of pixels; larger images are invalid. Default:
    160."""

    def list_limits(self) -> dict[str, float]:
        """Return the limits that were given, by their names."""
        return {} if self.max_megapixels is None else {"max_megapixels": self.max_megapixels}
