"""Folders of images and reports on them, for `index`, `search` and `tag`.

The results of these commands go to stdout, everything else to stderr.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..processing_llm2clip import LLM2CLIPProcessor


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


def report_truncated(processor: LLM2CLIPProcessor, texts: list[str], what: str) -> None:
    """Report how many texts are longer than the model reads.

    Args:
        processor: Of the model.
        texts: What it will read.
        what: Word for them.
    """
    from ..encoding.encode import measure_texts

    if count := int(measure_texts(processor, texts)[1].sum()):
        report(
            f"Truncated {count:,} of {len(texts):,} {what} to the {processor.longest_text} tokens "
            "that the model reads."
        )
