"""What is met while a set is read: its files, its errors, and what becomes of the errors.

Without further word an error stops the reading, all errors told at once. Where the user asked for
it, invalid samples are left out instead, and every exclusion is counted in the set's protocol.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...data.atomic_files import hash_file
from ...data.image_sources import ImageSource, find_unreadable_images
from ...data.validation_errors import ErrorCollector


@dataclass
class ReadingCache:
    """What the languages of one folder share, and is then read and decoded once.

    Attributes:
        checked: images that are known to decode.
        records: records of folders, by how they were read.
    """

    checked: set[ImageSource] = field(default_factory=set)
    records: dict[Any, Any] = field(default_factory=dict)


class DatasetValidator:
    """Keeps the errors of one reading.

    Attributes:
        source: what is read, for messages.
        exclude: whether invalid samples are left out instead of refused.
        errors: what readers add to.
        notes: further choices and counts for the protocol.
        cache: what other readings of the same folder may use.
        errors_of_samples: how many of the errors are of samples that a reader has yielded all the
            same, or are further ones of a sample that it has not. Each of the others is a sample
            that is lost, so that samples can be counted once, whatever is wrong with them.
    """

    def __init__(
        self, source: str, *, exclude: bool = False, cache: ReadingCache | None = None
    ) -> None:
        self.source = source
        self.exclude = exclude
        self.errors = ErrorCollector()
        self.notes: dict[str, Any] = {}
        self.cache = cache or ReadingCache()
        self.errors_of_samples = 0
        self._files: list[Path] = []

    def find_file(self, folder: Path, *names: str, advice: str) -> Path:
        """The first of these files that is there; names may lead into subfolders.

        Raises: ValueError naming all of them.
        """
        for name in names:
            if (folder / name).is_file():
                return self.note_file(folder / name)
        if not folder.exists():
            raise ValueError(f"{self.source}: {folder} does not exist. {advice}")
        raise ValueError(f"{self.source}: {folder} has no {' and no '.join(names)}. {advice}")

    def note_file(self, file: Path) -> Path:
        """Remember a file that the set is read from, so that its checksum is compared."""
        self._files.append(file)
        return file

    def find_unreadable_images(
        self, images: Iterable[ImageSource | None], *, show_progress: bool
    ) -> set[ImageSource]:
        """Decode the images that were not decoded yet; those that cannot be are errors."""
        unchecked = {image: None for image in images if image and image not in self.cache.checked}
        unreadable = find_unreadable_images(unchecked, show_progress=show_progress)
        for error in unreadable.values():
            self.errors.add("image unreadable", error)
        self.cache.checked.update(image for image in unchecked if image not in unreadable)
        return set(unreadable)

    def compare_counts(self, found: Mapping[str, int], published: Mapping[str, int]) -> None:
        """Compare what was found, invalid or not, with what the publisher counts."""
        for what, wanted in published.items():
            if found[what] == wanted:
                continue
            if self.exclude:
                differences = self.notes.setdefault("differences_from_published", {})
                differences[what] = found[what] - wanted
            else:
                self.errors.add(
                    f"wrong number of {what}",
                    f"found {found[what]}, published {wanted}; get the files anew, or read a part "
                    "on purpose with skip_invalid (--skip-invalid)",
                )

    def compare_checksums(self, published: Mapping[str, str]) -> None:
        """Compare the files that were read with the digests that are published of them.

        Args:
            published: last part or parts of a file's path to `algorithm:digest`.
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
            if not (is_same or self.exclude):
                self.errors.add("file is not the published one", f"{name}: {algorithm} differs")

    def count_lost(self) -> int:
        """How many samples were lost in reading, before any that was yielded is checked."""
        return self.errors.total - self.errors_of_samples

    def finish(self) -> dict[str, int]:
        """Raise the errors, or return how many there are of each kind.

        Raises: DataValidationError with every error, unless they are excluded.
        """
        if not self.exclude:
            self.errors.raise_if_any(self.source)
        return self.errors.counts
