"""Builds the index of a source once and reuses it: records as columns in a memory-mapped file.

The parts of a source are read one by one, or by several processes if it is large, so memory does
not grow with the source. The index is cached under the names, sizes and modification times of the
source's files (for remote files, whatever the server reports instead of a time), so a changed file
is read again. Every build writes a new file, because open tables keep reading the old file. The
file's name ends with the SHA-256 of the file's content and of the counts of skipped rows next to
it, so a damaged index is detected and rebuilt. Indexes of a source that no run has opened for 30
days are removed.

The source is also read again if images in separate files are gone or have changed size. With up to
100,000 records, all images are checked; with more records, 10,000 evenly spaced images. The content
of images is not checked, because the index only records their sizes.
"""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, suppress
from dataclasses import dataclass, replace
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
from tqdm import tqdm

from ..atomic_files import (
    FREE_TEMPORARY_FOLDER,
    default_cache_folder,
    explain_full_disk,
    hash_file,
    hash_json,
    lock_folder,
    temporary_folder,
)
from ..record_fields import Modality
from ..remote.file_locations import (
    FileLocation,
    describe_states,
    list_states,
    name_file,
    use_states,
)
from ..remote.remote_files import FileInfo
from ..validation_errors import ErrorCollector
from .record_columns import IMAGE_FILE, ROWS_PER_BATCH, SCHEMA, make_batches, rebatch
from .record_table import RecordTable, read_skipped, skipped_file
from .records import CaptionedImage, RecordRules, check_record
from .source_files import SourceFiles, SourcePart

IMAGE_REPEATED = "image and language repeated"  # kind of error
TEXT_REPEATED = "name or id repeated in one language"  # the same, if only texts are read
_FORMAT_VERSION = 9
# A smaller index stays in memory, because rebuilding it is about as fast as finding it.
_MOST_ROWS_IN_MEMORY = 20_000
# Processes take a second to start.
_LEAST_BYTES_FOR_PROCESSES = 2**25
# Image files that are checked when an index is found: all if at most this many, else a sample.
_MOST_IMAGES = 100_000
_IMAGES_SAMPLED = 10_000
_THREADS = 8  # a network file system needs several
_CHUNK = 1024  # files per task of a thread
_UNFINISHED, _PARTS = ".tmp", ".parts"
_SECONDS_KEPT = 30 * 24 * 3600
_FREE_CACHE = "Free some space, or set XDG_CACHE_HOME to another folder for the cache"


@dataclass(frozen=True)
class IndexJob:
    """A source and the rules for its records."""

    source: SourceFiles
    rules: RecordRules

    def read(self, part: SourcePart, errors: ErrorCollector) -> Iterator[CaptionedImage]:
        """Yield the records of a part; invalid records keep only their valid fields."""
        for raw in self.source.read(part, errors):
            record = check_record(raw, errors, self.rules)
            if record is not None:
                yield record


def open_index(
    job: IndexJob, *, use_cache: bool = True, show_progress: bool = False
) -> tuple[RecordTable, ErrorCollector]:
    """Find the index of a source in the user's cache, or build the index and cache it.

    Returns the records in source order, including invalid ones, and the errors. An index with
    errors is not cached. Without the cache, a large index is in a temporary folder while this
    process runs.
    """
    states = describe_states(job.source.files)
    if not use_cache or None in states:  # a change would go unnoticed
        return _build(job, name_build(temporary_folder() / "records"), show_progress, states)
    name = _name_index(job, states)
    # A cached index of pairs has no errors, so it is also valid for only texts or only images.
    of_pairs = replace(job, rules=job.rules._replace(modality=None))
    table = _find(_name_index(of_pairs, states)) or _find(name)
    if table is None:
        with _lock(name):  # the first of several processes builds it
            table = _find(name)
            if table is None:
                _remove_old(name)
                return _build(job, name_build(name), show_progress, states)
    return table, ErrorCollector()


def name_build(name: Path) -> Path:
    """Return a new file name for one build, unique even among builds of the same source."""
    return name.with_name(f"{name.name}-{uuid4().hex[:16]}.arrow")


def _find(name: Path) -> RecordTable | None:
    """Open the latest complete index for a state of a source, if the images are unchanged."""
    times = {}
    for file in name.parent.glob(f"{name.name}-*.arrow"):
        with suppress(FileNotFoundError):  # just removed
            times[file] = file.stat().st_mtime_ns
    for file in sorted(times, key=times.__getitem__, reverse=True):
        try:
            # Checked before mapping: Arrow does not verify bytes, and corrupt ones can crash it.
            if _hash_index(file, read_skipped(file)) != file.stem.rpartition("-")[2]:
                continue
            table = RecordTable.open(file)
        except (OSError, ValueError):  # just removed, or its notes are damaged
            continue
        if _has_same_images(table):
            with suppress(OSError):  # another user's
                os.utime(file, ns=(time.time_ns(), times[file]))
            return table
    return None


def _build(
    job: IndexJob, file: Path, show_progress: bool, states: Sequence[FileInfo | None]
) -> tuple[RecordTable, ErrorCollector]:
    errors = ErrorCollector()
    remedy = _FREE_CACHE if file.is_relative_to(default_cache_folder()) else FREE_TEMPORARY_FOLDER
    unfinished = file.with_name(f"{file.name}.{os.getpid()}{_UNFINISHED}")
    with explain_full_disk(file.parent, "for the index of the data", remedy):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with closing(_read(job, file, errors, show_progress, states)) as batches:
                table = write_index(batches, unfinished)
            find_repeated(table, errors, modality=job.rules.modality)
            errors.compare_columns(job.rules.ignore_fields)
            if table.file is not None and errors.total:
                table = RecordTable(table._batches)  # mapped batches stay readable
            elif table.file is not None:
                file = file.with_stem(f"{file.stem}-{_hash_index(unfinished, errors.skipped)}")
                if errors.skipped:
                    skipped_file(file).write_text(json.dumps(errors.skipped), encoding="utf-8")
                table = RecordTable.open(unfinished.replace(file))
        finally:
            unfinished.unlink(missing_ok=True)
    table.skipped = dict(errors.skipped)
    return table, errors


def _read(
    job: IndexJob,
    file: Path,
    errors: ErrorCollector,
    show_progress: bool,
    states: Sequence[FileInfo | None],
) -> Generator[pa.RecordBatch, None, None]:
    """Read all parts; if the source is large, in several processes that write next to the index."""
    # A file whose server does not report its length is treated as large.
    num_bytes = sum(math.inf if state is None else state.size or 0 for state in states)
    parts = job.source.split()
    num_processes = min(len(parts), os.cpu_count() or 1)
    shown = show_progress and len(parts) > 1
    with tqdm(desc="index", total=len(parts), unit=" parts", disable=not shown) as progress:

        def read_here() -> Iterator[CaptionedImage]:
            for part in parts:
                yield from job.read(part, errors)
                progress.update()

        if num_processes == 1 or num_bytes <= _LEAST_BYTES_FOR_PROCESSES:
            yield from make_batches(read_here())
            return
        with tempfile.TemporaryDirectory(_PARTS, f"{file.name}.", file.parent) as folder:
            yield from rebatch(
                _read_in_processes(job, parts, errors, Path(folder), num_processes, progress)
            )


def _read_in_processes(
    job: IndexJob,
    parts: Sequence[SourcePart],
    errors: ErrorCollector,
    folder: Path,
    num_processes: int,
    progress: Any,
) -> Iterator[pa.RecordBatch]:
    """Read parts in processes that write into an empty folder; yield the batches in order.

    An error in a process is raised unchanged; if a process is killed, a `RuntimeError` is raised.
    """
    from loky import ProcessPoolExecutor  # type: ignore[import-untyped]

    job = replace(job, source=replace(job.source, files=[]))  # each part names its own file
    pool = ProcessPoolExecutor(num_processes, initializer=_start_process, initargs=(list_states(),))
    try:
        files = [folder / f"part-{number:06d}.arrow" for number in range(len(parts))]
        written = pool.map(_write_part, repeat(job), parts, files)
        for file, part_errors in zip(files, written, strict=True):
            with pa.memory_map(str(file)) as mapped:
                yield from pa.ipc.open_stream(mapped)
            errors.extend(part_errors)
            file.unlink()
            progress.update()
    finally:
        pool.shutdown(kill_workers=True)


def _start_process(states: dict[FileLocation, FileInfo]) -> None:
    # The garbage collector would scan every text of a batch, and there are no cycles to collect.
    gc.disable()
    use_states(states)


def _write_part(job: IndexJob, part: SourcePart, file: Path) -> ErrorCollector:
    errors = ErrorCollector()
    with pa.OSFile(str(file), "wb") as opened, pa.ipc.new_stream(opened, SCHEMA) as stream:
        for batch in make_batches(job.read(part, errors)):
            stream.write_batch(batch)
    return errors


def write_index(batches: Iterator[pa.RecordBatch], file: Path) -> RecordTable:
    """Write an index, or keep it in memory if it is small."""
    first = list(islice(batches, 2))
    if len(first) < 2 and sum(batch.num_rows for batch in first) <= _MOST_ROWS_IN_MEMORY:
        return RecordTable(first)
    with pa.OSFile(str(file), "wb") as opened, pa.ipc.new_file(opened, SCHEMA) as writer:
        for batch in chain(first, batches):
            writer.write_batch(batch)
    return RecordTable.open(file)


def find_repeated(
    table: RecordTable, errors: ErrorCollector, *, modality: Modality | None = None
) -> None:
    """Report images (or texts, if only texts are read) that occur twice in one language."""
    kind = TEXT_REPEATED if modality == "text" else IMAGE_REPEATED
    for _, place in iterate_repeated(table):
        errors.add(kind, place)


def iterate_repeated(table: RecordTable) -> Iterator[tuple[int, str]]:
    """Yield the row and place of each record with the name and language of an earlier row."""
    first = table.find_first_rows("key")
    repeated = np.flatnonzero(first != np.arange(len(first)))
    for start in range(0, len(repeated), ROWS_PER_BATCH):
        rows = repeated[start : start + ROWS_PER_BATCH]
        for row, (place,) in zip(rows.tolist(), table.take(rows, ["place"]), strict=True):
            yield row, place


def _name_index(job: IndexJob, states: Sequence[FileInfo | None]) -> Path:
    """Return the prefix of an index's file names: hashes of the source and of its state."""
    base, names = job.source.base, [name_file(file) for file in job.source.files[:1]]
    folders = [folder for folder in (base, job.rules.image_dir) if isinstance(folder, Path)]
    # An index keeps relative image paths as they were given; they are relative to this folder.
    start = None if all(folder.is_absolute() for folder in folders) else os.getcwd()  # noqa: PTH109
    source = hash_json([base, start, names, job.source.suffix, job.rules])[:16]
    files = [file.resolve() if isinstance(file, Path) else file for file in job.source.files]
    state = hash_json([_FORMAT_VERSION, files, states])[:16]
    return default_cache_folder() / "records" / f"{source}-{state}"


def _remove_old(name: Path) -> None:
    """Remove unused indexes of a source, and everything that killed processes left behind."""
    files = list(name.parent.glob(f"{name.name.partition('-')[0]}-*"))
    oldest = time.time() - _SECONDS_KEPT
    indexes = [file for file in files if file.suffix == ".arrow"]
    kept = {index.stem for index in indexes if index.stat().st_atime >= oldest}
    for file in files:
        if file.name.partition(".")[0] not in kept:
            with suppress(OSError):  # another user's
                if file.is_dir():
                    shutil.rmtree(file)
                else:
                    file.unlink()


def _hash_index(file: Path, skipped: Mapping[str, int]) -> str:
    """Hash the file of an index and the counts of skipped rows next to it, if any."""
    digest = hash_file(file)
    return hash_json([digest, skipped]) if skipped else digest


def _lock(name: Path) -> AbstractContextManager[Any]:
    """Acquire the lock of a source, regardless of the state of its files."""
    folder = name.with_name(f"{name.name.partition('-')[0]}.locked")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            error.errno,
            f"The cache cannot be written ({error.strerror}). Set XDG_CACHE_HOME to another "
            "folder, or pass --no-cache",
            str(name.parent),
        ) from error
    return lock_folder(folder)


def _has_same_images(table: RecordTable) -> bool:
    """Return whether image files still exist and have the sizes that the index records."""
    if len(table) > _MOST_IMAGES:
        table = table.select(np.linspace(0, len(table) - 1, _IMAGES_SAMPLED).astype(np.int64))
    with ThreadPoolExecutor(_THREADS) as pool:
        for batch in table.iterate_columns(("image_kind", "image_file", "image_size")):
            files = batch.filter(pc.equal(batch.column("image_kind"), IMAGE_FILE))
            parts = (files.slice(start, _CHUNK) for start in range(0, len(files), _CHUNK))
            if not all(pool.map(_are_of_size, parts)):
                return False
    return True


def _are_of_size(part: pa.RecordBatch) -> bool:
    files, sizes = (part.column(name).to_pylist() for name in ("image_file", "image_size"))
    try:
        # os.stat, because creating a Path takes longer than the call.
        return all(os.stat(f).st_size == size for f, size in zip(files, sizes, strict=True))  # noqa: PTH116
    except OSError:
        return False
