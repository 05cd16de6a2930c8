"""Decodes images before anything costly is done with them, and tells which it cannot."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from ..image_loading_llm2clip import load_images
from .image_sources import ImageSource, open_image

_MOST_THREADS = 8
_CHECKED_AT_ONCE = 1024


def find_unreadable_images(
    images: Iterable[ImageSource], *, show_progress: bool = False
) -> dict[ImageSource, str]:
    """Decode every image once, as the processor will, in threads.

    Returns: the images that cannot be decoded, in their order, and what is wrong with each.
    """
    different = list(dict.fromkeys(images))
    unreadable = {}
    with (
        ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool,
        tqdm(
            desc="decode",
            total=len(different),
            unit=" images",
            disable=not (show_progress and different),
        ) as progress,
    ):
        # A pool takes all its work at once, so it gets a part of it at a time.
        for start in range(0, len(different), _CHECKED_AT_ONCE):
            part = different[start : start + _CHECKED_AT_ONCE]
            for image, error in zip(part, pool.map(_try_image, part), strict=True):
                if error:
                    unreadable[image] = error
            progress.update(len(part))
    return unreadable


def _try_image(image: ImageSource) -> str:
    """Decode one image; returns what is wrong with it, naming it, or nothing."""
    try:
        load_images(open_image(image))
    except ValueError as error:
        return str(error)
    return ""
