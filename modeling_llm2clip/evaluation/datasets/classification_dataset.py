"""Read classification datasets: ImageNet-1k, and any folder with a subfolder per class.

A file of class names has `<class> <name>` lines. ImageNet's own `LOC_synset_mapping.txt` lists
several comma-separated names per class; only the first name is used.
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from ..._suggestions import counted, list_first
from ...data.atomic_files import hash_file
from ...data.images.image_sources import ImageSource
from ...data.sources.csv_files import iterate_csv
from ...data.validation_errors import ErrorCollector
from .dataset_spec import (
    DatasetReading,
    EvaluationDataset,
    is_image,
    read_lines,
)

# Errors that concern a whole class; the images lost with it are counted separately.
_ERRORS_OF_CLASSES = (
    "class without a name",
    "class name for a class that does not exist",
    "class folder without images",
    "class named twice",
    "line without a class and its name",
)
_SYNSETS = "LOC_synset_mapping.txt"
_SOLUTION = "LOC_val_solution.csv"
_NAMES = "class_names.txt"
_KAGGLE_IMAGES = "ILSVRC/Data/CLS-LOC/val"


@dataclass(frozen=True, kw_only=True)
class ClassificationDataset(EvaluationDataset):
    """Images that each belong to one class.

    Attributes:
        labels: Index into `class_names` for each image.
        class_names: Class names, distinct even when case is ignored, except for names that
            `protocol` lists in `repeated_class_names`. Images of classes with a repeated name tie,
            and a tie is a wrong answer.
        templates: Prompts with one `{}` for the class name.
    """

    images: tuple[ImageSource, ...]
    image_names: tuple[str, ...]
    labels: tuple[int, ...]
    class_names: tuple[str, ...]
    templates: tuple[str, ...]

    @property
    def has_images(self) -> bool:
        return True

    def list_content(self) -> list[Any]:
        return [
            self.image_names, self.labels, self.class_names, self.templates, list(self.images),
        ]  # fmt: skip


@dataclass(frozen=True)
class LabeledImages:
    """Images and classes as read from the publisher's files.

    Attributes:
        class_keys: The publisher's names for the classes, in label order.
        names: Names of some or all classes, for prompts.
        images: Name, file and class of each image; names should be unique.
        names_file: File that the names come from; None if the names are the class folders' names.
    """

    class_keys: tuple[str, ...]
    names: Mapping[str, str]
    images: tuple[tuple[str, Path, str], ...]
    names_file: Path | None = None


def build_classification_dataset(reading: DatasetReading) -> ClassificationDataset:
    """Read the images, name the classes, and keep the images and classes without errors.

    No prompt can distinguish classes that share a name (ignoring case), so images of these classes
    tie and count as wrong. A warning and the protocol list these names.
    """
    spec = reading.spec
    templates = _choose_templates(reading)
    published: LabeledImages = spec.read(reading)
    names = _name_classes(published, reading)
    errors = reading.errors
    num_lost = errors.total - sum(errors.counts.get(kind, 0) for kind in _ERRORS_OF_CLASSES)
    in_use = [key for key in published.class_keys if key in names]
    valid = _check_images(published, errors)
    kept = [item for item in valid if item[2] in names]
    if len(kept) < len(valid):
        reading.notes["images_of_skipped_classes"] = len(valid) - len(kept)
    unreadable = reading.find_unreadable_images((file for _, file, _ in kept))
    kept = [item for item in kept if item[1] not in unreadable]
    num_images = len(published.images) + reading.errors.counts.get("image missing", 0)
    counts = {"images": num_images, "classes": len(published.class_keys)}
    skipped = reading.finish(counts)
    if not kept or len(in_use) < 2:
        raise ValueError(
            f"{reading.source}: only {counted(len(kept), 'image')} and {len(in_use)} of the "
            f"classes are left: {skipped}. Provide at least one image and two classes; with a "
            "single class, every answer is right."
        )
    class_names = tuple(names[key] for key in in_use)
    label_of = {key: label for label, key in enumerate(in_use)}
    protocol = {
        "dataset": spec.name,
        "lang": reading.lang,
        **spec.protocol,
        "images": len(kept),
        "classes": len(in_use),
        "published": spec.list_published_counts(reading.lang),
        "class_names": _describe_names(published, reading, class_names),
        "templates": list(templates),
        "templates_from": "dataset" if reading.templates is None else "given",
        "skipped": skipped,
        "skipped_samples": num_lost + len(published.images) - len(kept),
        **reading.notes,
    }
    if repeated := _find_repeated(class_names):
        protocol["repeated_class_names"] = repeated
        warnings.warn(
            f"{reading.source}: several classes share the name {list_first(repeated)}; their "
            "images count as wrong. Give each class a unique name (class_names).",
            stacklevel=2,
        )
    return ClassificationDataset(
        name=spec.name,
        images=tuple(file for _, file, _ in kept),
        image_names=tuple(name for name, _, _ in kept),
        labels=tuple(label_of[key] for _, _, key in kept),
        class_names=class_names,
        templates=templates,
        lang=reading.lang,
        protocol=protocol,
    )


def _check_images(published: LabeledImages, errors: ErrorCollector) -> list[tuple[str, Path, str]]:
    """List the images with a known class and a unique name; embeddings are looked up by name."""
    valid, seen, classes = [], set(), set(published.class_keys)
    for name, file, key in published.images:
        if name in seen:
            errors.add("image repeated", f"{key}: {name}")
        elif key not in classes:
            errors.add("image of a class that does not exist", f"{key}: {name}")
        else:
            valid.append((name, file, key))
        seen.add(name)
    return valid


def _find_repeated(names: Iterable[str]) -> list[str]:
    """List the names that several classes share, each once, in order of first occurrence.

    Case is ignored, as CLIP and SigLIP do.
    """
    seen: set[str] = set()
    repeated: dict[str, str] = {}
    for name in names:
        normalized = " ".join(unicodedata.normalize("NFC", name).lower().split())
        if normalized in seen:
            repeated.setdefault(normalized, name)
        seen.add(normalized)
    return list(repeated.values())


def _describe_names(
    published: LabeledImages, reading: DatasetReading, names: tuple[str, ...]
) -> dict[str, str]:
    """Describe the source of the class names, with a hash of the names in use, in label order."""
    if reading.class_names is not None:
        source = {"from": "given"}
    elif published.names_file is None:
        source = {"from": "names of the folders"}
    else:
        source = {"from": published.names_file.name, "file_sha256": hash_file(published.names_file)}
    return {**source, "names_sha256": hashlib.sha256("\n".join(names).encode()).hexdigest()}


def _choose_templates(reading: DatasetReading) -> tuple[str, ...]:
    """Return the templates; raise ValueError unless each is in `lang` and has exactly one `{}`."""
    spec = reading.spec
    if not reading.require_images:
        raise ValueError(
            f"{spec.name} cannot be read without its images. Leave out require_images=False."
        )
    if reading.lang != "en" and reading.templates is None:
        raise ValueError(
            f"{spec.name}: the dataset's templates are English, but lang is {reading.lang!r}. "
            "Pass templates in that language as well."
        )
    templates = spec.templates if reading.templates is None else tuple(reading.templates)
    broken = [text for text in templates if text.count("{}") != 1]
    if broken or not templates:
        raise ValueError(
            f"{spec.name}: each template must contain {{}} exactly once; got "
            f"{broken[:5] or 'no templates'}."
        )
    return templates


def _name_classes(published: LabeledImages, reading: DatasetReading) -> dict[str, str]:
    """Map classes to names; report a class without a name as an error and leave it out."""
    name_of = _find_names(published, reading)
    names = {key: name_of.get(key, "").strip() for key in published.class_keys}
    for key, name in names.items():
        if not name:
            reading.errors.add("class without a name", key)
    return {key: name for key, name in names.items() if name}


def _find_names(published: LabeledImages, reading: DatasetReading) -> Mapping[str, str]:
    chosen = published.names if reading.class_names is None else reading.class_names
    if not isinstance(chosen, Mapping):
        if len(chosen) != len(published.class_keys):
            raise ValueError(
                f"{reading.source}: got {counted(len(chosen), 'class name')} for "
                f"{len(published.class_keys)} classes. Pass one per class, in the order of the "
                "class folders, or a mapping from class to name."
            )
        return dict(zip(published.class_keys, chosen, strict=True))
    for key in sorted(chosen.keys() - set(published.class_keys)):
        reading.errors.add("class name for a class that does not exist", key)
    return chosen


def read_image_folder(reading: DatasetReading) -> LabeledImages:
    """Read a folder of class folders, which name the classes if there is no file of names."""
    images, keys = _walk_class_folders(reading.image_dir or reading.data_folder, reading)
    file = reading.data_folder / _NAMES
    if not file.is_file():
        return LabeledImages(keys, {key: key.replace("_", " ") for key in keys}, images)
    return LabeledImages(keys, _read_names(reading.note_file(file), reading), images, file)


def read_imagenet(reading: DatasetReading) -> LabeledImages:
    """Read ImageNet's validation images, in class folders or flat with Kaggle's solution file."""
    folder = reading.data_folder
    names, file = {}, None
    if reading.class_names is None:
        file = reading.find_file(
            _NAMES,
            _SYNSETS,
            advice="Add a file of class names with `<synset> <name>` lines, or the publisher's "
            f"{_SYNSETS}.",
        )
        names = _read_names(file, reading)
    if (folder / _SOLUTION).is_file():
        images, keys = _read_solution(reading, names)
    else:
        images, keys = _walk_class_folders(reading.image_dir or folder / "val", reading)
    return LabeledImages(keys, names, images, file)


def _walk_class_folders(
    root: Path, reading: DatasetReading
) -> tuple[tuple[tuple[str, Path, str], ...], tuple[str, ...]]:
    """List every image in the class folders and the folders' names, both sorted."""
    walked = os.walk(root, onerror=_raise) if root.is_dir() else ()
    paths = sorted(Path(parent, name) for parent, *names in walked for name in chain(*names))
    images: list[tuple[str, Path, str]] = []
    folders: list[str] = []
    for path in paths:
        name = path.relative_to(root).as_posix()
        folder, is_below, _ = name.partition("/")
        if "/." in f"/{name}":  # hidden files
            continue
        if path.is_symlink() and not path.is_file():
            kind = "link to a folder, not followed" if path.is_dir() else "link to no file"
            reading.errors.add(kind, name)
        elif path.is_dir():
            folders += [] if is_below else [folder]
        elif is_below and is_image(path):
            images.append((name, path, folder))
        elif is_below or is_image(path):
            kind = "not an image" if is_below else "image in no class folder"
            reading.errors.add(kind, name)
    if not folders:
        raise ValueError(
            f"{reading.source}: {root} has no class folders. Put the images of each class into a "
            "folder of their own."
        )
    for folder in sorted(set(folders) - {folder for _, _, folder in images}):
        reading.errors.add("class folder without images", folder)
    return tuple(images), tuple(folders)


def _raise(error: OSError) -> None:
    raise error


def _read_names(file: Path, reading: DatasetReading) -> dict[str, str]:
    names: dict[str, str] = {}
    for number, line in enumerate(read_lines(file), start=1):
        key, *rest = line.split(maxsplit=1)[:2] if line.strip() else [""]
        place = f"{file.name} line {number}"
        if not rest:
            reading.errors.add("line without a class and its name", place)
        elif rest[0].startswith((":", "=", ",")):  # some copies have `<class> : <name>`
            reading.errors.add("name that begins with a sign", f"{place}: {line}")
        elif key in names:
            reading.errors.add("class named twice", f"{place}: {key}")
        else:
            names[key] = rest[0].partition(",")[0] if file.name == _SYNSETS else rest[0]
    return names


def _read_solution(
    reading: DatasetReading, names: dict[str, str]
) -> tuple[tuple[tuple[str, Path, str], ...], tuple[str, ...]]:
    image_dir = reading.image_dir or reading.data_folder / _KAGGLE_IMAGES
    images: list[tuple[str, Path, str]] = []
    file = reading.note_file(reading.data_folder / _SOLUTION)
    for number, row in iterate_csv(file):
        place = f"{_SOLUTION} line {number}"
        name, label = row.get("ImageId"), row.get("PredictionString", "").split()
        if not name or not label:
            reading.errors.add("no 'ImageId' and 'PredictionString'", place)
            continue
        image = image_dir / f"{name}.JPEG"
        if image.is_file():
            images.append((image.name, image, label[0]))
        else:
            reading.errors.add("image missing", f"{place}: {image.name}")
    name_of = reading.class_names if isinstance(reading.class_names, Mapping) else names
    # A label is a position among the sorted synsets, as in the publisher's list.
    return tuple(sorted(images)), tuple(sorted({*name_of, *(label for _, _, label in images)}))
