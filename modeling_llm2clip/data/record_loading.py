"""Loads captioned images from any source and reports all its errors at once.

The fields of a record are in `records.py`. A source is one of:

| source | what it is |
| --- | --- |
| a folder with `captions.jsonl` or `metadata.jsonl`, or that file | a record per line |
| `*.parquet`: a file, a folder of them, a pattern | a record per row; see `sources/parquet.py` |
| `*.tar`: a file, a folder of them, a pattern | webdataset shards; see `sources/tar_shards.py` |
| `*.json`: a file | COCO's captions as published; see `sources/coco.py` |

A pattern contains `*`, `?` or `[…]`. Files are read in the order of their names. Images that are
files are beside the source, those of COCO in a folder that is named.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from .image_sources import find_unreadable_images
from .records import CaptionedImage, RawRecord, build_record
from .sources.coco import read_coco
from .sources.json_files import read_json_lines
from .sources.parquet import read_parquet
from .sources.tar_shards import read_tar_shards
from .validation_errors import ErrorCollector

_LINES_FILES = ("captions.jsonl", "metadata.jsonl")
_SEVERAL_FILES = (".parquet", ".tar")
_PACKAGE = Path(__file__).resolve().parent.parent
_HUB_DATASET = re.compile(r"hub:(?P<name>[\w.-]+/[\w.-]+)@(?P<revision>[0-9a-f]{40})")


@dataclass(frozen=True)
class _Source:
    """Files of one format.

    Attributes:
        files: in the order in which they are read.
        base: folder that the names of shards and images are relative to.
        suffix: of all files, in lower case.
    """

    files: list[Path]
    base: Path
    suffix: str


@dataclass(frozen=True, slots=True)
class CollectedRecord:
    """A record and its errors.

    Attributes:
        record: built from what is left of it; None if its name or language cannot be read.
        errors: of this record.
    """

    record: CaptionedImage | None
    errors: ErrorCollector


def load_records(
    source: str | Path,
    *,
    image_dir: str | Path | None = None,
    require_images: bool = True,
    check_images: bool = False,
    ignore_fields: Collection[str] = (),
    show_progress: bool = False,
) -> list[CaptionedImage]:
    """Load the captioned images of a source, or raise once with every error.

    Args:
        source: a folder, file or pattern; see the top of this file.
        image_dir: folder of the images that are files. Default: the folder of the source.
        require_images: whether a record without its image is an error. If not, its `image` is
            None, which is enough where only captions are read.
        check_images: decode every image too, in threads, which takes as long as a pass over them.
        ignore_fields: names of further fields, which are not read and not errors.
        show_progress: show a progress bar while images are decoded.

    Returns:
        At least one record, in the order of the source.

    Raises:
        DataValidationError: records have errors: how many of each kind, and where the first are.
        ValueError: the source is missing, empty or ambiguous, or its format is unknown.

    Examples:
        >>> records = load_records("my-images")
        >>> records[0].name, records[0].captions[0]
        ('beach.jpg', 'Two dogs on a beach.')
    """
    errors = ErrorCollector()
    collected = iterate_records(
        source,
        errors,
        image_dir=image_dir,
        require_images=require_images,
        ignore_fields=ignore_fields,
    )
    for item in collected:
        errors.extend(item.errors)
    records = [item.record for item in collected if item.record is not None]
    if check_images:
        # Several languages may share an image, which is then decoded and reported once.
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
    ignore_fields: Collection[str] = (),
) -> list[CollectedRecord]:
    """Read a source as `load_records` does, for a caller that decides about its errors.

    Args:
        source: a folder, file or pattern; see the top of this file.
        errors: gets the errors that belong to no record.
        image_dir: folder of the images that are files. Default: the folder of the source.
        require_images: whether a record without its image is an error.
        ignore_fields: names of further fields, which are not errors.

    Returns:
        Each record, built from what is left of it, and its errors.

    Raises:
        ValueError: the source is missing, empty or ambiguous, or its format is unknown.
    """
    found = _find_source(str(source))
    images_in = _find_images(found, image_dir, required=require_images)
    records: list[CollectedRecord] = []
    seen: set[tuple[str, str]] = set()
    # Records without errors share one collector, to which nothing is added.
    nothing, own = ErrorCollector(), ErrorCollector()
    for raw in _read_raw(found, errors):
        record = build_record(
            raw,
            own,
            image_dir=images_in,
            require_images=require_images,
            ignore_fields=ignore_fields,
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
        for name in _LINES_FILES
        if (folder / name).is_file()
    ]
    for suffix in _SEVERAL_FILES:
        # In any case, as for a pattern's files.
        if files := sorted(f for f in folder.iterdir() if f.suffix.lower() == suffix):
            sources.append(_Source(files, folder, suffix))
    if not sources:
        raise ValueError(
            f"{folder} has no {' or '.join(_LINES_FILES)}, no *.parquet and no *.tar. Give the "
            "folder that has, or a pattern."
        )
    if len(sources) > 1:
        names = ", ".join(source.files[0].name for source in sources)
        raise ValueError(f"{folder} has several sources: {names}. Give one of them by its name.")
    return sources[0]


def _find_images(source: _Source, image_dir: str | Path | None, *, required: bool) -> Path | None:
    if image_dir is not None:
        if not Path(image_dir).is_dir():
            raise ValueError(
                f"image_dir={str(image_dir)!r} is not a folder. Give the folder of images."
            )
        return Path(image_dir)
    if source.suffix == ".json":
        if required:
            raise ValueError(
                f"{source.files[0]}: COCO's captions do not say where their images are. Give "
                "image_dir=<folder>, or require_images=False to read only the captions."
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


def find_example_data() -> Path:
    """Find the images that come with the package.

    Returns:
        The folder that contains `emoji` and `photographs`.

    Raises:
        FileNotFoundError: the installation lacks it.
    """
    # A wheel has the folder inside the package; a repository has it where people look for it.
    for folder in (_PACKAGE / "example_data", _PACKAGE.parent / "examples" / "data"):
        if (folder / "emoji").is_dir():
            return folder
    raise FileNotFoundError(
        f"The example images are not beside {_PACKAGE}. Install the package again, or give a "
        "folder of your own images."
    )


def fetch_dataset_folder(reference: str, pattern: str) -> Path:
    """Fetch files of a dataset on the Hub at one commit, or find them in the cache.

    Args:
        reference: `hub:OWNER/NAME@COMMIT`, with all 40 digits of the commit.
        pattern: of the files to fetch, such as `data/*.parquet`.

    Returns:
        The local folder.

    Raises:
        ValueError: the reference does not pin a commit, or cannot be fetched.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    match = _HUB_DATASET.fullmatch(reference)
    if match is None:
        raise ValueError(
            f"{reference!r} does not pin a commit. Give hub:OWNER/NAME@COMMIT with all 40 digits, "
            "so that the dataset stays the same."
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
            f"{reference} cannot be fetched ({error}). Check name, commit and license agreement, "
            "or give a local folder."
        ) from error
    return Path(folder)
