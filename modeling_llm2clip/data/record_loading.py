"""Reads images with captions, whatever they lie in, and tells every error of a source at once.

The fields are the schema of `captioned_images.py`. A source is one of:

| source | what it is |
| --- | --- |
| a folder with `captions.jsonl` or `metadata.jsonl`, or that file | one line a record; images are
files beside it, or in `images` | | `*.parquet`: a file, a folder of them, a pattern | one row a
record; see `sources/parquet.py` | | `*.tar`: a file, a folder of them, a pattern | webdataset's
shards; see `sources/tar_shards.py` | | `*.json`: a file | COCO's captions as published; images are
files in `images`; see `sources/coco.py` |

A pattern has `*`, `?` or `[…]`. Files are read in the order of their names. Several languages of a
image are several records.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from .image_checks import find_unreadable_images
from .records import CaptionedImage, RawRecord, build_record
from .sources.coco import read_coco
from .sources.json_files import read_json_lines
from .sources.parquet import read_parquet
from .sources.tar_shards import read_tar_shards
from .validation_errors import ErrorCollector

LINES_FILES = ("captions.jsonl", "metadata.jsonl")
_SEVERAL_FILES = (".parquet", ".tar")


@dataclass(frozen=True)
class _Source:
    """Files of one format.

    Attributes:
        files: in the order in which they are read.
        base: folder that the names of shards are relative to, and images that are files.
        suffix: their format.
    """

    files: list[Path]
    base: Path
    suffix: str


@dataclass(frozen=True, slots=True)
class CollectedRecord:
    """A record and what is wrong with it; None is one that cannot be told from others."""

    record: CaptionedImage | None
    errors: ErrorCollector


def load_records(
    source: str | Path,
    *,
    image_dir: str | Path | None = None,
    require_images: bool = True,
    check_images: bool = False,
    ignored_fields: Collection[str] = (),
    show_progress: bool = False,
) -> list[CaptionedImage]:
    """Read every record of a source, or raise once with every error.

    Args:
        source: a folder, file or pattern; see the top of this file.
        image_dir: folder of the images that are files; default: where the source lies.
        require_images: whether a record without its image is an error. Otherwise its `image`
            is None, which is enough for whatever reads captions only.
        check_images: decode every image too, in threads; takes as long as a pass over them.
        ignored_fields: names of further fields, which are not used and then no error.
        show_progress: show a bar while images are decoded.
    Returns: the records in the source's order, at least one.
    Raises:
        DataValidationError: what is wrong with the records, how many of each kind, and where first.
        ValueError: the source is missing, empty, ambiguous, or of no known format.
    """
    errors = ErrorCollector()
    collected = iterate_records(
        source,
        errors,
        image_dir=image_dir,
        require_images=require_images,
        ignored_fields=ignored_fields,
    )
    for item in collected:
        errors.extend(item.errors)
    records = [item.record for item in collected if item.record is not None]
    if check_images:
        # Several languages may share an image, which is then decoded and told once.
        images = (record.image for record in records if record.image is not None)
        for error in find_unreadable_images(images, show_progress=show_progress).values():
            errors.add("image unreadable", error)
    errors.raise_if_any(str(source))
    if not records:
        raise ValueError(f"{source} has no records. Each image needs one.")
    return records


def iterate_records(
    source: str | Path,
    errors: ErrorCollector,
    *,
    image_dir: str | Path | None = None,
    require_images: bool = True,
    ignored_fields: Collection[str] = (),
) -> list[CollectedRecord]:
    """Read a source as `load_records` does, for a caller that decides about its errors.

    Args:
        errors: gets those that belong to no record.
    Returns: each record, made of what is left of it, and its own errors.
    Raises: ValueError when the source is missing, empty, ambiguous, or of no known format.
    """
    found = _find_source(str(source))
    images = _find_images(found, image_dir, required=require_images)
    records: list[CollectedRecord] = []
    seen: set[tuple[str, str]] = set()
    # Records without errors share one collector, which nothing is added to.
    nothing, own = ErrorCollector(), ErrorCollector()
    for raw in _read_raw(found, errors):
        record = build_record(
            raw,
            own,
            images=images,
            require_images=require_images,
            ignored_fields=ignored_fields,
        )
        if record is not None:
            if (record.name, record.lang) in seen:
                own.add("image and language repeated", raw.place)
            seen.add((record.name, record.lang))
        records.append(CollectedRecord(record, own if own.total else nothing))
        if own.total:
            own = ErrorCollector()
    return records


def _find_source(source: str) -> _Source:
    path = Path(source)
    if path.is_dir():
        return _search_folder(path)
    files, base = [path] if path.is_file() else [], path.parent
    if not files and (wildcard := re.search(r"[*?\[]", source)):
        # Names are relative to the last folder before the first wildcard.
        start = max(source.rfind(mark, 0, wildcard.start()) for mark in ("/", os.sep)) + 1
        base = Path(source[:start])
        files = sorted(file for file in base.glob(source[start:]) if file.is_file())
    if not files:
        raise ValueError(f"{source}: no such folder or file. Correct the path.")
    suffixes = sorted({file.suffix.lower() for file in files})
    if len(suffixes) > 1 or suffixes[0] not in (".jsonl", *_SEVERAL_FILES, ".json"):
        raise ValueError(
            f"{source}: found {', '.join(suffixes)}. Give a folder, or files of one format: "
            ".jsonl, .parquet, .tar, or COCO's .json."
        )
    if len(files) > 1 and suffixes[0] not in _SEVERAL_FILES:
        raise ValueError(f"{source}: {len(files)} {suffixes[0]} files. Give one of them.")
    return _Source(files, base, suffixes[0])


def _search_folder(folder: Path) -> _Source:
    sources = [
        _Source([folder / name], folder, ".jsonl")
        for name in LINES_FILES
        if (folder / name).is_file()
    ]
    for suffix in _SEVERAL_FILES:
        # As a pattern's files are told: capitals are no other format.
        if files := sorted(f for f in folder.iterdir() if f.suffix.lower() == suffix):
            sources.append(_Source(files, folder, suffix))
    if not sources:
        raise ValueError(
            f"{folder} has no {' or '.join(LINES_FILES)}, no *.parquet and no *.tar. Give the "
            "folder that has, or a pattern."
        )
    if len(sources) > 1:
        names = ", ".join(source.files[0].name for source in sources)
        raise ValueError(f"{folder} has several sources: {names}. Give one of them by its name.")
    return sources[0]


def _find_images(source: _Source, image_dir: str | Path | None, *, required: bool) -> Path | None:
    if image_dir is not None:
        if not Path(image_dir).is_dir():
            raise ValueError(f"image_dir={str(image_dir)!r} is no folder. Give the images' folder.")
        return Path(image_dir)
    if source.suffix == ".json":
        if required:
            raise ValueError(
                f"{source.files[0]}: COCO's captions lie apart from their images. Give "
                "image_dir=<folder>, or require_images=False to read the captions alone."
            )
        return None
    return None if source.suffix == ".tar" else source.base


def _read_raw(source: _Source, errors: ErrorCollector) -> Iterator[RawRecord]:
    if source.suffix == ".parquet":
        return read_parquet(source.files, source.base, errors)
    if source.suffix == ".tar":
        return read_tar_shards(source.files, source.base, errors)
    if source.suffix == ".json":
        return read_coco(source.files[0], errors)
    return read_json_lines(source.files[0], errors)
