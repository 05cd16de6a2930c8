"""Which images a command decodes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated

from .config_fields import Config, Range


@dataclass(frozen=True, kw_only=True)
class ImageLimitsConfig(Config):
    """Limits of `ImageLimits` that a command sets; others are in the environment."""

    max_megapixels: Annotated[float, Range(above=0)] | None = None
    """Maximum size of a decoded image, in millions of pixels; a larger one counts as invalid.
    Default: 160."""
    max_image_mb: Annotated[float, Range(above=0)] | None = None
    """Maximum size of an encoded image, in MB. Default: 1000."""

    def list_limits(self) -> dict[str, float]:
        """Return the limits that were given, by their names."""
        limits = {field.name: getattr(self, field.name) for field in fields(ImageLimitsConfig)}
        return {name: limit for name, limit in limits.items() if limit is not None}
