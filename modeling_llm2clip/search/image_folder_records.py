"""Records of the images in a folder that has nothing but images."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

from ..data.images.image_sources import find_unreadable_images
from ..data.records.record_table import RecordTable
from ..data.records.records import CaptionedImage
from ..data.validation_errors import ErrorCollector
from .image_files import list_images


def records_from_images(
    image_dir: str | Path,
    *,
    check_images: bool = False,
    show_progress: bool = False,
    report: Callable[[str], object] = warnings.warn,
) -> RecordTable:
    """Make a record without captions for every image in a folder and its subfolders.

    Args:
        image_dir: Folder of images.
        check_images: Decode every image, too.
        show_progress: Show a progress bar while images are decoded.
        report: Called with lines on what is left out: image files of formats that cannot be
            decoded here, and symbolic links to folders or to no file.

    Returns:
        Records in the order of their names, which are the paths below the folder.

    Raises:
        ValueError: There is no such folder, or no readable image in it.
        DataValidationError: Images cannot be decoded; all of them are counted.

    Examples:
        >>> records = records_from_images("my-images")
        >>> folder = embed("my-model", records, "embeddings", modality="image")
    """
    folder = Path(image_dir)
    files = list_images(folder)
    if skipped := files.describe_skipped():
        report(skipped)
    if check_images:
        errors = ErrorCollector()
        for error in find_unreadable_images(files.readable, show_progress=show_progress).values():
            errors.add("image unreadable", error)
        errors.raise_if_any(str(folder))
    names = [path.relative_to(folder).as_posix() for path in files.readable]
    return RecordTable.from_records(
        CaptionedImage(image=path, name=name, group_id=name, captions=())
        for path, name in zip(files.readable, names, strict=True)
    )
