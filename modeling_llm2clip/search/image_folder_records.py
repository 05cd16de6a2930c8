"""Records of the images in a folder that has nothing but images."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from .._suggestions import counted
from ..data.images.image_sources import find_unreadable_images
from ..data.records.record_table import RecordTable
from ..data.records.records import CaptionedImage
from ..data.validation_errors import ErrorCollector
from .image_files import list_images

_UNREADABLE = "image unreadable"  # kind of error
_SHOWN = 8


def records_from_images(
    image_dir: str | Path,
    *,
    check_images: bool = False,
    skip_invalid: bool = False,
    show_progress: bool = False,
    report: Callable[[str], object] = warnings.warn,
) -> RecordTable:
    """Make a record without captions for every image in a folder and its subfolders.

    Args:
        image_dir: Folder of images.
        check_images: Decode every image, too.
        skip_invalid: Leave out and report images whose names are not Unicode, which no record can
            have, instead of stopping at them.
        show_progress: Show a progress bar while images are decoded.
        report: Called with lines on what is left out: image files of formats that cannot be
            decoded here, and symbolic links to folders or to no file.

    Returns:
        Records in the order of their names, which are the paths below the folder.

    Raises:
        ValueError: There is no such folder, or no readable image in it.
        DataValidationError: Images cannot be decoded, or have names that are not Unicode; all of
            them are counted.

    Examples:
        >>> records = records_from_images("my-images")
        >>> folder = embed("my-model", records, "embeddings", modality="image")
    """
    folder = Path(image_dir)
    files = list_images(folder)
    if skipped := files.describe_skipped():
        report(skipped)
    unnamed = [path for path in files.readable if not _is_unicode(str(path))]
    errors = ErrorCollector()
    for path in [] if skip_invalid else unnamed:
        errors.add(_UNREADABLE, f"{str(path)!r}: its name is not Unicode. Rename it.")
    if skip_invalid and unnamed:
        report(_describe_unnamed(unnamed))
    left_out = set(unnamed)
    images = [path for path in files.readable if path not in left_out]
    if check_images:
        for error in find_unreadable_images(images, show_progress=show_progress).values():
            errors.add(_UNREADABLE, error)
    errors.raise_if_any(str(folder))
    if not images:
        raise ValueError(f"{str(folder)!a}: no image whose name is Unicode. Rename them.")
    names = [path.relative_to(folder).as_posix() for path in images]
    return RecordTable.from_records(
        CaptionedImage(image=path, name=name, group_id=name, captions=())
        for path, name in zip(images, names, strict=True)
    )


def _is_unicode(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # bytes that are not UTF-8
        return False
    return True


def _describe_unnamed(paths: Sequence[Path]) -> str:
    named = ", ".join(repr(str(path)) for path in paths[:_SHOWN])
    more = ", …" if len(paths) > _SHOWN else ""
    return f"Skipped {counted(len(paths), 'image')} without a Unicode name: {named}{more}. Rename."
