"""Detects changes of images that are files since their index was built.

| records | what is looked at when the index is found |
| --- | --- |
| up to 100,000 | the size of every image |
| more | the sizes of 32 images, and the modification times of up to 20,000 folders of images |

The time of a folder changes when a file in it is added, removed or replaced by another of its name,
and not when a file is written anew in its place. If one has changed, the size of every image
is looked at. Modification times of images are not: an index has nothing that depends on the content
of an image but its size.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from .record_columns import IMAGE_FILE
from .record_table import RecordTable

_MOST_IMAGES = 100_000
_MOST_FOLDERS = 20_000
_IMAGES_SAMPLED = 32
_THREADS = 8  # which a network's file system needs
_AT_ONCE = 1024
_UNKNOWN = 0  # in place of a time: the folder counts as changed


def has_same_images(table: RecordTable) -> bool:
    """Tell whether images that are files are as they were when their index was built."""
    assert table.file is not None
    if len(table) <= _MOST_IMAGES:
        return _has_same_sizes(table)
    rows = np.linspace(0, len(table) - 1, _IMAGES_SAMPLED).astype(np.int64)
    if not _has_same_sizes(table.select(np.unique(rows))):
        return False
    noted = _read_times(folder_times_file(table.file))
    if noted is not None and _find_times(list(noted)) == noted:
        return True
    started = time.time_ns()
    if not _has_same_sizes(table):
        return False
    note_folders(table, since=started)
    return True


def note_folders(table: RecordTable, *, since: int) -> None:
    """Note the modification times of the folders of images, beside a large index.

    A folder that changed at or after `since`, in nanoseconds, counts as changed next time."""
    if table.file is None or len(table) <= _MOST_IMAGES:
        return
    folders = sorted(_list_folders(table))
    chosen = np.unique(np.linspace(0, len(folders) - 1, _MOST_FOLDERS).astype(np.int64))
    found = _find_times([folders[number] for number in chosen.tolist()] if folders else [])
    times = {folder: ns if ns < since else _UNKNOWN for folder, ns in found.items()}
    file = folder_times_file(table.file)
    unfinished = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    with suppress(OSError):  # without it, every image is looked at
        try:
            unfinished.write_text(json.dumps(times), encoding="utf-8")
            unfinished.replace(file)
        finally:
            unfinished.unlink(missing_ok=True)


def folder_times_file(file: Path) -> Path:
    """Name the file beside an index that has the modification times of folders of images."""
    return file.with_suffix(".folders.json")


def _has_same_sizes(table: RecordTable) -> bool:
    with ThreadPoolExecutor(_THREADS) as pool:
        for batch in table.iterate_columns(("image_kind", "image_file", "image_size")):
            found = batch.filter(pc.equal(batch.column("image_kind"), IMAGE_FILE))
            parts = (found.slice(start, _AT_ONCE) for start in range(0, len(found), _AT_ONCE))
            if not all(pool.map(_are_of_size, parts)):
                return False
    return True


def _are_of_size(part: pa.RecordBatch) -> bool:
    files, sizes = (part.column(name).to_pylist() for name in ("image_file", "image_size"))
    try:
        # Without a Path, which takes longer than the call.
        return all(os.stat(f).st_size == size for f, size in zip(files, sizes, strict=True))  # noqa: PTH116
    except OSError:
        return False


def _list_folders(table: RecordTable) -> set[str]:
    folders: set[str] = set()
    for batch in table.iterate_columns(("image_kind", "image_file")):
        files = batch.column("image_file").filter(pc.equal(batch.column("image_kind"), IMAGE_FILE))
        folders |= {os.path.dirname(file) for file in files.unique().to_pylist()}  # noqa: PTH120
    return folders


def _find_times(folders: Sequence[str]) -> dict[str, int]:
    parts = [folders[start : start + _AT_ONCE] for start in range(0, len(folders), _AT_ONCE)]
    with ThreadPoolExecutor(_THREADS) as pool:
        times = chain.from_iterable(pool.map(lambda part: list(map(_find_time, part)), parts))
        return dict(zip(folders, times, strict=True))


def _find_time(folder: str) -> int:
    try:
        return os.stat(folder).st_mtime_ns  # noqa: PTH116
    except OSError:
        return _UNKNOWN


def _read_times(file: Path) -> Mapping[str, int] | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_whole = isinstance(found, dict) and _UNKNOWN not in found.values()
    return found if is_whole else None
