"""Folders of images and reports on them, for `index`, `search` and `tag`.

The results of these commands go to stdout, everything else to stderr.
"""

from __future__ import annotations

import sys
from pathlib import Path


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
