"""Decoding of all images before a stage begins, so that a broken one does not end it half way.

It takes as long as a pass over the images, so it is noted beside a cached index, and done once.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from ..images.image_sources import find_unreadable_images
from ..validation_errors import ErrorCollector
from .record_columns import ROWS_PER_BATCH, hash_text
from .record_table import RecordTable

_NOTE = ".checked-"


def check_images(
    records: RecordTable, errors: ErrorCollector, *, show_progress: bool = False
) -> None:
    """Decode every image once, however many records share it.

    The processes of a launch on one machine share the work, and each has the errors of its part.

    Args:
        records: all records of an index.
        errors: what is wrong with an image is added to them.
        show_progress: show a progress bar.
    """
    process = int(os.environ.get("LOCAL_RANK", "0"))
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if _is_checked(records.file, process, num_processes):
        return
    part = records
    if num_processes > 1:  # records that share an image are next to each other
        ends = [len(records) * number // num_processes for number in (process, process + 1)]
        part = records.select(range(*ends))
    is_broken = False
    keys = np.fromiter((hash_text(str(i)) for i in part.iterate_images()), np.int64)
    firsts = np.sort(np.unique(keys, return_index=True)[1])
    # A part at a time, so that the addresses of a large dataset are not all in memory.
    for start in range(0, len(firsts), ROWS_PER_BATCH):
        some = part.select(firsts[start : start + ROWS_PER_BATCH])
        images = (image for image in some.iterate_images() if image is not None)
        for error in find_unreadable_images(images, show_progress=show_progress).values():
            errors.add("image unreadable", error)
            is_broken = True
    if records.file is not None and not is_broken:
        _note_file(records.file, process, num_processes).touch()


def forget_checks(file: Path) -> None:
    """Forget that images were checked: an index that is built anew may be of others.

    Args:
        file: of the index.
    """
    for note in file.parent.glob(f"{file.stem}{_NOTE}*"):
        note.unlink(missing_ok=True)


def _is_checked(file: Path | None, process: int, num_processes: int) -> bool:
    """Whether another run has checked all images of an index, or those of this process."""
    if file is None:
        return False
    parts = {(0, 1), (process, num_processes)}
    return any(_note_file(file, *part).is_file() for part in parts)


def _note_file(file: Path, process: int, num_processes: int) -> Path:
    return file.with_suffix(f"{_NOTE}{process}-of-{num_processes}")
