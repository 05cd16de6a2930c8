"""Image files in a folder, by their suffixes: those that can be decoded here, and others."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ..data.images.image_sources import OPTIONAL_IMAGE_SUFFIXES, list_readable_suffixes

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
    """

    readable: list[Path]
    skipped: list[Path]

    def describe_skipped(self) -> str:
        """Count and name the skipped files, and say how to read them.

        Returns:
            One line, which lists at most eight names; empty where no file is skipped.
        """
        if not self.skipped:
            return ""
        counts = Counter(map(_suffix, self.skipped))
        counted = ", ".join(f"{count:,} .{suffix}" for suffix, count in sorted(counts.items()))
        more = ", …" if len(self.skipped) > _SHOWN else ""
        named = ", ".join(map(str, self.skipped[:_SHOWN])) + more
        return (
            f"Skipped {len(self.skipped):,} image files that Pillow cannot read here ({counted}): "
            f"{named}. {_describe_remedies(set(counts))}"
        )


def list_images(image_dir: str | Path) -> ImageFiles:
    """List the image files in a folder and its subfolders by their suffixes.

    Args:
        image_dir: Folder of images.

    Returns:
        Its image files, those that cannot be decoded here apart.

    Raises:
        ValueError: There is no such folder, or no readable image in it.
    """
    folder = Path(image_dir)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder. Give one that holds images.")
    readable = list_readable_suffixes()
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    found = ImageFiles(
        readable=[path for path in files if _suffix(path) in readable],
        skipped=[path for path in files if _suffix(path) in OPTIONAL_IMAGE_SUFFIXES - readable],
    )
    if not found.readable:
        suffixes = ", ".join(f".{suffix}" for suffix in sorted(readable))
        raise ValueError(
            f"{folder}: no image in it or below it ({suffixes}). {found.describe_skipped()}"
        )
    return found


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


def _list(suffixes: set[str]) -> str:
    return ", ".join(f".{suffix}" for suffix in sorted(suffixes))
