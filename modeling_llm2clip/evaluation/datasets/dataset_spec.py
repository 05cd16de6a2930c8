"""Define dataset specs and readings, which all dataset types share.

A dataset is independent of any model. Its `protocol` records, as JSON values, every choice made in
turning the publisher's files into samples, so each score is reported with these choices. Every
protocol has these fields:

| field | meaning |
| --- | --- |
| `dataset`, `split`, `lang` | which part of which dataset |
| `source` | `files`, `package`, `records`, or `hub:owner/name@commit` |
| `images`, `captions` (or `items`, `classes`) | their numbers in the dataset |
| `with_images` | for retrieval datasets, false if only captions were read |
| `published` | counts stated by the publisher; empty if unknown |
| `skipped` | count of each error; empty unless invalid samples are skipped |
| `skipped_samples` | number of skipped images, items or lines, each counted once |

These fields are present when they apply:

| field | meaning |
| --- | --- |
| `texts` | how a text was cleaned |
| `checksums` | whether the files match the published ones |
| `differences_from_published` | differing counts, accepted because invalid samples are skipped |
| `rows_skipped` | for your own data, the number of rows without a record, by reason |

By default, errors stop the reading and are all reported at once. With `skip_invalid`, invalid
samples are skipped and counted in the protocol.
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
# Protocol field for how texts were cleaned; see `data.records.clean_text`.
CLEANED_TEXTS = {"texts": "whitespace at the ends removed, line breaks made spaces"}
_TRY_AGAIN = (
    "skip_invalid skips invalid samples only, but these files could not be read. Try again when "
    "their disk or server works, or remove missing files from the source."
)


@dataclass(frozen=True, kw_only=True)
class EvaluationDataset(ABC):
    """Base class of evaluation datasets; `lang` is a BCP 47 tag."""

    name: str
    lang: str
    protocol: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)

    @property
    @abstractmethod
    def has_images(self) -> bool:
        """Return whether the dataset has images to encode."""

    @abstractmethod
    def list_content(self) -> list[Any]:
        """List the content covered by its digest: JSON values, and an `ImageSource` per image."""


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """One entry of the registry.

    Attributes:
        name: Name in commands.
        title: One-line description.
        dataset_type: `captions` has only texts, several per image; `choice` is compositional.
        languages: Language tags, BCP 47 where the publisher follows it; empty for any language, or
            if they depend on the folder.
        counts: Published counts for each language, such as `images` and `captions`, which are
            compared with the files. Empty if unknown.
        license: License of the texts, and of the images if it differs.
        citation: Who published the dataset, and where.
        source: Where to get the dataset.
        files: Files that the folder must contain.
        protocol: Choices made by the spec, such as `split`, which are reported with every score.
        read: Yields every `PublishedRecord` of one language or every `ChoiceItem`, or returns the
            `LabeledImages`. It adds invalid samples to the reading's `errors`.
        counts_of_language: Counts that vary by language.
        checksums: Published digest of each file, as `sha256:…` or `md5:…`, by file name.
        captions_per_image: Use only this many captions of an image, from the first; None for all.
        find_languages: Lists the languages of a folder, if `languages` is not fixed.
        origin: Where the data is: `files` (a folder from the user), `package`, or `records`.
        hub_files: Pattern of the files to fetch from a Hub repository; `{lang}` is the language.
        templates: Default prompts for classification.
        form: Form of a `choice` dataset.
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
    """Find an image by its path or only its file name, because images are often stored flat."""
    for candidate in (image_dir / name, image_dir / Path(name).name):
        if candidate.is_file():
            return candidate
    return None


def is_image(file: Path) -> bool:
    return file.suffix.lower().removeprefix(".") in IMAGE_SUFFIXES


@dataclass
class ReadingCache:
    """Results shared by all languages of a folder, so files are read and decoded only once.

    Attributes:
        checked: Images that are known to decode.
        records: Records of a folder, by the options that the folder was read with.
    """

    checked: set[ImageSource] = field(default_factory=set)
    records: dict[Any, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class DatasetReading:
    """One reading of a dataset: its options (see `load_dataset`), errors and notes.

    Attributes:
        folder: A path, or the URL of the user's own data; None if the dataset needs no folder.
        notes: Additional choices and counts for the protocol.
        num_errors_of_yielded: Number of errors that do not mean another lost sample: errors of
            samples that the reader yielded anyway, and all but the first error of a sample that it
            did not yield. This way, each lost sample counts once.
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
    caption_fields: tuple[str, ...] | None = None
    show_progress: bool = False
    cache: ReadingCache = field(default_factory=ReadingCache)
    errors: ErrorCollector = field(default_factory=ErrorCollector)
    notes: dict[str, Any] = field(default_factory=dict)
    num_errors_of_yielded: int = 0
    _files: list[Path] = field(default_factory=list)

    @property
    def source(self) -> str:
        """Name and folder, for error messages."""
        return self.spec.name if self.folder is None else f"{self.spec.name} in {self.folder}"

    @property
    def data_folder(self) -> Path:
        """The local folder of a dataset that is read from files."""
        assert self.folder is not None
        if isinstance(self.folder, str):
            raise ValueError(
                f"{self.folder} is not on this machine. Only your own records in .tar or .parquet "
                "shards can be read remotely. Copy the folder to this machine."
            )
        return self.folder

    def list_parquet_files(self, pattern: str = "**/*.parquet") -> list[Path]:
        """List the Parquet files in the folder, sorted by path; `{lang}` is the language."""
        return sorted(self.data_folder.glob(pattern.format(lang=self.lang)))

    def find_file(self, *names: str, advice: str) -> Path:
        """Return the first of several files that exists, and note it for its checksum."""
        folder = self.data_folder
        for name in names:
            if (folder / name).is_file():
                return self.note_file(folder / name)
        raise ValueError(f"{self.source}: {folder} has no {' or '.join(names)}. {advice}")

    def note_file(self, file: Path) -> Path:
        """Note a file of the dataset so that its checksum is compared later."""
        self._files.append(file)
        return file

    def find_unreadable_images(self, images: Iterable[ImageSource | None]) -> set[ImageSource]:
        """Decode images that were not decoded yet; add an error for each unreadable image."""
        is_useful = self.skip_invalid or self.errors.total > 0
        if not (is_useful if self.check_images is None else self.check_images):
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
                    "use skip_invalid to evaluate on a part of them",
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
        """Count the samples lost in reading; call before the yielded samples are checked."""
        return self.errors.total - self.num_errors_of_yielded

    def finish(self, counts: Mapping[str, int]) -> dict[str, int]:
        """Compare counts and checksums with the published ones, then raise all errors.

        With `skip_invalid`, the number of errors of each kind is returned instead. Files that could
        not be read still raise an error, because the samples in them may be valid.
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
    """Read the lines of a UTF-8 text file, which may be a `.gz`, without trailing blank lines.

    Only a line feed ends a line, because a caption may contain other separators.
    """
    try:
        raw = file.read_bytes()
        text = (gzip.decompress(raw) if file.suffix == ".gz" else raw).decode("utf-8-sig")
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{file} cannot be read as text ({error}). Download it again.") from error
    lines = [line.rstrip("\r") for line in text.split("\n")]
    while lines and not lines[-1].strip():
        lines.pop()
    return lines
