"""Options for reading and streaming captioned images, and image limits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Interval

from .config_fields import Config


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """Options for reading captioned images."""

    image_dir: Path | None = None
    """Folder with the images. Default: the folder of the data."""
    ignore_fields: tuple[str, ...] = ()
    """Fields of the data to ignore, whether known or not. Default: none."""
    check_images: bool | None = None
    """Decode every image before starting, only once for runs that share a cached record table.
    Default: yes if the stage trains on images, unless it resumes or the images are remote."""
    cache: bool = True
    """Cache the record table of large data in the user's cache folder, and reuse it."""


@dataclass(frozen=True, kw_only=True)
class ImageLimitsConfig(Config):
    """The one limit of `ImageLimits` that has a flag; the environment sets the others."""

    max_megapixels: Annotated[float, Interval(gt=0)] | None = None
    """Maximum size of a decoded image, in megapixels; larger images are invalid. Default: 160."""

    def list_limits(self) -> dict[str, float]:
        """Return the limits that were set, by name."""
        return {} if self.max_megapixels is None else {"max_megapixels": self.max_megapixels}
