"""Loads captioned images from any source and reports all errors at once.

`record_fields.py` describes the fields of a record, and `source_files.py` the sources.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..._suggestions import counted
from ...configs.config_fields import DataConfig
from ..atomic_files import temporary_folder
from ..images.image_sources import find_unreadable_images
from ..record_fields import list_ignored
from ..validation_errors import ErrorCollector
from .record_columns import ROWS_PER_BATCH, hash_text, make_batches
from .record_index import (
    IMAGE_REPEATED,
    IndexJob,
    iterate_repeated,
    name_build,
    open_index,
    write_index,
)
from .record_table import RecordTable
from .records import CaptionedImage, Modality, RecordRules, check_record
from .source_files import describe_line, find_image_folder, find_source

_PACKAGE = Path(__file__).resolve().parents[2]
_HUB_DATASET = re.compile(r"hub:(?P<name>[\w.-]+/[\w.-]+)@(?P<revision>[0-9a-f]{40})")


@dataclass(frozen=True)
class CollectedRecords:
    """The records of a source, without their invalid fields.

    Attributes:
        records: The records; invalid records have only their valid fields.
        errors_of: Row of a record → its errors.
        lost: Errors of each record that is not in `records`, because its name or language cannot be
            read, or one of its texts is not valid Unicode.
        stray: Errors that belong to no record.
    """

    records: RecordTable
    errors_of: Mapping[int, ErrorCollector]
    lost: Sequence[ErrorCollector]
    stray: ErrorCollector


def load_records(
    source: str | Path,
    *,
    image_dir: str | Path | None = None,
    require_images: bool = True,
    check_images: bool | None = False,
    ignore_fields: Collection[str] = (),
    caption_fields: Collection[str] | None = None,
    cache: bool = True,
    show_progress: bool = False,
    modality: Modality | None = None,
) -> RecordTable:
    """Load the captioned images of a source, or raise one error that reports every problem.

    The records of a large source are read once into an index in the user's cache
    (`$XDG_CACHE_HOME/llm2clip/records`), not into memory. The index is reused as long as the
    source's files keep their names, sizes and modification times, and images in separate files keep
    their sizes (`record_index.py` describes which are checked). Images at URLs are downloaded when
    they are opened, which is fastest in the order of records.

    Args:
        source: A folder, file, pattern or URL; see `source_files.py`.
        image_dir: Folder of images in separate files. Default: the folder of the source.
        require_images: Whether a record without an image is an error. If not, the record's `image`
            is None, which is enough to read only captions.
        check_images: Also decode every image, in threads, which takes as long as one pass over the
            images. All runs that use the same cached index share one check. With None, images are
            only decoded if there are other errors, to report all errors together.
        ignore_fields: Names of fields to ignore, whether they are known or not.
        caption_fields: Fields of the captions to read, short and long, such as
            `("shortSV_captions", "longSV_captions")`. Every record must have these fields; other
            captions are ignored. Default: every field of captions.
        cache: Whether to keep the index of a large source for later runs.
        show_progress: Show a progress bar while the source is read and images are decoded.
        modality: Read only images or only texts, for `embed`: `image` accepts images without
            captions; `text` does not look for images, and accepts files that contain only texts.
            Default: pairs.

    Returns:
        At least one record, in source order.

    Raises:
        DataValidationError: Records have errors; the message counts each kind and locates the first
            errors.
        ValueError: The source is missing, empty or ambiguous, or its format is unknown.
        AccessError: Access to a URL is denied, or its host cannot be reached.
        OSError: The index cannot be written, for example because the disk is full.

    Examples:
        >>> records = load_records("my-images")
        >>> records[0].name, records[0].captions[0]
        ('beach.jpg', 'Two dogs on a beach.')
    """
    job = _plan(source, image_dir, require_images, ignore_fields, caption_fields, modality)
    records, errors = open_index(job, use_cache=cache, show_progress=show_progress)
    if errors.total if check_images is None else check_images:
        decode_images(records, errors, show_progress=show_progress)
    errors.raise_if_any(str(source))
    if not records:
        path = Path(source)
        folder = path if path.is_dir() else path.parent
        advice = "Each text needs one." if modality == "text" else describe_line(folder)
        raise ValueError(f"{source} has no records. {advice}")
    return records


def read_configured_records(
    data: str | Path,
    config: DataConfig,
    *,
    require_images: bool,
    check_images: bool | None,
    modality: Modality | None = None,
    show_progress: bool = True,
) -> RecordTable:
    """Read records as a `DataConfig` specifies; print the number of skipped rows to stderr."""
    records = load_records(
        data,
        image_dir=config.image_dir,
        require_images=require_images or bool(check_images),
        check_images=check_images,
        ignore_fields=config.ignore_fields,
        caption_fields=config.caption_fields,
        cache=config.cache,
        show_progress=show_progress,
        modality=modality,
    )
    for reason, count in records.skipped.items():
        tqdm.write(f"{data}: skipped {counted(count, 'row')}: {reason}.", file=sys.stderr)
    return records


def _plan(
    source: str | Path,
    image_dir: str | Path | None,
    require_images: bool,
    ignore_fields: Collection[str],
    caption_fields: Collection[str] | None,
    modality: Modality | None = None,
) -> IndexJob:
    ignored = tuple(list_ignored(ignore_fields, caption_fields))
    files = find_source(str(source), modality=modality)
    require_images = require_images and modality != "text"
    folder = find_image_folder(files, image_dir, required=require_images)
    chosen = tuple(sorted(caption_fields or ()))
    rules = RecordRules(folder, require_images, ignored, modality, chosen)
    return IndexJob(files, rules)


def decode_images(
    records: RecordTable, errors: ErrorCollector, *, show_progress: bool = False
) -> None:
    """Decode every distinct image once, so no later stage fails halfway.

    The processes of a launch on one machine share the work, and each process reports the errors in
    its part. Success is recorded next to a cached index, so images are checked only once if the
    cache is writable.
    """
    process = int(os.environ.get("LOCAL_RANK", "0"))
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    notes = [
        records.file.with_suffix(f".checked-{part}-of-{count}")
        for part, count in ((process, num_processes), (0, 1))
        if records.file is not None
    ]
    if any(note.is_file() for note in notes):  # every build has its own name, so its own notes
        return
    part = records
    if num_processes > 1:  # records that share an image are adjacent
        ends = [len(records) * number // num_processes for number in (process, process + 1)]
        part = records.select(range(*ends))
    before = errors.total
    _decode(part, errors, show_progress=show_progress)
    if notes and errors.total == before:
        with suppress(OSError):  # a read-only cache: later runs check again
            notes[0].touch()


def _decode(records: RecordTable, errors: ErrorCollector, *, show_progress: bool) -> None:
    keys = np.fromiter((hash_text(str(i)) for i in records.iterate_images()), np.int64)
    firsts = np.sort(np.unique(keys, return_index=True)[1])
    # One part at a time, so the addresses of a large dataset are not all in memory.
    for start in range(0, len(firsts), ROWS_PER_BATCH):
        part = records.select(firsts[start : start + ROWS_PER_BATCH])
        images = (image for image in part.iterate_images() if image is not None)
        for error in find_unreadable_images(images, show_progress=show_progress).values():
            errors.add("image unreadable", error)


def collect_records(
    source: str | Path,
    *,
    image_dir: str | Path | None = None,
    require_images: bool = True,
    ignore_fields: Collection[str] = (),
    caption_fields: Collection[str] | None = None,
    cache: bool = True,
) -> CollectedRecords:
    """Read a source like `load_records`, but return the errors instead of raising them.

    A source with errors is read twice, because its index only counts the errors.
    """
    job = _plan(source, image_dir, require_images, ignore_fields, caption_fields)
    records, errors = open_index(job, use_cache=cache)
    return _collect(job) if errors.total else CollectedRecords(records, {}, (), errors)


def _collect(job: IndexJob) -> CollectedRecords:
    """Read a source record by record, keeping the errors of each record separate."""
    stray = ErrorCollector()
    errors_of: dict[int, ErrorCollector] = {}
    lost: list[ErrorCollector] = []

    def read() -> Iterator[CaptionedImage]:
        num_rows = 0
        for raw in (raw for part in job.source.split() for raw in job.source.read(part, stray)):
            errors = ErrorCollector()
            record = check_record(raw, errors, job.rules)
            if record is None:
                lost.append(errors)
                continue
            if errors.total:
                errors_of[num_rows] = errors
            num_rows += 1
            yield record

    table = write_index(make_batches(read()), name_build(temporary_folder() / "records"))
    table.skipped = dict(stray.skipped)
    stray.compare_columns(job.rules.ignore_fields)
    for row, place in iterate_repeated(table):
        errors_of.setdefault(row, ErrorCollector()).add(IMAGE_REPEATED, place)
    return CollectedRecords(table, errors_of, lost, stray)


def find_example_data() -> Path:
    """Return the folder of the example images that come with the package."""
    # A wheel has it inside the package; a repository has it next to the other examples.
    for folder in (_PACKAGE / "example_data", _PACKAGE.parent / "examples" / "data"):
        if (folder / "emoji").is_dir():
            return folder
    raise FileNotFoundError(
        f"The example images are not next to {_PACKAGE}. Reinstall the package, or use a folder "
        "of your own images."
    )


def fetch_dataset_folder(reference: str, pattern: str) -> Path:
    """Download a dataset's files from the Hub at one commit, or find the files in the cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    match = _HUB_DATASET.fullmatch(reference)
    if match is None:
        raise ValueError(
            f"{reference!r} does not pin a commit. Write hub:OWNER/NAME@COMMIT with all 40 digits, "
            "so the dataset cannot change."
        )
    try:
        folder = snapshot_download(
            match["name"],
            revision=match["revision"],
            repo_type="dataset",
            allow_patterns=[pattern],
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{reference} cannot be downloaded ({error}). Check the name, the commit and the "
            "license agreement, or use a local folder."
        ) from error
    return Path(folder)
