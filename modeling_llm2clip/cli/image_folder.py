"""Folders of images, the limits of images, and reports on them.

The results of `index`, `search` and `tag` go to stdout, everything else to stderr.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..configs.data_config import ImageLimitsConfig


def require_image_folder(image_dir: Path) -> None:
    """Raise ValueError where there is no folder of images, before anything is imported.

    Args:
        image_dir: Folder of images.
    """
    if not image_dir.is_dir():
        raise ValueError(f"{image_dir}: no such folder. Give one that holds images.")


def report(text: str) -> None:
    """Print to stderr, so that stdout holds nothing but results.

    Args:
        text: One or several lines.
    """
    print(text, file=sys.stderr, flush=True)


def report_truncated(count: int, total: int, what: str, *, longest: int) -> None:
    """Report how many texts are longer than the model reads.

    Args:
        count: How many are.
        total: How many texts there are.
        what: Word for them.
        longest: Tokens that the model reads.
    """
    if count:
        report(
            f"Truncated {count:,} of {total:,} {what} to the {longest} tokens that the model reads."
        )


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
