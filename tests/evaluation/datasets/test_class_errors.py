"""Bad class names and class folders are told by name, or left out, counted and reported."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from published_datasets import (
    errors_of,
    tiny_card,
    write_imagenet,
    write_imagenet_of_kaggle,
    write_images,
)

from modeling_llm2clip.data.validation_errors import DataValidationError
from modeling_llm2clip.evaluation.datasets.dataset_registry import load_dataset
from modeling_llm2clip.evaluation.datasets.schema import ClassificationDataset


def test_a_sign_between_class_and_name_is_no_part_of_the_name(tmp_path: Path) -> None:
    folder = write_imagenet(tmp_path / "imagenet")
    mapping = folder / "LOC_synset_mapping.txt"
    lines = mapping.read_text(encoding="utf-8").splitlines()
    mapping.write_text("\n".join(line.replace(" ", " : ", 1) for line in lines), encoding="utf-8")
    with pytest.raises(ValueError, match=r"name that begins with a sign.*mapping\.txt line 1: n0"):
        load_dataset(tiny_card("imagenet", images=2 * len(lines), classes=len(lines)), folder)


def test_class_names_that_repeat_are_told_or_their_classes_left_out(tmp_path: Path) -> None:
    folder = write_imagenet(tmp_path / "imagenet")
    (folder / "LOC_synset_mapping.txt").write_text(
        "n01440764 crane\nn01443537 crane\nn01484850 tench, Tinca tinca\n", encoding="utf-8"
    )
    card = tiny_card("imagenet", images=6, classes=3)
    assert errors_of(card, folder) == {"class name repeated": 2}
    # The one class that is left would be right whatever a model says.
    with pytest.raises(ValueError, match=r"2 images and 1 classes are left.*at least two"):
        load_dataset(card, folder, skip_invalid=True)
    write_images(folder / "val" / "n99", ["a.JPEG"])
    with (folder / "LOC_synset_mapping.txt").open("a", encoding="utf-8") as lines:
        lines.write("n99 goldfish\n")
    (folder / "val" / "n99" / "notes.txt").touch()
    larger = tiny_card("imagenet", images=7, classes=4)
    found = load_dataset(larger, folder, skip_invalid=True)
    assert isinstance(found, ClassificationDataset)
    assert (found.class_names, found.labels) == (("tench", "goldfish"), (0, 0, 1))
    assert found.protocol["excluded"] == {"class name repeated": 2, "not an image": 1}
    assert found.protocol["images_of_excluded_classes"] == 4
    assert found.protocol["skipped_samples"] == 5  # those four, and what is no image
    shutil.rmtree(folder / "val" / "n99")
    mapping = (folder / "LOC_synset_mapping.txt").read_text(encoding="utf-8")
    (folder / "LOC_synset_mapping.txt").write_text(mapping.replace("n99 goldfish\n", ""), "utf-8")
    names = {"n01440764": "crane (bird)", "n01443537": "crane (machine)", "n01484850": "tench"}
    named = load_dataset(card, folder, class_names=names)
    assert isinstance(named, ClassificationDataset)
    assert named.labels == (0, 0, 1, 1, 2, 2)


@pytest.mark.parametrize(
    "names",
    [
        ["Cat", "dog", "cat"],
        ["caf\u00e9", "dog", "cafe\u0301"],  # one letter, or a letter and its accent
        ["red  fox", "dog", "red fox"],
    ],
)
def test_class_names_that_no_model_tells_apart_are_repeats(
    names: list[str], tmp_path: Path
) -> None:
    folder = write_imagenet(tmp_path / "imagenet")
    card = tiny_card("imagenet", images=6, classes=3)
    assert errors_of(card, folder, class_names=names) == {"class name repeated": 2}
    found = load_dataset(card, folder, class_names=names, allow_repeated_class_names=True)
    assert isinstance(found, ClassificationDataset)
    assert found.class_names == tuple(names)
    assert found.protocol["repeated_class_names"] == [names[2]]
    # Other words: a model that lower-cases tells them apart.
    assert load_dataset(card, folder, class_names=["Maße", "dog", "Masse"])


def test_an_image_beside_the_class_folders_is_told(tmp_path: Path) -> None:
    folder = write_imagenet(tmp_path / "imagenet")
    write_images(folder / "val", ["loose.png"])
    names = {"n01440764": "a", "n01443537": "b", "n01484850": "c"}
    told = {"image in no class folder": 1}
    assert errors_of("image-folder", folder / "val", class_names=names) == told
    found = load_dataset("image-folder", folder / "val", class_names=names, skip_invalid=True)
    assert found.protocol["skipped_samples"] == 1


def test_classes_of_one_name_stay_and_are_listed_where_that_is_allowed(tmp_path: Path) -> None:
    folder = write_imagenet(tmp_path / "imagenet")
    (folder / "LOC_synset_mapping.txt").write_text(
        "n01440764 crane\nn01443537 crane\nn01484850 tench, Tinca tinca\n", encoding="utf-8"
    )
    card = tiny_card("imagenet", images=6, classes=3)
    with pytest.raises(
        DataValidationError, match=r"n01443537: crane(?s:.)*--allow-repeated-class-names"
    ):
        load_dataset(card, folder)
    found = load_dataset(card, folder, allow_repeated_class_names=True)
    assert isinstance(found, ClassificationDataset)
    assert found.class_names == ("crane", "crane", "tench")
    assert found.protocol["repeated_class_names"] == ["crane"]
    assert found.protocol["excluded"] == {} and len(found.images) == 6


def test_a_file_that_names_more_classes_than_there_are_folders_is_told(tmp_path: Path) -> None:
    folder = write_imagenet(tmp_path / "imagenet") / "val"
    names = [f"{path.name} {path.name}" for path in folder.iterdir() if path.is_dir()]
    (folder / "class_names.txt").write_text("\n".join([*names, "gone gone"]), encoding="utf-8")
    assert errors_of("image-folder", folder) == {"class name for a class that is not there": 1}


def test_every_error_of_class_folders_is_told_at_once(tmp_path: Path) -> None:
    folder = write_imagenet(tmp_path / "imagenet")
    (folder / "val" / "empty").mkdir()
    (folder / "val" / "n01440764" / "notes.txt").write_text("no image", encoding="utf-8")
    (folder / "val" / "n01440764" / ".DS_Store").write_text("", encoding="utf-8")
    (folder / "val" / "n01443537" / "ILSVRC2012_val_1.JPEG").write_bytes(b"no image")
    names = {"n01440764": "tench", "n01443537": "goldfish", "gone": "gone", "empty": "empty"}
    assert errors_of("image-folder", folder / "val", class_names=names) == {
        "class folder without images": 1,
        "class name for a class that is not there": 1,
        "class without a name": 1,
        "not an image": 1,
        "image unreadable": 1,
    }


def test_class_names_in_order_must_be_as_many_as_classes(tmp_path: Path) -> None:
    folder = write_imagenet(tmp_path / "imagenet")
    with pytest.raises(ValueError, match="2 class names for 3 classes"):
        load_dataset("image-folder", folder / "val", class_names=["tench", "goldfish"])


def test_class_names_of_another_language_need_templates_of_it(tmp_path: Path) -> None:
    folder = write_imagenet(tmp_path / "imagenet")
    card = tiny_card("imagenet", images=6, classes=3)
    names = ["Schleie", "Goldfisch", "Weißer Hai"]
    with pytest.raises(ValueError, match="imagenet has no language 'de'"):
        load_dataset(card, folder, lang="de")
    with pytest.raises(ValueError, match=r"templates of the card are English, lang is 'de'"):
        load_dataset(card, folder, lang="de", class_names=names)
    templates = ["ein Foto von: {}"]
    found = load_dataset(card, folder, lang="de", class_names=names, templates=templates)
    assert found.lang == found.protocol["lang"] == "de"
    assert found.protocol["templates_from"] == "given"


def test_a_missing_image_of_kaggles_list_is_no_wrong_count(tmp_path: Path) -> None:
    folder = write_imagenet_of_kaggle(tmp_path / "imagenet")
    (folder / "ILSVRC" / "Data" / "CLS-LOC" / "val" / "ILSVRC2012_val_1.JPEG").unlink()
    card = tiny_card("imagenet", images=2, classes=3)
    assert errors_of(card, folder) == {"image missing": 1}
