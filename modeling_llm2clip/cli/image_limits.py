"""The limits of the images that a command decodes, set before anything else."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..configs.image_limits_config import ImageLimitsConfig


def use_image_limits(config: ImageLimitsConfig) -> None:
    """Set the limits for this process and for all that it starts.

    Args:
        config: As the flags gave it; what was not given stays as it is in the environment.

    Raises:
        ValueError: The limits in the environment cannot be read.
    """
    if not (limits := config.list_limits()):
        return
    from ..image_loading_llm2clip import get_image_limits, set_image_limits

    set_image_limits(replace(get_image_limits(), **limits))  # type: ignore[arg-type]
