"""Classes have names that every model distinguishes, or their images count as wrong."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
from published_datasets import (
    errors_of,
    tiny_spec,
    write_imagenet,
    write_images,
)

from modeling_llm2clip.evaluation.datasets.classification_dataset import (
    ClassificationDataset,
    LabeledImages,
)
from modeling_llm2clip.evaluation.datasets.dataset_registry import find_dataset, load_dataset


def test_a_protocol_says_which_class_names_were_in_the_prompts(tmp_path: Path) -> None:
    folder = write_imagenet(tmp_path / "imagenet")
    spec = tiny_spec("imagenet", images=6, classes=3)
    names = ["tench", "goldfish", "great white"]
    stated = [
        load_dataset(spec, folder).protocol,
        load_dataset(spec, folder, class_names=names).protocol,
    ]
    (folder / "class_names.txt").write_text(
        "n01440764 tench\nn01443537 goldfish\nn01484850 great white shark\n", encoding="utf-8"
    )
    stated.append(load_dataset(spec, folder).protocol)
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


def test_classes_of_one_name_are_kept_and_listed(tmp_path: Path) -> None:
    folder = write_imagenet(tmp_path / "imagenet")
    mapping = "n01440764 crane\nn01443537 crane\nn01484850 tench, Tinca tinca\n"
    (folder / "LOC_synset_mapping.txt").write_text(mapping, encoding="utf-8")
    spec = tiny_spec("imagenet", images=6, classes=3)
    with pytest.warns(UserWarning, match=r"several classes are named crane; .*count as wrong"):
        found = load_dataset(spec, folder)
    assert isinstance(found, ClassificationDataset)
    assert found.class_names == ("crane", "crane", "tench")
    assert found.protocol["repeated_class_names"] == ["crane"]
    assert found.protocol["skipped"] == {} and len(found.images) == 6


def test_images_of_classes_without_a_name_are_skipped_and_counted(tmp_path: Path) -> None:
    folder = write_imagenet(tmp_path / "imagenet")
    mapping = "n01440764 goldfish\nn01484850 tench, Tinca tinca\n"
    (folder / "LOC_synset_mapping.txt").write_text(mapping, encoding="utf-8")
    (folder / "val" / "n01440764" / "notes.txt").touch()
    spec = tiny_spec("imagenet", images=6, classes=3)
    assert errors_of(spec, folder) == {"class without a name": 1, "not an image": 1}
    found = load_dataset(spec, folder, skip_invalid=True)
    assert isinstance(found, ClassificationDataset)
    assert (found.class_names, found.labels) == (("goldfish", "tench"), (0, 0, 1, 1))
    assert found.protocol["skipped"] == {"class without a name": 1, "not an image": 1}
    assert found.protocol["images_of_skipped_classes"] == 2
    assert found.protocol["skipped_samples"] == 3  # those two, and the file that is not an image
    # The one class that is left would be right whatever a model says.
    (folder / "LOC_synset_mapping.txt").write_text("n01440764 goldfish\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"left are 2 images and 1 of the classes.*at least two"):
        load_dataset(spec, folder, skip_invalid=True)


@pytest.mark.parametrize(
    "names",
    [
        ["Cat", "dog", "cat"],
        ["caf\u00e9", "dog", "cafe\u0301"],  # one letter, or a letter and its accent
        ["red  fox", "dog", "red fox"],
    ],
)
def test_class_names_that_some_model_cannot_distinguish_are_repeats(
    names: list[str], tmp_path: Path
) -> None:
    folder = write_imagenet(tmp_path / "imagenet")
    spec = tiny_spec("imagenet", images=6, classes=3)
    with pytest.warns(UserWarning, match="several classes are named"):
        found = load_dataset(spec, folder, class_names=names)
    assert isinstance(found, ClassificationDataset)
    assert found.class_names == tuple(names)
    assert found.protocol["repeated_class_names"] == [names[2]]
    # Other words: a model that does not lower-case has two classes.
    assert load_dataset(spec, folder, class_names=["Maße", "dog", "Masse"])


def test_class_names_in_order_must_be_as_many_as_classes(tmp_path: Path) -> None:
    folder = write_imagenet(tmp_path / "imagenet")
    with pytest.raises(ValueError, match="2 class names for 3 classes"):
        load_dataset("image-folder", folder / "val", class_names=["tench", "goldfish"])


def test_class_names_of_another_language_need_templates_of_it(tmp_path: Path) -> None:
    folder = write_imagenet(tmp_path / "imagenet")
    spec = tiny_spec("imagenet", images=6, classes=3)
    names = ["Schleie", "Goldfisch", "Weißer Hai"]
    with pytest.raises(ValueError, match="imagenet has no language 'de'"):
        load_dataset(spec, folder, lang="de")
    with pytest.raises(ValueError, match=r"templates of the dataset are English, lang is 'de'"):
        load_dataset(spec, folder, lang="de", class_names=names)
    templates = ["ein Foto von: {}"]
    found = load_dataset(spec, folder, lang="de", class_names=names, templates=templates)
    assert found.lang == found.protocol["lang"] == "de"
    assert found.protocol["templates_from"] == "given"


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
    found = load_dataset(spec, tmp_path, skip_invalid=True)
    assert isinstance(found, ClassificationDataset)
    assert (found.image_names, found.labels) == (("cat.png", "dog.png"), (0, 1))
    assert found.protocol["skipped"] == {error: 1}
    assert found.protocol["skipped_samples"] == 1
    assert "images_of_skipped_classes" not in found.protocol


@pytest.mark.parametrize(
    ("templates", "message"),
    [(("a photo",), r"without exactly one \{\}: \['a photo'\]"), ((), "none given")],
)
def test_templates_must_take_one_name(
    templates: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        load_dataset("imagenet", tmp_path, templates=templates)
