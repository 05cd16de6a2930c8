"""Reads images by class: one folder a class, or ImageNet as its publisher packs it for Kaggle.

Class names of a file: one line a class, `<class> <name>`. ImageNet's own `LOC_synset_mapping.txt`
has several names a class with commas between them, of which the first is taken.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from ....data.image_sources import IMAGE_SUFFIXES
from ..classification_dataset import LabeledImages
from ..dataset_spec import ReadRequest
from ..validation import DatasetValidator
from .text_files import read_lines

SYNSETS = "LOC_synset_mapping.txt"
SOLUTION = "LOC_val_solution.csv"
NAMES = "class_names.txt"
_KAGGLE_IMAGES = "ILSVRC/Data/CLS-LOC/val"


def read_image_folder(request: ReadRequest, intake: DatasetValidator) -> LabeledImages:
    """Read a folder of class folders; without a file of names a folder's name is the class name."""
    root = request.image_dir or request.folder
    images, keys = _walk_class_folders(root, intake)
    if not (request.folder / NAMES).is_file():
        return LabeledImages(keys, {key: key.replace("_", " ") for key in keys}, images)
    file = intake.note_file(request.folder / NAMES)
    return LabeledImages(keys, _read_names(file, intake), images, file)


def read_imagenet(request: ReadRequest, intake: DatasetValidator) -> LabeledImages:
    """Read ImageNet's validation images, in class folders or flat with Kaggle's solution."""
    names, file = {}, None
    if request.class_names is None:
        file = intake.find_file(
            request.folder,
            NAMES,
            SYNSETS,
            advice="Give class names (a file with `<synset> <name>` lines), or the publisher's "
            f"{SYNSETS}.",
        )
        names = _read_names(file, intake)
    if (request.folder / SOLUTION).is_file():
        return replace(_read_solution(request, intake, names), names_file=file)
    root = request.image_dir or request.folder / "val"
    images, keys = _walk_class_folders(root, intake)
    return LabeledImages(keys, names, images, file)


def _walk_class_folders(
    root: Path, intake: DatasetValidator
) -> tuple[tuple[tuple[str, Path, str], ...], tuple[str, ...]]:
    """Every image below the class folders, and the folders' names, both in their order."""
    if not root.is_dir():
        raise ValueError(f"{intake.source}: {root} is no folder. Give the folder of class folders.")
    folders = sorted(path for path in root.iterdir() if path.is_dir() and path.name[0] != ".")
    if not folders:
        raise ValueError(f"{intake.source}: {root} has no class folders. Put each class into one.")
    for file in sorted(path for path in root.iterdir() if path.is_file()):
        if _is_image(file):
            intake.errors.add("image in no class folder", file.name)
    images: list[tuple[str, Path, str]] = []
    for folder in folders:
        before = len(images)
        for file in _list_files(folder):
            name = file.relative_to(root).as_posix()
            if _is_image(file):
                images.append((name, file, folder.name))
            else:
                intake.errors.add("not an image", name)
        if len(images) == before:
            intake.errors.add("class folder without images", folder.name)
    return tuple(images), tuple(folder.name for folder in folders)


def _is_image(file: Path) -> bool:
    return file.suffix.lower().removeprefix(".") in IMAGE_SUFFIXES and file.name[0] != "."


def _list_files(folder: Path) -> Iterator[Path]:
    """Files in the folder and below it, in order; those with a leading dot are the system's own."""
    yield from sorted(
        file for file in folder.rglob("*") if file.is_file() and not file.name.startswith(".")
    )


def _read_names(file: Path, intake: DatasetValidator) -> dict[str, str]:
    names: dict[str, str] = {}
    for number, line in enumerate(read_lines(file), start=1):
        key, *rest = line.split(maxsplit=1)[:2] if line.strip() else [""]
        if not rest:
            intake.errors.add("line without a class and its name", f"{file.name} line {number}")
        elif rest[0].startswith((":", "=", ",")):  # copies go round as `<class> : <name>`
            intake.errors.add("name that begins with a sign", f"{file.name} line {number}: {line}")
        elif key in names:
            intake.errors.add("class named twice", f"{file.name} line {number}: {key}")
        else:
            names[key] = rest[0].partition(",")[0] if file.name == SYNSETS else rest[0]
    return names


def _read_solution(
    request: ReadRequest, intake: DatasetValidator, names: dict[str, str]
) -> LabeledImages:
    image_dir = request.image_dir or request.folder / _KAGGLE_IMAGES
    images: list[tuple[str, Path, str]] = []
    file = intake.note_file(request.folder / SOLUTION)
    with file.open(encoding="utf-8", newline="") as lines:
        for number, row in enumerate(csv.DictReader(lines), start=2):
            place = f"{SOLUTION} line {number}"
            name, label = row.get("ImageId"), (row.get("PredictionString") or "").split()
            if not name or not label:
                intake.errors.add("no 'ImageId' and 'PredictionString'", place)
                continue
            image = image_dir / f"{name}.JPEG"
            if image.is_file():
                images.append((image.name, image, label[0]))
            else:
                intake.errors.add("image missing", f"{place}: {image.name}")
    given = request.class_names if isinstance(request.class_names, Mapping) else names
    # Labels are the places of the synsets in their sorted order, as in the publisher's list.
    keys = tuple(sorted({*given, *(label for _, _, label in images)}))
    return LabeledImages(keys, names, tuple(sorted(images)))
