"""Specs and readings: all that is shared by the types of datasets.

A dataset knows no model. It has a `protocol`: every choice that was made on the way from the
publisher's files, as JSON values, so that no score is reported without them. Fields that every
protocol has:

| field | meaning |
| --- | --- |
| `dataset`, `split`, `lang` | which part of which dataset |
| `source` | `files`, `package`, `records`, or `hub:owner/name@commit` |
| `images`, `captions` (or `items`, `classes`) | how many the dataset has |
| `with_images` | of a retrieval dataset: false if only its captions were read |
| `published` | the counts that the publisher gives; empty if none are known |
| `skipped` | error to its count; empty unless invalid samples were to be skipped |
| `skipped_samples` | how many images, items or lines were skipped, each counted once |

Where they apply there are also `texts`, how a text was taken from its field; `checksums`, whether
the files are the published ones; `differences_from_published`, differing counts that were accepted
because invalid samples were to be skipped; `rows_skipped`, why rows of one's own data are not
records, to how many.

By default an error stops the reading, and all errors are reported at once. On request invalid
samples are skipped instead, and every skipped one is counted in the dataset's protocol.
"""

from __future__ import annotations

import gzip
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from ...data.atomic_files import hash_file
from ...data.images.image_sources import IMAGE_SUFFIXES, ImageSource, find_unreadable_images
from ...data.remote.file_locations import FileLocation
from ...data.remote.remote_access import READING_ERRORS
from ...data.validation_errors import ErrorCollector

DatasetType: TypeAlias = Literal["retrieval", "captions", "classification", "choice"]
ChoiceForm: TypeAlias = Literal["image", "images", "text"]
_NOTHING: Mapping[str, Any] = MappingProxyType({})
# The field of the protocol that says how texts were cleaned; see `data.records.clean_text`.
CLEANED_TEXTS = {"texts": "whitespace at the ends removed, line breaks made spaces"}
_TRY_AGAIN = (
    "Only invalid samples are skipped, and these files could not be read. Try again when their "
    "disk or server works, or remove missing files from the source."
)


@dataclass(frozen=True, kw_only=True)
class EvaluationDataset(ABC):
    """Images, texts, and their correspondence; `lang` is BCP 47."""

    name: str
    lang: str
    protocol: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)

    @property
    @abstractmethod
    def has_images(self) -> bool:
        """Say if a model has to encode images for it."""

    @abstractmethod
    def list_content(self) -> list[Any]:
        """List the content that its digest covers: JSON values, and `ImageSource` for images."""


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """One entry of the registry.

    Attributes:
        name: Name in commands.
        title: Description in one line.
        dataset_type: `captions` has only texts, several of each image; `choice` is compositional.
        languages: BCP 47 as far as the publisher uses it; empty for any, or those of the folder.
        counts: Counts that the publisher gives for each language, such as `images` and `captions`;
            compared with the files. Empty if none are known.
        license: License of the texts, and of the images if it differs.
        citation: Who published it, and where.
        source: Where to get it.
        files: Files that the folder must contain.
        protocol: The choices that the spec makes, reported with every score; one is `split`.
        read: Yields every `PublishedRecord` of one language, or every `ChoiceItem`, or returns the
            `LabeledImages`. Invalid samples go to `errors` of the reading.
        counts_of_language: Counts that differ from language to language.
        checksums: Name of a file to its published digest, as `sha256:…` or `md5:…`.
        captions_per_image: How many captions of an image are used, the first ones; None for all.
        find_languages: Lists the languages of a folder, for a spec that names none.
        origin: Where the data is: `files` of a folder that is named, the `package`, or `records`.
        hub_files: Pattern of the files to fetch from a Hub repository; `{lang}` is the language.
        templates: Prompts of a classification, unless others are given.
        form: Form of the choices.
    """

    name: str
    title: str
    license: str
    citation: str
    source: str
    files: str
    protocol: Mapping[str, Any]
    read: Callable[[DatasetReading], Any]
    dataset_type: DatasetType = "retrieval"
    languages: tuple[str, ...] = ("en",)
    counts: Mapping[str, int] = field(default_factory=lambda: _NOTHING)
    counts_of_language: Mapping[str, Mapping[str, int]] = field(default_factory=lambda: _NOTHING)
    checksums: Mapping[str, str] = field(default_factory=lambda: _NOTHING)
    captions_per_image: int | None = None
    find_languages: Callable[[DatasetReading], tuple[str, ...]] | None = None
    origin: Literal["files", "package", "records"] = "files"
    hub_files: str = "*.parquet"
    templates: tuple[str, ...] = ()
    form: ChoiceForm = "image"

    def list_published_counts(self, lang: str) -> dict[str, int]:
        return {**self.counts, **self.counts_of_language.get(lang, {})}

    def describe(self) -> str:
        counts = ", ".join(f"{number:,} {what}" for what, number in self.counts.items())
        languages = f"{len(self.languages)} languages" if len(self.languages) > 1 else ""
        facts = "; ".join(fact for fact in (counts, languages) if fact)
        return f"{self.name}: {self.title} ({self.dataset_type}{'; ' + facts if facts else ''})"


def find_image(image_dir: Path, name: str) -> Path | None:
    """Find an image by its name, or by its last part: many store images without subfolders."""
    for candidate in (image_dir / name, image_dir / Path(name).name):
        if candidate.is_file():
            return candidate
    return None


def is_image(file: Path) -> bool:
    return file.suffix.lower().removeprefix(".") in IMAGE_SUFFIXES


@dataclass
class ReadingCache:
    """Results that the languages of one folder share, so that it is read and decoded once.

    Attributes:
        checked: Images that are known to decode.
        records: Records of folders, by how they were read.
    """

    checked: set[ImageSource] = field(default_factory=set)
    records: dict[Any, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class DatasetReading:
    """One reading of a dataset: its options, which `load_dataset` explains, its errors and notes.

    Attributes:
        folder: A path, or the URL of one's own data; None for a dataset that needs none.
        notes: Further choices and counts for the protocol.
        num_errors_of_yielded: Errors of samples that a reader yielded nevertheless, and further
            errors of a sample that it did not yield. Each of the others is a lost sample, so that
            samples are counted once, whatever is wrong with them.
    """

    spec: DatasetSpec
    folder: FileLocation | None
    image_dir: Path | None = None
    lang: str = "en"
    skip_invalid: bool = False
    require_images: bool = True
    check_images: bool | None = True
    class_names: Mapping[str, str] | Sequence[str] | None = None
    templates: Sequence[str] | None = None
    ignore_fields: Collection[str] = ()
    show_progress: bool = False
    cache: ReadingCache = field(default_factory=ReadingCache)
    errors: ErrorCollector = field(default_factory=ErrorCollector)
    notes: dict[str, Any] = field(default_factory=dict)
    num_errors_of_yielded: int = 0
    _files: list[Path] = field(default_factory=list)

    @property
    def source(self) -> str:
        """Name and folder, for errors."""
        return self.spec.name if self.folder is None else f"{self.spec.name} in {self.folder}"

    @property
    def data_folder(self) -> Path:
        """The folder of a dataset that needs one, on this machine."""
        assert self.folder is not None
        if isinstance(self.folder, str):
            raise ValueError(
                f"{self.folder} is not on this machine. Only records of your own, in .tar or "
                ".parquet shards, are read from elsewhere. Copy the folder here."
            )
        return self.folder

    def list_parquet_files(self, pattern: str = "**/*.parquet") -> list[Path]:
        """List the Parquet files below the folder, by path; `{lang}` is the language."""
        return sorted(self.data_folder.glob(pattern.format(lang=self.lang)))

    def find_file(self, *names: str, advice: str) -> Path:
        """Find the first of several files that exists, and note it for its checksum."""
        folder = self.data_folder
        for name in names:
            if (folder / name).is_file():
                return self.note_file(folder / name)
        raise ValueError(f"{self.source}: {folder} has no {' and no '.join(names)}. {advice}")

    def note_file(self, file: Path) -> Path:
        """Note a file that the dataset is read from, so that its checksum is compared."""
        self._files.append(file)
        return file

    def find_unreadable_images(self, images: Iterable[ImageSource | None]) -> set[ImageSource]:
        """Decode images that were not decoded yet; those that cannot be decoded are errors."""
        has_use = self.skip_invalid or self.errors.total > 0
        if not (has_use if self.check_images is None else self.check_images):
            return set()
        unchecked = {image: None for image in images if image and image not in self.cache.checked}
        unreadable = find_unreadable_images(unchecked, show_progress=self.show_progress)
        for error in unreadable.values():
            self.errors.add("image unreadable", error)
        self.cache.checked.update(image for image in unchecked if image not in unreadable)
        return set(unreadable)

    def _compare_counts(self, counts: Mapping[str, int]) -> None:
        for what, published in self.spec.list_published_counts(self.lang).items():
            if counts[what] == published:
                continue
            if self.skip_invalid:
                differences = self.notes.setdefault("differences_from_published", {})
                differences[what] = counts[what] - published
            else:
                self.errors.add(
                    f"wrong number of {what}",
                    f"found {counts[what]}, published {published}; download the files again, or "
                    "read a part on purpose with skip_invalid",
                )

    def _compare_checksums(self, published: Mapping[str, str]) -> None:
        known = [
            (name, file)
            for file in self._files
            for name in published
            if file.as_posix().endswith(f"/{name}")
        ]
        for name, file in known:
            algorithm, _, digest = published[name].partition(":")
            is_same = hash_file(file, algorithm) == digest
            self.notes.setdefault("checksums", {})[name] = "published" if is_same else "differs"
            if not (is_same or self.skip_invalid):
                self.errors.add("file is not the published one", f"{name}: {algorithm} differs")

    def count_lost(self) -> int:
        """Count the samples that were lost in reading, before any yielded one is checked."""
        return self.errors.total - self.num_errors_of_yielded

    def finish(self, counts: Mapping[str, int]) -> dict[str, int]:
        """Compare counts and checksums with the published ones, then raise the errors.

        If invalid samples are to be skipped, the counts of the errors are returned instead. Files
        that could not be read are refused in any case: nothing is known of their samples.
        """
        self._compare_counts(counts)
        self._compare_checksums(self.spec.checksums)
        unread = [kind for kind in self.errors.counts if kind in READING_ERRORS]
        if self.skip_invalid and unread:
            invalid = [kind for kind in self.errors.counts if kind not in READING_ERRORS]
            self.errors.without(*invalid).raise_if_any(self.source, advice=_TRY_AGAIN)
        if not self.skip_invalid:
            self.errors.raise_if_any(self.source)
        return dict(self.errors.counts)


def read_lines(file: Path) -> list[str]:
    """Read the lines of a UTF-8 text file, without blank ones at its end; `.gz` is decompressed.

    Only a line feed ends a line: a caption may contain other separators.
    """
    try:
        raw = file.read_bytes()
        text = (gzip.decompress(raw) if file.suffix == ".gz" else raw).decode("utf-8-sig")
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{file}: cannot be read as text ({error}). Download it again.") from error
    lines = [line.rstrip("\r") for line in text.split("\n")]
    while lines and not lines[-1].strip():
        lines.pop()
    return lines
