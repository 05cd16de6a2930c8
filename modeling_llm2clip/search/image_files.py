"""Image files in a folder: those that can be decoded here, and what is left out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISREG

from .._suggestions import counted
from ..data.images.image_sources import OPTIONAL_IMAGE_SUFFIXES, list_readable_suffixes
from ..data.remote.remote_access import raise_disk_failure

_SHOWN = 8
_REMEDIES = {
    "pip install pillow-heif": {"heic", "heif", "hif"},
    "pip install --upgrade pillow (11.3 or later)": {"avif"},
}


@dataclass(frozen=True)
class ImageFiles:
    """The image files of a folder.

    Attributes:
        readable: Files of a format that can be decoded here, in order.
        skipped: Image files of any other format, in order.
        dangling: Symbolic links that lead to no file, of the names of images or without a suffix.
        linked_folders: Symbolic links to folders, which are not followed.
        closed_folders: Folders that cannot be listed, such as those of other users.
    """

    readable: list[Path]
    skipped: list[Path]
    dangling: list[Path] = field(default_factory=list)
    linked_folders: list[Path] = field(default_factory=list)
    closed_folders: list[Path] = field(default_factory=list)

    def describe_skipped(self) -> str:
        """Count and name what is left out, and say how to have it read."""
        lines = [self._describe_formats()] if self.skipped else []
        for paths, what, remedy in (
            (self.dangling, "symbolic links that lead to no file", "Correct or remove them."),
            (
                self.linked_folders,
                "symbolic links to folders, which are not followed",
                "Move the images into the folder, or name the other folders themselves.",
            ),
            (self.closed_folders, "folders that cannot be listed", "Check who may read them."),
        ):
            if paths:
                lines.append(f"Skipped {len(paths):,} {what}: {_list_paths(paths)}. {remedy}")
        return "\n".join(lines)

    def _describe_formats(self) -> str:
        counts = Counter(map(_suffix, self.skipped))
        shares = ", ".join(f"{count:,} .{suffix}" for suffix, count in sorted(counts.items()))
        return (
            f"Skipped {counted(len(self.skipped), 'image file')} that Pillow cannot read here "
            f"({shares}): {_list_paths(self.skipped)}. {_describe_remedies(set(counts))}"
        )


def list_images(image_dir: str | Path) -> ImageFiles:
    """List the image files in a folder and its subfolders by their suffixes.

    A symbolic link to a file is a file. One to a folder is not followed, because it may lead to a
    folder above it, or to images that are found already.
    """
    folder = Path(image_dir)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder. Give one that holds images.")
    readable = list_readable_suffixes()
    found = _sort(folder, readable)
    if not found.readable:
        suffixes = ", ".join(f".{suffix}" for suffix in sorted(readable))
        raise ValueError(
            f"{folder}: no image in it or below it ({suffixes}). {found.describe_skipped()}"
        )
    return found


def _sort(folder: Path, readable: Set[str]) -> ImageFiles:
    found = ImageFiles([], [])
    closed: list[OSError] = []
    looked_at = readable | OPTIONAL_IMAGE_SUFFIXES | {""}
    for root, folders, files in os.walk(folder, onerror=closed.append):
        paths = [Path(root, name) for name in folders]
        found.linked_folders.extend(path for path in paths if path.is_symlink())
        for path in (Path(root, name) for name in files):
            suffix = _suffix(path)
            if suffix not in looked_at:
                continue
            if _is_file(path):
                if suffix:
                    (found.readable if suffix in readable else found.skipped).append(path)
            elif path.is_symlink():
                found.dangling.append(path)
    for error in closed:
        raise_disk_failure(error, error.filename)
    found.closed_folders.extend(Path(os.fsdecode(error.filename)) for error in closed)
    for paths in vars(found).values():
        paths.sort()
    return found


def _is_file(path: Path) -> bool:
    """Whether a path leads to a file; from Python 3.14 on, `is_file` hides a disk that fails."""
    try:
        return S_ISREG(path.stat().st_mode)
    except PermissionError:
        return True  # whoever reads it will name it
    except OSError as error:
        raise_disk_failure(error, path)
        return False


def _suffix(path: Path) -> str:
    return path.suffix.lower().removeprefix(".")


def _describe_remedies(suffixes: set[str]) -> str:
    remedies = [
        f"To read {_list(suffixes & of_remedy)}: {remedy}."
        for remedy, of_remedy in _REMEDIES.items()
        if suffixes & of_remedy
    ]
    if others := suffixes.difference(*_REMEDIES.values()):
        remedies.append(f"Convert {_list(others)} to JPEG or PNG.")
    return " ".join(remedies)


def _list_paths(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths[:_SHOWN])) + (", …" if len(paths) > _SHOWN else "")


def _list(suffixes: set[str]) -> str:
    return ", ".join(f".{suffix}" for suffix in sorted(suffixes))
