"""List the image files in a folder, report skipped files, and make records from the images."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG

from .._suggestions import counted, is_unicode, list_first
from ..data.images.image_sources import (
    OPTIONAL_IMAGE_SUFFIXES,
    find_unreadable_images,
    list_readable_suffixes,
)
from ..data.records.record_table import RecordTable
from ..data.records.records import CaptionedImage
from ..data.remote.remote_access import raise_disk_failure
from ..data.validation_errors import ErrorCollector

_UNREADABLE = "image unreadable"  # kind of error
# Reasons to skip files, in the order in which they are reported: noun, reason, remedy.
_FORMAT = (
    "image file",
    "in formats that this Pillow cannot read",
    "Install pillow-heif for HEIC or Pillow 11.3 for AVIF; convert other formats to JPEG or PNG.",
)
_DANGLING = ("symbolic link", "to no file", "Fix or remove these links.")
_LINKED_FOLDER = (
    "symbolic link",
    "to a folder, not followed",
    "Move the images into the folder, or pass the linked folders themselves.",
)
_CLOSED_FOLDER = ("folder", "that cannot be listed", "Check the permissions.")


@dataclass(frozen=True)
class ImageFiles:
    """The image files of a folder.

    Attributes:
        readable: Files in a format that can be decoded, sorted.
        skipped: Sorted paths of skipped files, keyed by noun, reason and remedy of their message:
            image files in unsupported formats, dangling symbolic links, symbolic links to folders,
            and folders that cannot be listed.
    """

    readable: list[Path]
    skipped: dict[tuple[str, str, str], list[Path]]

    def describe_skipped(self) -> str:
        """Return one line per reason, with file names and a remedy."""
        return "\n".join(
            f"Skipped {counted(len(paths), noun)} {reason}: {list_first(paths)}. {remedy}"
            for (noun, reason, remedy), paths in self.skipped.items()
            if paths
        )


def list_images(image_dir: str | Path) -> ImageFiles:
    """List the image files in a folder and its subfolders by their suffixes.

    A symbolic link to a file counts as a file. A link to a folder is not followed, because it may
    lead to a parent folder or to images that are already listed.
    """
    folder = Path(image_dir)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder. Pass a folder of images.")
    readable = list_readable_suffixes()
    files = ImageFiles([], {_FORMAT: [], _DANGLING: [], _LINKED_FOLDER: [], _CLOSED_FOLDER: []})
    closed: list[OSError] = []
    looked_at = readable | OPTIONAL_IMAGE_SUFFIXES | {""}
    for root, folders, names in os.walk(folder, onerror=closed.append):
        paths = [Path(root, name) for name in folders]
        files.skipped[_LINKED_FOLDER].extend(path for path in paths if path.is_symlink())
        for path in (Path(root, name) for name in names):
            suffix = path.suffix.lower().removeprefix(".")
            if suffix not in looked_at:
                continue
            if _is_file(path):
                if suffix:
                    (files.readable if suffix in readable else files.skipped[_FORMAT]).append(path)
            elif path.is_symlink():
                files.skipped[_DANGLING].append(path)
    for error in closed:
        raise_disk_failure(error, error.filename)
        files.skipped[_CLOSED_FOLDER].append(Path(os.fsdecode(error.filename)))
    for paths in (files.readable, *files.skipped.values()):
        paths.sort()
    if not files.readable:
        suffixes = ", ".join(f".{suffix}" for suffix in sorted(readable))
        raise ValueError(
            f"{folder}: no image in it or its subfolders ({suffixes}). {files.describe_skipped()}"
        )
    return files


def records_from_images(
    image_dir: str | Path,
    *,
    check_images: bool | None = False,
    skip_invalid: bool = False,
    show_progress: bool = False,
    report: Callable[[str], object] = warnings.warn,
) -> RecordTable:
    """Make a record without captions for every image in a folder and its subfolders.

    Args:
        image_dir: Folder of images.
        check_images: Decode every image to check it. With None, images are decoded only if there
            are other errors, so all errors are reported together.
        skip_invalid: Skip and report images whose names are not Unicode, instead of raising.
            Records can only hold valid Unicode.
        show_progress: Show a progress bar while images are decoded.
        report: Called with a message about skipped files: image files in formats that cannot be
            decoded, symbolic links to folders, and dangling symbolic links.

    Returns:
        Records sorted by name, which is the path relative to the folder.

    Raises:
        ValueError: The folder does not exist, or has no readable image.
        DataValidationError: Some images cannot be decoded, or have names that are not Unicode; the
            message counts all such images.

    Examples:
        >>> records = records_from_images("my-images")
        >>> folder = embed("my-model", records, "embeddings", modality="image")
    """
    folder = Path(image_dir)
    files = list_images(folder)
    if skipped := files.describe_skipped():
        report(skipped)
    images, unnamed = split_by_unicode(files.readable)
    errors = ErrorCollector()
    if skip_invalid and unnamed:
        count = counted(len(unnamed), "image")
        report(
            f"Skipped {count} whose name is not valid Unicode: {list_first(unnamed)}. Rename them."
        )
    elif unnamed:
        for name in unnamed:
            errors.add(_UNREADABLE, f"{name}: its file name is not valid Unicode. Rename it.")
    if errors.total if check_images is None else check_images:
        for error in find_unreadable_images(images, show_progress=show_progress).values():
            errors.add(_UNREADABLE, error)
    errors.raise_if_any(str(folder))
    if not images:
        raise ValueError(f"{str(folder)!a}: no image has a valid Unicode file name. Rename them.")
    names = [path.relative_to(folder).as_posix() for path in images]
    return RecordTable.from_records(
        CaptionedImage(image=path, name=name, group_id=name, captions=())
        for path, name in zip(images, names, strict=True)
    )


def _is_file(path: Path) -> bool:
    """Return True if a path leads to a file; raise an error if the disk fails.

    Since Python 3.14, `Path.is_file` hides disk failures.
    """
    try:
        return S_ISREG(path.stat().st_mode)
    except PermissionError:
        return True  # reading the file raises an error that names it
    except OSError as error:
        raise_disk_failure(error, path)
        return False


def split_by_unicode(paths: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Return the paths with Unicode names, and the escaped names of all other paths."""
    return list(filter(is_unicode, paths)), [
        repr(str(path)) for path in paths if not is_unicode(path)
    ]
