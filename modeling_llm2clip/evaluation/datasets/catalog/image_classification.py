"""Zero-shot classification: ImageNet-1k, and any folder of class folders.

A file of class names has lines `<class> <name>`. ImageNet's own `LOC_synset_mapping.txt` has
several names per class with commas between them, of which the first is taken.

The eighty templates of ImageNet are those that CLIP's authors published with their results
(arXiv:2103.00020; github.com/openai/CLIP, `notebooks/Prompt_Engineering_for_ImageNet.ipynb`).
Another spelling would give another score. Their order does not matter, because their embeddings are
averaged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from ....data.images.image_sources import IMAGE_SUFFIXES
from ....data.sources.csv_files import iterate_csv
from ..classification_dataset import LabeledImages, build_classification_dataset
from ..dataset_spec import DatasetSpec, ReadRequest
from ..validation import DatasetValidator, read_lines

_SYNSETS = "LOC_synset_mapping.txt"
_SOLUTION = "LOC_val_solution.csv"
_NAMES = "class_names.txt"
_KAGGLE_IMAGES = "ILSVRC/Data/CLS-LOC/val"
_SIMPLE_TEMPLATE = "a photo of a {}."
# Each of these has a variant with "a" and one with "the".
_WITH_BOTH_ARTICLES = (
    "a bad photo of {}.",
    "a low resolution photo of {}.",
    "a rendering of {}.",
    "graffiti of {}.",
    "a cropped photo of {}.",
    "a tattoo of {}.",
    "a bright photo of {}.",
    "a dark photo of {}.",
    "a drawing of {}.",
    "a close-up photo of {}.",
    "a black and white photo of {}.",
    "a painting of {}.",
    "a pixelated photo of {}.",
    "a sculpture of {}.",
    "a jpeg corrupted photo of {}.",
    "a blurry photo of {}.",
    "a photo of {}.",
    "a good photo of {}.",
    "a doodle of {}.",
    "a sketch of {}.",
    "a rendition of {}.",
    "art of {}.",
    "itap of {}.",
)
# Before these, the article precedes the adjective.
_ADJECTIVES_AFTER_ARTICLE = (
    "hard to see", "clean", "dirty", "cool", "nice", "weird", "large", "small",
)  # fmt: skip
_MATERIALS = ("embroidered", "plastic", "origami", "toy", "cartoon", "plushie")
_OTHERS = (
    "a photo of many {}.",
    "a photo of my {}.",
    "a photo of one {}.",
    "a {} in a video game.",
    "the {} in a video game.",
    "itap of my {}.",
)
IMAGENET_TEMPLATES: tuple[str, ...] = (
    *(
        text.replace("{}", f"{article} {{}}")
        for text in _WITH_BOTH_ARTICLES
        for article in ("a", "the")
    ),
    *(
        f"a photo of {article} {adjective} {{}}."
        for adjective in _ADJECTIVES_AFTER_ARTICLE
        for article in ("a", "the")
    ),
    *(f"{article} {material} {{}}." for material in _MATERIALS for article in ("a", "the")),
    *_OTHERS,
)


def read_image_folder(request: ReadRequest, validator: DatasetValidator) -> LabeledImages:
    """Read a folder of class folders; without a file of names, the folders name the classes.

    Args:
        request: How the dataset is to be read.
        validator: Collects the errors.
    """
    root = request.image_dir or request.data_folder
    images, keys = _walk_class_folders(root, validator)
    file = request.data_folder / _NAMES
    if not file.is_file():
        return LabeledImages(keys, {key: key.replace("_", " ") for key in keys}, images)
    return LabeledImages(keys, _read_names(validator.note_file(file), validator), images, file)


def read_imagenet(request: ReadRequest, validator: DatasetValidator) -> LabeledImages:
    """Read ImageNet's validation images, in class folders or flat with Kaggle's solution.

    Args:
        request: How the dataset is to be read.
        validator: Collects the errors.
    """
    folder = request.data_folder
    names, file = {}, None
    if request.class_names is None:
        file = validator.find_file(
            folder,
            _NAMES,
            _SYNSETS,
            advice="Give class names (a file with `<synset> <name>` lines), or the publisher's "
            f"{_SYNSETS}.",
        )
        names = _read_names(file, validator)
    if (folder / _SOLUTION).is_file():
        return replace(_read_solution(request, validator, names), names_file=file)
    images, keys = _walk_class_folders(request.image_dir or folder / "val", validator)
    return LabeledImages(keys, names, images, file)


def _walk_class_folders(
    root: Path, validator: DatasetValidator
) -> tuple[tuple[tuple[str, Path, str], ...], tuple[str, ...]]:
    """List every image of the class folders, and the folders' names, both in their order."""
    if not root.is_dir():
        raise ValueError(
            f"{validator.source}: {root} is not a folder. Give the folder of class folders."
        )
    folders = sorted(path for path in root.iterdir() if path.is_dir() and path.name[0] != ".")
    if not folders:
        raise ValueError(
            f"{validator.source}: {root} has no class folders. Put the images of each class into "
            "a folder."
        )
    for file in sorted(path for path in root.iterdir() if path.is_file()):
        if _is_image(file):
            validator.errors.add("image in no class folder", file.name)
    images: list[tuple[str, Path, str]] = []
    for folder in folders:
        before = len(images)
        for file in _list_files(folder):
            name = file.relative_to(root).as_posix()
            if _is_image(file):
                images.append((name, file, folder.name))
            else:
                validator.errors.add("not an image", name)
        if len(images) == before:
            validator.errors.add("class folder without images", folder.name)
    return tuple(images), tuple(folder.name for folder in folders)


def _is_image(file: Path) -> bool:
    return file.suffix.lower().removeprefix(".") in IMAGE_SUFFIXES and file.name[0] != "."


def _list_files(folder: Path) -> Iterator[Path]:
    """Yield the files in a folder and its subfolders in order, but not those of the system."""
    yield from sorted(
        file for file in folder.rglob("*") if file.is_file() and not file.name.startswith(".")
    )


def _read_names(file: Path, validator: DatasetValidator) -> dict[str, str]:
    names: dict[str, str] = {}
    for number, line in enumerate(read_lines(file), start=1):
        key, *rest = line.split(maxsplit=1)[:2] if line.strip() else [""]
        place = f"{file.name} line {number}"
        if not rest:
            validator.errors.add("line without a class and its name", place)
        elif rest[0].startswith((":", "=", ",")):  # some copies have `<class> : <name>`
            validator.errors.add("name that begins with a sign", f"{place}: {line}")
        elif key in names:
            validator.errors.add("class named twice", f"{place}: {key}")
        else:
            names[key] = rest[0].partition(",")[0] if file.name == _SYNSETS else rest[0]
    return names


def _read_solution(
    request: ReadRequest, validator: DatasetValidator, names: dict[str, str]
) -> LabeledImages:
    image_dir = request.image_dir or request.data_folder / _KAGGLE_IMAGES
    images: list[tuple[str, Path, str]] = []
    file = validator.note_file(request.data_folder / _SOLUTION)
    for number, row in iterate_csv(file):
        place = f"{_SOLUTION} line {number}"
        name, label = row.get("ImageId"), row.get("PredictionString", "").split()
        if not name or not label:
            validator.errors.add("no 'ImageId' and 'PredictionString'", place)
            continue
        image = image_dir / f"{name}.JPEG"
        if image.is_file():
            images.append((image.name, image, label[0]))
        else:
            validator.errors.add("image missing", f"{place}: {image.name}")
    given = request.class_names if isinstance(request.class_names, Mapping) else names
    # Labels are the positions of the sorted synsets, as in the publisher's list.
    keys = tuple(sorted({*given, *(label for _, _, label in images)}))
    return LabeledImages(keys, names, tuple(sorted(images)))


DATASETS = (
    DatasetSpec(
        name="imagenet",
        title="ImageNet-1k, validation images, the 80 templates of CLIP",
        dataset_type="classification",
        languages=("en",),
        counts={"images": 50000, "classes": 1000},
        license="ImageNet's terms of access: research only",
        citation="Russakovsky et al., IJCV 2015, arXiv:1409.0575; templates arXiv:2103.00020",
        source="image-net.org, or the Kaggle competition imagenet-object-localization-challenge",
        files="val/<synset>/*.JPEG, or LOC_val_solution.csv and ILSVRC/Data/CLS-LOC/val/*.JPEG; "
        "names: class_names.txt with `<synset> <name>` lines, or LOC_synset_mapping.txt",
        protocol={"split": "validation"},
        build=partial(
            build_classification_dataset, read=read_imagenet, templates=IMAGENET_TEMPLATES
        ),
    ),
    DatasetSpec(
        name="image-folder",
        title="Your own images, with a folder for each class",
        dataset_type="classification",
        languages=(),
        counts={},
        license="yours",
        citation="none",
        source="your disk",
        files="<class>/*.jpg; class_names.txt with `<class> <name>` lines, if names differ",
        protocol={"split": "all"},
        build=partial(
            build_classification_dataset, read=read_image_folder, templates=(_SIMPLE_TEMPLATE,)
        ),
    ),
)
