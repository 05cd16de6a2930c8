"""What is known of a dataset before it is read, how it is to be read, and what every dataset has.

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
| `distractors` | images without captions and captions without images, if they were allowed |
| `skipped_samples` | how many images, items or lines were skipped, each counted once |

Where they apply there are also `texts`, how a text was taken from its field; `checksums`, whether
the files are the published ones; `differences_from_published`, differing counts that were accepted
because invalid samples were to be skipped; `images_without_a_record`, files in a folder of one's
own that are not used; `rows_skipped`, why rows of one's own data are not records, to how many.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from ...data.images.image_sources import IMAGE_SUFFIXES, ImageSource
from ...data.remote.file_places import FilePlace
from .validation import DatasetValidator

DatasetType: TypeAlias = Literal["retrieval", "captions", "classification", "choice"]
ChoiceForm: TypeAlias = Literal["image", "images", "text"]
_NOTHING: Mapping[str, Any] = MappingProxyType({})
# The field of the protocol that says how texts were cleaned; see `data.records.clean_text`.
CLEANED_TEXTS = {"texts": "whitespace at the ends removed, line breaks made spaces"}


@dataclass(frozen=True, kw_only=True)
class EvaluationDataset(ABC):
    """Images, texts, and what belongs to what.

    Attributes:
        name: Name in the registry.
        lang: Language of the texts, BCP 47.
        protocol: Every choice that was made; see the top of this file.
    """

    name: str
    lang: str
    protocol: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)

    @property
    @abstractmethod
    def has_images(self) -> bool:
        """Whether a model has to encode images for it."""

    @abstractmethod
    def list_content(self) -> list[Any]:
        """List what its digest covers: JSON values in which an image is an `ImageSource`."""

    def _check_images(self, images: tuple[ImageSource, ...], names: tuple[str, ...]) -> None:
        if images and len(images) != len(names):
            raise ValueError(f"{self.name}: {len(images)} images and {len(names)} names of images.")
        if repeated := find_repeated(names):
            raise ValueError(f"{self.name}: names of images repeat: {repeated[:5]}.")


@dataclass(frozen=True, kw_only=True)
class ReadRequest:
    """How a dataset is to be read; `load_dataset` explains each field.

    Attributes:
        folder: Folder of the publisher's files, or URL of one's own; None for a dataset that needs
            none.
        image_dir: Folder of the images; None for `folder`.
        lang: Language of the texts.
        require_images: Whether images are read.
        check_images: Whether every image is decoded.
        class_names: Names by class, or in the order of the classes.
        templates: Prompts of a classification.
        allow_repeated_class_names: Whether classes may share a name.
        allow_distractors: Whether images need no captions, and captions no images.
        ignore_fields: Further fields of one's own data.
        show_progress: Whether to show progress bars.
    """

    folder: FilePlace | None
    image_dir: Path | None = None
    lang: str = "en"
    require_images: bool = True
    check_images: bool = True
    class_names: Mapping[str, str] | tuple[str, ...] | None = None
    templates: tuple[str, ...] | None = None
    allow_repeated_class_names: bool = False
    allow_distractors: bool = False
    ignore_fields: tuple[str, ...] = ()
    show_progress: bool = False

    @property
    def data_folder(self) -> Path:
        """The folder of a dataset that needs one.

        Raises:
            ValueError: It is not on this machine.
        """
        assert self.folder is not None
        if isinstance(self.folder, str):
            raise ValueError(
                f"{self.folder} is not on this machine. Only records of your own, in .tar or "
                ".parquet shards, are read from elsewhere. Copy the folder here."
            )
        return self.folder

    def list_parquet_files(self, pattern: str = "**/*.parquet") -> list[Path]:
        """List the Parquet files in the folder and its subfolders, by path.

        Args:
            pattern: As `Path.glob` takes it; `{lang}` is the language.
        """
        return sorted(self.data_folder.glob(pattern.format(lang=self.lang)))


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """One entry of the registry.

    Attributes:
        name: Name in commands.
        title: What it is, in one line.
        dataset_type: `captions` has only texts, several of each image; `choice` is compositional.
        languages: BCP 47 as far as the publisher uses it; empty for any, or those of the folder.
        counts: Counts that the publisher gives for each language, such as `images` and `captions`;
            compared with the files. Empty if none are known.
        license: License of the texts, and of the images if it differs.
        citation: Who published it, and where.
        source: Where to get it.
        files: What the folder must contain.
        protocol: The choices that the spec makes, reported with every score; one is `split`.
        read: Yields every `PublishedRecord` of one language, or every `ChoiceEntry`, or returns the
            `LabeledImages`. Invalid samples go to the validator.
        counts_of_language: Counts that differ from language to language.
        checksums: Name of a file to its published digest, as `sha256:…` or `md5:…`.
        captions_per_image: How many captions of an image are used, the first ones; None for all.
        find_languages: Lists the languages of a folder, for a spec that names none.
        origin: Where the data is: `files` of a folder that is named, the `package`, or `records`.
        hub_files: Pattern of the files to fetch from a Hub repository; `{lang}` is the language.
        takes_distractors: Whether its images may be without captions, and captions without images.
        templates: Prompts of a classification, for a request that has none.
        form: Form of the choices.
    """

    name: str
    title: str
    license: str
    citation: str
    source: str
    files: str
    protocol: Mapping[str, Any]
    read: Callable[[ReadRequest, DatasetValidator], Any]
    dataset_type: DatasetType = "retrieval"
    languages: tuple[str, ...] = ("en",)
    counts: Mapping[str, int] = field(default_factory=lambda: _NOTHING)
    counts_of_language: Mapping[str, Mapping[str, int]] = field(default_factory=lambda: _NOTHING)
    checksums: Mapping[str, str] = field(default_factory=lambda: _NOTHING)
    captions_per_image: int | None = None
    find_languages: Callable[[ReadRequest, DatasetValidator], tuple[str, ...]] | None = None
    origin: Literal["files", "package", "records"] = "files"
    hub_files: str = "*.parquet"
    takes_distractors: bool = False
    templates: tuple[str, ...] = ()
    form: ChoiceForm = "image"

    def list_published_counts(self, lang: str) -> dict[str, int]:
        """List the counts that the publisher gives for one language.

        Args:
            lang: The language.
        """
        return {**self.counts, **self.counts_of_language.get(lang, {})}

    def describe(self) -> str:
        """Describe the dataset in one line."""
        counts = ", ".join(f"{number:,} {what}" for what, number in self.counts.items())
        languages = f"{len(self.languages)} languages" if len(self.languages) > 1 else ""
        facts = "; ".join(fact for fact in (counts, languages) if fact)
        return f"{self.name}: {self.title} ({self.dataset_type}{'; ' + facts if facts else ''})"


def find_repeated(names: tuple[str, ...], *, normalize: Callable[[str], str] = str) -> list[str]:
    """List the names that occur more than once, each once, in their order.

    Args:
        names: The names.
        normalize: Names for which it returns the same are the same.
    """
    seen: set[str] = set()
    repeated: dict[str, str] = {}
    for name in names:
        normalized = normalize(name)
        if normalized in seen:
            repeated.setdefault(normalized, name)
        seen.add(normalized)
    return list(repeated.values())


def find_image(image_dir: Path, name: str) -> Path | None:
    """Find an image by its name, or by its last part: many store images without subfolders.

    Args:
        image_dir: Folder of the images.
        name: Path of the image as the publisher writes it.
    """
    for candidate in (image_dir / name, image_dir / Path(name).name):
        if candidate.is_file():
            return candidate
    return None


def is_image(file: Path) -> bool:
    """Return whether a file is an image by its name."""
    return file.suffix.lower().removeprefix(".") in IMAGE_SUFFIXES
