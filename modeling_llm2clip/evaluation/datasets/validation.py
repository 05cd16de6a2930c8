"""Files and errors that occur while a dataset is read, and what is done about the errors.

By default an error stops the reading, and all errors are reported at once. On request invalid
samples are skipped instead, and every skipped one is counted in the dataset's protocol.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...data.atomic_files import hash_file
from ...data.images.image_sources import ImageSource, find_unreadable_images
from ...data.remote.remote_access import READING_ERRORS
from ...data.validation_errors import ErrorCollector

OF_DISTRACTORS = ("no caption", "no image")
"""Errors of a record that may be a distractor."""
_ALLOW_DISTRACTORS = (
    "To evaluate with images without captions, or captions without images, as candidates: "
    "allow_distractors."
)
_TRY_AGAIN = (
    "Samples are skipped for what is in them, and these files could not be read. Try again when "
    "their disk or server works, or remove what is not there from the source."
)


@dataclass
class ReadingCache:
    """What the languages of one folder share, so that it is read and decoded once.

    Attributes:
        checked: Images that are known to decode.
        records: Records of folders, by how they were read.
        keeps_indexes: Whether the index of a large folder is kept in the user's cache.
    """

    checked: set[ImageSource] = field(default_factory=set)
    records: dict[Any, Any] = field(default_factory=dict)
    keeps_indexes: bool = True


class DatasetValidator:
    """Collects the errors of one reading.

    Args:
        source: What is read, for messages.
        skip_invalid: Whether invalid samples are skipped instead of refused.
        cache: What other readings of the same folder found.

    Attributes:
        errors: Errors that readers add to.
        notes: Further choices and counts for the protocol.
        num_errors_of_yielded: How many of the errors belong to samples that a reader yielded
            nevertheless, or are further errors of a sample that it did not yield. Each of the
            others is a sample that is lost, so that samples are counted once, whatever is wrong
            with them.
    """

    def __init__(
        self, source: str, *, skip_invalid: bool = False, cache: ReadingCache | None = None
    ) -> None:
        self.source = source
        self.skip_invalid = skip_invalid
        self.errors = ErrorCollector()
        self.notes: dict[str, Any] = {}
        self.cache = cache or ReadingCache()
        self.num_errors_of_yielded = 0
        self._files: list[Path] = []

    def find_file(self, folder: Path, *names: str, advice: str) -> Path:
        """Find the first of several files that exists.

        Args:
            folder: Folder of the dataset.
            names: Paths relative to the folder.
            advice: What to do if there is none.

        Raises:
            ValueError: None of them exists.
        """
        for name in names:
            if (folder / name).is_file():
                return self.note_file(folder / name)
        if not folder.exists():
            raise ValueError(f"{self.source}: {folder} does not exist. {advice}")
        raise ValueError(f"{self.source}: {folder} has no {' and no '.join(names)}. {advice}")

    def note_file(self, file: Path) -> Path:
        """Note a file that the dataset is read from, so that its checksum is compared.

        Args:
            file: The file.

        Returns:
            The file.
        """
        self._files.append(file)
        return file

    def find_unreadable_images(
        self, images: Iterable[ImageSource | None], *, show_progress: bool
    ) -> set[ImageSource]:
        """Decode images that were not decoded yet; those that cannot be decoded are errors.

        Args:
            images: Images; None is ignored.
            show_progress: Whether to show a progress bar.

        Returns:
            The images that cannot be decoded.
        """
        unchecked = {image: None for image in images if image and image not in self.cache.checked}
        unreadable = find_unreadable_images(unchecked, show_progress=show_progress)
        for error in unreadable.values():
            self.errors.add("image unreadable", error)
        self.cache.checked.update(image for image in unchecked if image not in unreadable)
        return set(unreadable)

    def compare_counts(self, found: Mapping[str, int], published: Mapping[str, int]) -> None:
        """Compare what was found, valid or not, with the publisher's counts.

        Args:
            found: Counts of the files.
            published: Counts of the publisher.
        """
        for what, wanted in published.items():
            if found[what] == wanted:
                continue
            if self.skip_invalid:
                differences = self.notes.setdefault("differences_from_published", {})
                differences[what] = found[what] - wanted
            else:
                self.errors.add(
                    f"wrong number of {what}",
                    f"found {found[what]}, published {wanted}; download the files again, or read a "
                    "part on purpose with skip_invalid (--skip-invalid)",
                )

    def compare_checksums(self, published: Mapping[str, str]) -> None:
        """Compare the files that were read with their published digests.

        Args:
            published: Last part or parts of a file's path to `algorithm:digest`.
        """
        known = [
            (name, file)
            for file in self._files
            for name in published
            if file.as_posix().endswith(f"/{name}")
        ]
        for name, file in known:
            algorithm, _, wanted = published[name].partition(":")
            is_same = hash_file(file, algorithm) == wanted
            self.notes.setdefault("checksums", {})[name] = "published" if is_same else "differs"
            if not (is_same or self.skip_invalid):
                self.errors.add("file is not the published one", f"{name}: {algorithm} differs")

    def count_lost(self) -> int:
        """Count the samples that were lost in reading, before any yielded one is checked."""
        return self.errors.total - self.num_errors_of_yielded

    def finish(self) -> dict[str, int]:
        """Raise the errors, or return their counts if invalid samples are to be skipped.

        Returns:
            Error to its count.

        Raises:
            DataValidationError: There are errors, and invalid samples are not to be skipped; or
                files could not be read, so that nothing is known of their samples.
        """
        unread = [kind for kind in self.errors.counts if kind in READING_ERRORS]
        if self.skip_invalid and unread:
            invalid = [kind for kind in self.errors.counts if kind not in READING_ERRORS]
            self.errors.without(*invalid).raise_if_any(self.source, advice=_TRY_AGAIN)
        if not self.skip_invalid:
            may_be_distractors = any(kind in self.errors.counts for kind in OF_DISTRACTORS)
            advice = _ALLOW_DISTRACTORS if may_be_distractors else ""
            self.errors.raise_if_any(self.source, advice=advice)
        return self.errors.counts


def read_lines(file: Path) -> list[str]:
    """Read the lines of a text file, without blank ones at its end.

    Args:
        file: UTF-8, compressed if its name ends in `.gz`. Only a line feed ends a line: a caption
            may contain other separators.

    Raises:
        ValueError: The file is not UTF-8, or not gzip.
    """
    try:
        raw = file.read_bytes()
        text = (gzip.decompress(raw) if file.suffix == ".gz" else raw).decode("utf-8-sig")
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{file}: cannot be read as text ({error}). Download it again.") from error
    lines = [line.rstrip("\r") for line in text.split("\n")]
    while lines and not lines[-1].strip():
        lines.pop()
    return lines
