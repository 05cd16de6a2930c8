"""Images by class are read as they are shipped, and models distinguish the names of classes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from published_datasets import (
    errors_of,
    tiny_spec,
    write_imagenet,
    write_imagenet_of_kaggle,
    write_images,
)

from modeling_llm2clip.evaluation.datasets.classification_dataset import (
    ClassificationDataset,
    LabeledImages,
)
from modeling_llm2clip.evaluation.datasets.dataset_registry import find_dataset, load_dataset

IMAGENET = tiny_spec("imagenet", images=6, classes=3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The validation images of three classes in folders, and the names of the classes."""
    return write_imagenet(tmp_path / "imagenet")


def load(*arguments: Any, **options: Any) -> ClassificationDataset:
    dataset = load_dataset(*arguments, **options)
    assert isinstance(dataset, ClassificationDataset)
    return dataset


def test_imagenet_has_eighty_different_templates() -> None:
    templates = find_dataset("imagenet").templates
    assert len(set(templates)) == len(templates) == 80
    assert all(text.count("{}") == 1 for text in templates)
    # Spelt as published, with their grammar: the score depends on it.
    assert {"itap of my {}.", "a origami {}.", "a embroidered {}."} <= set(templates)
    assert {"a photo of the hard to see {}.", "the {} in a video game."} <= set(templates)


@pytest.mark.parametrize(
    ("write", "labels"), [(write_imagenet, (0, 0, 1, 1, 2, 2)), (write_imagenet_of_kaggle, (0, 2))]
)
def test_imagenet_labels_are_positions_in_the_sorted_list_of_synsets(
    write: Callable[[Path], Path], labels: tuple[int, ...], tmp_path: Path
) -> None:
    spec = tiny_spec("imagenet", images=len(labels), classes=3)
    dataset = load(spec, write(tmp_path / "imagenet"))
    assert dataset.class_names == ("tench", "goldfish", "great white")
    assert dataset.labels == labels
    assert dataset.protocol["templates"] == list(dataset.templates)
    assert len(dataset.templates) == 80


def test_a_missing_or_repeated_image_of_kaggles_list_is_an_error(tmp_path: Path) -> None:
    folder = write_imagenet_of_kaggle(tmp_path / "imagenet")
    solution = folder / "LOC_val_solution.csv"
    lines = solution.read_text().splitlines()
    solution.write_text("\n".join([*lines, lines[1]]) + "\n")
    assert errors_of(tiny_spec("imagenet", classes=3), folder) == {"image repeated": 1}
    solution.write_text("\n".join(lines) + "\n")
    (folder / "ILSVRC" / "Data" / "CLS-LOC" / "val" / "ILSVRC2012_val_1.JPEG").unlink()
    # Nor is it a wrong count.
    spec = tiny_spec("imagenet", images=2, classes=3)
    assert errors_of(spec, folder) == {"image missing": 1}


def test_class_folders_may_be_named_in_any_language(folder: Path) -> None:
    spec = tiny_spec("image-folder")
    plain = load(spec, folder / "val")
    names = ("Schleie", "Goldfisch", "Weißer Hai")
    template = "ein Foto von: {}"
    named = load(spec, folder / "val", lang="de", class_names=names, templates=[template])
    assert plain.class_names == ("n01440764", "n01443537", "n01484850")
    assert plain.templates == ("a photo of a {}.",)
    assert named.class_names == names
    assert (named.templates, named.lang) == ((template,), "de")
    assert named.labels == plain.labels


def test_all_errors_of_class_folders_are_reported_at_once(folder: Path) -> None:
    (folder / "val" / "empty").mkdir()
    write_images(folder / "val", ["loose.png"])
    tench = folder / "val" / "n01440764"
    (tench / "notes.txt").write_text("no image", encoding="utf-8")
    (tench / ".DS_Store").write_text("", encoding="utf-8")
    hidden = tench / ".ipynb_checkpoints" / "no image.png"
    hidden.parent.mkdir()
    hidden.write_bytes(b"no image")
    (folder / "val" / "n01443537" / "ILSVRC2012_val_1.JPEG").write_bytes(b"no image")
    for link, target in (("n01440764/more", tench), ("linked", tench), ("n01440764/a.png", "gone")):
        (folder / "val" / link).symlink_to(target)
    (tench / "linked.png").symlink_to(next(tench.glob("*.JPEG")))  # a file like any other
    names = {"n01440764": "tench", "n01443537": "goldfish", "gone": "gone", "empty": "empty"}
    assert errors_of("image-folder", folder / "val", class_names=names) == {
        "class folder without images": 1,
        "class name for a class that does not exist": 1,
        "class without a name": 1,
        "image in no class folder": 1,
        "link to a folder, not followed": 2,
        "link to no file": 1,
        "not an image": 1,
        "image unreadable": 1,
    }
    names = {"n01440764": "tench", "n01443537": "goldfish", "n01484850": "shark"}
    dataset = load("image-folder", folder / "val", class_names=names, skip_invalid=True)
    assert dataset.protocol["skipped_samples"] == 6
    assert sorted(set(dataset.labels)) == [0, 1, 2]


def test_names_that_begin_with_a_sign_or_name_no_class_are_errors(folder: Path) -> None:
    mapping = folder / "LOC_synset_mapping.txt"
    lines = mapping.read_text(encoding="utf-8").splitlines()
    mapping.write_text("\n".join(line.replace(" ", " : ", 1) for line in lines), encoding="utf-8")
    with pytest.raises(ValueError, match=r"name that begins with a sign.*mapping\.txt line 1: n0"):
        load_dataset(IMAGENET, folder)
    (folder / "val" / "class_names.txt").write_text("\n".join([*lines, "gone gone"]), "utf-8")
    errors = {"class name for a class that does not exist": 1}
    assert errors_of("image-folder", folder / "val") == errors


def test_a_protocol_says_which_class_names_were_in_the_prompts(folder: Path) -> None:
    names = ["tench", "goldfish", "great white"]
    stated = [load(IMAGENET, folder).protocol, load(IMAGENET, folder, class_names=names).protocol]
    (folder / "class_names.txt").write_text(
        "n01440764 tench\nn01443537 goldfish\nn01484850 great white shark\n", encoding="utf-8"
    )
    stated.append(load(IMAGENET, folder).protocol)
    stated.append(load_dataset("image-folder", folder / "val").protocol)
    described = [protocol["class_names"] for protocol in stated]
    assert [names["from"] for names in described] == [
        "LOC_synset_mapping.txt", "given", "class_names.txt", "names of the folders",
    ]  # fmt: skip
    used = [names["names_sha256"] for names in described]
    assert used[0] == used[1] == hashlib.sha256("\n".join(names).encode()).hexdigest()
    assert len(set(used)) == 3
    content = (folder / "class_names.txt").read_bytes()
    assert described[2]["file_sha256"] == hashlib.sha256(content).hexdigest()
    assert stated[3]["templates"] == ["a photo of a {}."]


def test_classes_of_one_name_are_kept_and_listed(folder: Path) -> None:
    mapping = "n01440764 crane\nn01443537 crane\nn01484850 tench, Tinca tinca\n"
    (folder / "LOC_synset_mapping.txt").write_text(mapping, encoding="utf-8")
    with pytest.warns(UserWarning, match=r"several classes share the name crane; .*count as wrong"):
        dataset = load(IMAGENET, folder)
    assert dataset.class_names == ("crane", "crane", "tench")
    assert dataset.protocol["repeated_class_names"] == ["crane"]
    assert dataset.protocol["skipped"] == {} and len(dataset.images) == 6


def test_images_of_classes_without_a_name_are_skipped_and_counted(folder: Path) -> None:
    mapping = "n01440764 goldfish\nn01484850 tench, Tinca tinca\n"
    (folder / "LOC_synset_mapping.txt").write_text(mapping, encoding="utf-8")
    (folder / "val" / "n01440764" / "notes.txt").touch()
    assert errors_of(IMAGENET, folder) == {"class without a name": 1, "not an image": 1}
    dataset = load(IMAGENET, folder, skip_invalid=True)
    assert (dataset.class_names, dataset.labels) == (("goldfish", "tench"), (0, 0, 1, 1))
    assert dataset.protocol["skipped"] == {"class without a name": 1, "not an image": 1}
    assert dataset.protocol["images_of_skipped_classes"] == 2
    assert dataset.protocol["skipped_samples"] == 3  # those two, and the file that is not an image
    # The one class that is left would be right whatever a model says.
    (folder / "LOC_synset_mapping.txt").write_text("n01440764 goldfish\n", encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"only 2 images and 1 of the classes are left.*two classes"
    ):
        load(IMAGENET, folder, skip_invalid=True)


@pytest.mark.parametrize(
    "names",
    [
        ["Cat", "dog", "cat"],
        ["caf\u00e9", "dog", "cafe\u0301"],  # one letter, or a letter and its accent
        ["red  fox", "dog", "red fox"],
    ],
)
def test_class_names_that_some_model_cannot_distinguish_are_repeats(
    names: list[str], folder: Path
) -> None:
    with pytest.warns(UserWarning, match="several classes share the name"):
        dataset = load(IMAGENET, folder, class_names=names)
    assert dataset.class_names == tuple(names)
    assert dataset.protocol["repeated_class_names"] == [names[2]]
    # Other words: a model that does not lower-case has two classes.
    assert load(IMAGENET, folder, class_names=["Maße", "dog", "Masse"])


def test_class_names_in_order_must_be_as_many_as_classes(folder: Path) -> None:
    with pytest.raises(ValueError, match="2 class names for 3 classes"):
        load_dataset("image-folder", folder / "val", class_names=["tench", "goldfish"])


def test_class_names_of_another_language_need_templates_of_it(folder: Path) -> None:
    names = ["Schleie", "Goldfisch", "Weißer Hai"]
    with pytest.raises(ValueError, match="imagenet has no language 'de'"):
        load(IMAGENET, folder, lang="de")
    with pytest.raises(ValueError, match=r"dataset's templates are English, but lang is 'de'"):
        load(IMAGENET, folder, lang="de", class_names=names)
    templates = ["ein Foto von: {}"]
    dataset = load(IMAGENET, folder, lang="de", class_names=names, templates=templates)
    assert dataset.lang == dataset.protocol["lang"] == "de"
    assert dataset.protocol["templates_from"] == "given"


@pytest.mark.parametrize(
    ("added", "error"),
    [
        (("cat.png", "dog"), "image repeated"),  # embeddings are stored by the name of the image
        (("bird.png", "bird"), "image of a class that does not exist"),
    ],
)
def test_an_image_needs_a_name_of_its_own_and_a_class(
    added: tuple[str, str], error: str, tmp_path: Path
) -> None:
    write_images(tmp_path, ["cat.png", "dog.png"])
    images = [("cat.png", "cat"), ("dog.png", "dog"), added]
    read = LabeledImages(
        class_keys=("cat", "dog"),
        names={"cat": "cat", "dog": "dog"},
        images=tuple((name, tmp_path / f"{key}.png", key) for name, key in images),
    )
    spec = replace(find_dataset("image-folder"), read=lambda _: read)
    assert errors_of(spec, tmp_path) == {error: 1}
    dataset = load(spec, tmp_path, skip_invalid=True)
    assert (dataset.image_names, dataset.labels) == (("cat.png", "dog.png"), (0, 1))
    assert dataset.protocol["skipped"] == {error: 1}
    assert dataset.protocol["skipped_samples"] == 1
    assert "images_of_skipped_classes" not in dataset.protocol


@pytest.mark.parametrize(
    ("templates", "message"),
    [(("a photo",), r"\{\} exactly once; got \['a photo'\]"), ((), "got no templates")],
)
def test_templates_must_take_one_name(
    templates: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        load_dataset("imagenet", tmp_path, templates=templates)
