"""What is known of a set before it is read, and how a user wants it read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from .schema import EvaluationSet
from .validation import DatasetValidator

SetKind: TypeAlias = Literal["retrieval", "captions", "classification", "choice"]
_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class ReadRequest:
    """How a set is to be read; `registry.load_dataset` says what each of these is for.

    Attributes:
        folder: where the publisher's files lie.
        image_dir: where the images lie; None for `folder`.
        lang: the language of the texts.
        class_names: one a class, by class or in the order of the classes.
        allow_repeated_class_names: keep classes that share a name; else it is an error.
    """

    folder: Path
    image_dir: Path | None = None
    lang: str = "en"
    require_images: bool = True
    check_images: bool = True
    class_names: Mapping[str, str] | tuple[str, ...] | None = None
    templates: tuple[str, ...] | None = None
    allow_repeated_class_names: bool = False
    ignore_fields: tuple[str, ...] = ()
    show_progress: bool = False


@dataclass(frozen=True)
class DatasetSpec:
    """One entry of the registry.

    Attributes:
        name: as commands take it.
        title: as its publisher calls it.
        kind: `captions` has texts only, several of an image; `choice` is compositional.
        languages: BCP 47 as far as the publisher uses it; empty for whatever the folder has.
        counts: what the publisher counts in each language, such as `images` and `captions`;
            verified. Empty where nothing is known.
        license: of the texts, and of the images where it is another.
        citation: who published it, and where.
        source: where to get it.
        files: what must lie in the folder.
        protocol: the choices that the card makes, told beside every score; `split` is one.
        build: reads the set.
        counts_of_language: counts that differ from language to language.
        checksums: name of a file to its published digest, as `sha256:…` or `md5:…`.
        captions_per_image: how many captions of an image count, the first ones; None for all.
        find_languages: lists the languages of a folder, for a card that names none.
        is_embedded: whether the package holds the set itself.
        hub_files: which files of a hub's repository are fetched; `{lang}` is the language.
    """

    name: str
    title: str
    kind: SetKind
    languages: tuple[str, ...]
    counts: Mapping[str, int]
    license: str
    citation: str
    source: str
    files: str
    protocol: Mapping[str, Any]
    build: Callable[[DatasetSpec, ReadRequest, DatasetValidator], EvaluationSet]
    counts_of_language: Mapping[str, Mapping[str, int]] = field(default_factory=lambda: _NOTHING)
    checksums: Mapping[str, str] = field(default_factory=lambda: _NOTHING)
    captions_per_image: int | None = None
    find_languages: Callable[[ReadRequest, DatasetValidator], tuple[str, ...]] | None = None
    is_embedded: bool = False
    hub_files: str = "*.parquet"

    def published_counts(self, lang: str) -> dict[str, int]:
        """What the publisher counts in one language."""
        return {**self.counts, **self.counts_of_language.get(lang, {})}

    def describe(self) -> str:
        """One line that lists the set."""
        counts = ", ".join(f"{number:,} {what}" for what, number in self.counts.items())
        languages = f"{len(self.languages)} languages" if len(self.languages) > 1 else ""
        facts = "; ".join(fact for fact in (counts, languages) if fact)
        return f"{self.name}: {self.title} ({self.kind}{'; ' + facts if facts else ''})"
