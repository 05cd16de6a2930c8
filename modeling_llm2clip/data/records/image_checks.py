"""Decodes all images before a stage begins, so that a broken one does not end it half way.

It takes as long as a pass over the images, so it is noted beside a cached index, and done once
where the cache can be written.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np

from ..images.image_sources import find_unreadable_images
from ..validation_errors import ErrorCollector
from .record_columns import ROWS_PER_BATCH, hash_text
from .record_table import RecordTable


def check_images(
    records: RecordTable, errors: ErrorCollector, *, show_progress: bool = False
) -> None:
    """Decode every image once, however many records share it.

    The processes of a launch on one machine share the work, and each has the errors of its part.
    """
    process = int(os.environ.get("LOCAL_RANK", "0"))
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    index = _identify(records.file)
    if index is not None and _is_noted(index, {(process, num_processes), (0, 1)}):
        return
    part = records
    if num_processes > 1:  # records that share an image are next to each other
        ends = [len(records) * number // num_processes for number in (process, process + 1)]
        part = records.select(range(*ends))
    before = errors.total
    _decode(part, errors, show_progress=show_progress)
    if index is not None and errors.total == before:
        file, built = index
        with suppress(OSError):  # as of a cache that may only be read: then it is done again
            _note_file(file, process, num_processes).write_text(built, encoding="utf-8")


def _decode(records: RecordTable, errors: ErrorCollector, *, show_progress: bool) -> None:
    keys = np.fromiter((hash_text(str(i)) for i in records.iterate_images()), np.int64)
    firsts = np.sort(np.unique(keys, return_index=True)[1])
    # A part at a time, so that the addresses of a large dataset are not all in memory.
    for start in range(0, len(firsts), ROWS_PER_BATCH):
        part = records.select(firsts[start : start + ROWS_PER_BATCH])
        images = (image for image in part.iterate_images() if image is not None)
        for error in find_unreadable_images(images, show_progress=show_progress).values():
            errors.add("image unreadable", error)


def _identify(file: Path | None) -> tuple[Path, str] | None:
    """Return the file of an index and when it was built: another build may have other images."""
    with suppress(FileNotFoundError):  # of an earlier state of the source, removed meanwhile
        return None if file is None else (file, str(file.stat().st_mtime_ns))
    return None


def _is_noted(index: tuple[Path, str], parts: Iterable[tuple[int, int]]) -> bool:
    """Tell whether another run has decoded all images of one of these parts."""
    file, built = index
    notes = (_note_file(file, *part) for part in parts)
    return any(note.is_file() and note.read_text(encoding="utf-8") == built for note in notes)


def _note_file(file: Path, process: int, num_processes: int) -> Path:
    return file.with_suffix(f".checked-{process}-of-{num_processes}")
