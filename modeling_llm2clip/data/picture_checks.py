"""Decodes pictures before anything costly is done with them, and tells which it cannot."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from ..processing_llm2clip import load_pictures
from .pictures import Picture, load_picture

_MOST_THREADS = 8
_CHECKED_AT_ONCE = 1024


def find_unreadable(
    pictures: Iterable[Picture], *, show_progress: bool = False
) -> dict[Picture, str]:
    """Decode every picture once, as the processor will, in threads.

    Returns: the pictures that cannot be decoded, in their order, and what is wrong with each.
    """
    different = list(dict.fromkeys(pictures))
    unreadable = {}
    with (
        ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool,
        tqdm(
            desc="decode",
            total=len(different),
            unit=" pictures",
            disable=not (show_progress and different),
        ) as progress,
    ):
        # A pool takes all its work at once, so it gets a part of it at a time.
        for start in range(0, len(different), _CHECKED_AT_ONCE):
            part = different[start : start + _CHECKED_AT_ONCE]
            for picture, fault in zip(part, pool.map(_try_picture, part), strict=True):
                if fault:
                    unreadable[picture] = fault
            progress.update(len(part))
    return unreadable


def _try_picture(picture: Picture) -> str:
    """Decode one picture; returns what is wrong with it, naming it, or nothing."""
    try:
        load_pictures(load_picture(picture))
    except ValueError as error:
        return str(error)
    return ""
