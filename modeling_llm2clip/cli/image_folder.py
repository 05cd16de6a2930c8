"""The index of a folder of images, for `search` and `tag`.

The results of these commands go to stdout, everything else to stderr.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..configs.search_config import IndexConfig
from .chosen_device import use_device

if TYPE_CHECKING:
    from ..processing_llm2clip import LLM2CLIPProcessor
    from ..search.image_index import ImageIndex


def require_image_folder(image_dir: Path) -> None:
    """Raise ValueError where there is no folder of images, before anything is imported.

    Args:
        image_dir: Folder of images.
    """
    if not image_dir.is_dir():
        raise ValueError(f"{image_dir}: no such folder. Give one that holds images.")


def build_index(source: str, image_dir: Path, config: IndexConfig) -> ImageIndex:
    """Find, check and encode the images, and report on stderr what is skipped, known and kept.

    Args:
        source: Hub id or folder of the model.
        image_dir: Folder of images.
        config: How they are encoded, and where their embeddings are kept.

    Raises:
        ValueError: As `ImageIndex.build`.
    """
    use_device(config.device)
    from ..search.image_index import ImageIndex

    return ImageIndex.build(source, image_dir, config=config, report=report)


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
