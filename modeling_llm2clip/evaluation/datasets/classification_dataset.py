"""Builds a classification set from what a reader found: class names, checks, exclusions, counts."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from ...data.atomic_files import hash_file
from .dataset_spec import DatasetSpec, ReadRequest
from .schema import ClassificationDataset, find_repeated, fold_class_name
from .validation import DatasetValidator


@dataclass(frozen=True)
class LabeledImages:
    """Images by class, as the publisher's files have them.

    Attributes:
        class_keys: what the publisher calls the classes, in the order of their labels.
        names: the publisher's names of some or all of them, for prompts.
        images: name, file and class of each image.
        names_file: where the names are written; None where they are those of the folders.
    """

    class_keys: tuple[str, ...]
    names: Mapping[str, str]
    images: tuple[tuple[str, Path, str], ...]
    names_file: Path | None = None


# Errors of no image: what they cost is the images of the classes.
_ERRORS_OF_CLASSES = (
    "class without a name",
    "class name repeated",
    "class name for a class that is not there",
    "class folder without images",
    "class named twice",
    "line without a class and its name",
)

LabeledReader: TypeAlias = Callable[[ReadRequest, DatasetValidator], LabeledImages]


def build_classification_dataset(
    card: DatasetSpec,
    request: ReadRequest,
    intake: DatasetValidator,
    *,
    read: LabeledReader,
    templates: tuple[str, ...],
) -> ClassificationDataset:
    """Read the images, name the classes, and keep what has no error.

    A class whose name another class has too, in other capitals perhaps, is an error, as no prompt
    can tell them apart, unless the request allows it: its images tie then, and count as wrong.

    Args:
        templates: of the card, for a request that brings none.
    Raises:
        DataValidationError: every error, unless they are excluded.
        ValueError: nothing or a single class is left, or images are not wanted.
    """
    _check_request(card, request)
    found = read(request, intake)
    names = _name_classes(found, request, intake)
    num_lost = _count_lost(intake)
    in_use = [key for key in found.class_keys if key in names]
    kept = [item for item in found.images if item[2] in names]
    if len(kept) < len(found.images):
        intake.notes["images_of_excluded_classes"] = len(found.images) - len(kept)
    kept = _leave_out_unreadable(kept, request, intake)
    num_images = len(found.images) + intake.errors.counts.get("image missing", 0)
    counts = {"images": num_images, "classes": len(found.class_keys)}
    intake.compare_counts(counts, card.published_counts(request.lang))
    excluded = intake.finish()
    _require_a_choice(intake, images=len(kept), classes=len(in_use))
    class_names = tuple(names[key] for key in in_use)
    label_of = {key: label for label, key in enumerate(in_use)}
    chosen = templates if request.templates is None else request.templates
    protocol = {
        "set": card.name,
        "lang": request.lang,
        **card.protocol,
        "images": len(kept),
        "classes": len(in_use),
        "published": card.published_counts(request.lang),
        "class_names": _describe_names(found, request, class_names),
        "templates": list(chosen),
        "templates_from": "card" if request.templates is None else "given",
        "excluded": excluded,
        "skipped_samples": num_lost + len(found.images) - len(kept),
        **intake.notes,
    }
    if repeated := find_repeated(class_names, same=fold_class_name):
        protocol["repeated_class_names"] = repeated
    return ClassificationDataset(
        name=card.name,
        images=tuple(file for _, file, _ in kept),
        image_names=tuple(name for name, _, _ in kept),
        labels=tuple(label_of[key] for _, _, key in kept),
        class_names=class_names,
        templates=tuple(chosen),
        lang=request.lang,
        protocol=protocol,
    )


def _leave_out_unreadable(
    images: list[tuple[str, Path, str]], request: ReadRequest, intake: DatasetValidator
) -> list[tuple[str, Path, str]]:
    if not request.check_images:
        return images
    unreadable = intake.find_unreadable_images(
        (file for _, file, _ in images), show_progress=request.show_progress
    )
    return [item for item in images if item[1] not in unreadable]


def _describe_names(
    found: LabeledImages, request: ReadRequest, names: tuple[str, ...]
) -> dict[str, str]:
    """Where class names are from, and the SHA-256 of those in use, one a line, by their labels."""
    used = {"names_sha256": hashlib.sha256("\n".join(names).encode()).hexdigest()}
    if request.class_names is not None:
        return {"from": "given", **used}
    if found.names_file is None:
        return {"from": "names of the folders", **used}
    file_sha256 = hash_file(found.names_file, "sha256")
    return {"from": found.names_file.name, "file_sha256": file_sha256, **used}


def _check_request(card: DatasetSpec, request: ReadRequest) -> None:
    """Refuse what would mix languages, and what has no images."""
    if not request.require_images:
        raise ValueError(f"{card.name} cannot be read without its images.")
    if request.lang != "en" and request.templates is None:
        raise ValueError(
            f"{card.name}: the templates of the card are English, lang is {request.lang!r}. Give "
            "templates in that language too."
        )


def _count_lost(intake: DatasetValidator) -> int:
    """How many images were lost in reading, before any is checked."""
    counts = intake.errors.counts
    return intake.errors.total - sum(counts.get(kind, 0) for kind in _ERRORS_OF_CLASSES)


def _require_a_choice(intake: DatasetValidator, *, images: int, classes: int) -> None:
    if not images or classes < 2:
        raise ValueError(
            f"{intake.source}: {images} images and {classes} classes are left: "
            f"{intake.errors.counts}. Give at least two classes, as one alone is always right, "
            "and an image."
        )


def _name_classes(
    found: LabeledImages, request: ReadRequest, intake: DatasetValidator
) -> dict[str, str]:
    """Class to name, without classes that have none or share theirs, which are errors."""
    given = _names_by_class(found, request, intake)
    names = {key: given.get(key, "").strip() for key in found.class_keys}
    counts = Counter(map(fold_class_name, names.values()))
    shared = {name for name in names.values() if counts[fold_class_name(name)] > 1}
    for key, name in names.items():
        if not name:
            intake.errors.add("class without a name", key)
        elif name in shared and not request.allow_repeated_class_names:
            intake.errors.add("class name repeated", f"{key}: {name}")
    if request.allow_repeated_class_names:
        return {key: name for key, name in names.items() if name}
    return {key: name for key, name in names.items() if name and name not in shared}


def _names_by_class(
    found: LabeledImages, request: ReadRequest, intake: DatasetValidator
) -> Mapping[str, str]:
    """The user's names where there are any, else those of the files."""
    chosen = found.names if request.class_names is None else request.class_names
    if isinstance(chosen, tuple):
        if len(chosen) != len(found.class_keys):
            raise ValueError(
                f"{intake.source}: {len(chosen)} class names for {len(found.class_keys)} classes. "
                "Give one for each, in the order of the class folders, or name the classes."
            )
        return dict(zip(found.class_keys, chosen, strict=True))
    for key in sorted(chosen.keys() - set(found.class_keys)):
        intake.errors.add("class name for a class that is not there", key)
    return chosen
