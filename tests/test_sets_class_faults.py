"""Bad class names and class folders are told by name, or left out, counted and reported."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from published_sets import (
    faults_of,
    tiny_card,
    write_imagenet,
    write_imagenet_of_kaggle,
    write_pictures,
)

from modeling_llm2clip.data.faults import DataFaults
from modeling_llm2clip.evaluation.sets.registry import read_set
from modeling_llm2clip.evaluation.sets.schema import ClassificationSet


def test_a_sign_between_class_and_name_is_no_part_of_the_name(tmp_path: Path) -> None:
    folder = write_imagenet(tmp_path / "imagenet")
    mapping = folder / "LOC_synset_mapping.txt"
    lines = mapping.read_text(encoding="utf-8").splitlines()
    mapping.write_text("\n".join(line.replace(" ", " : ", 1) for line in lines), encoding="utf-8")
    with pytest.raises(ValueError, match=r"name that begins with a sign.*mapping\.txt line 1: n0"):
        read_set(tiny_card("imagenet", pictures=2 * len(lines), classes=len(lines)), folder)


def test_class_names_that_repeat_are_told_or_their_classes_left_out(tmp_path: Path) -> None:
    folder = write_imagenet(tmp_path / "imagenet")
    (folder / "LOC_synset_mapping.txt").write_text(
        "n01440764 crane\nn01443537 crane\nn01484850 tench, Tinca tinca\n", encoding="utf-8"
    )
    card = tiny_card("imagenet", pictures=6, classes=3)
    assert faults_of(card, folder) == {"class name repeated": 2}
    # The one class that is left would be right whatever a model says.
    with pytest.raises(ValueError, match=r"2 pictures and 1 classes are left.*at least two"):
        read_set(card, folder, exclude_faults=True)
    write_pictures(folder / "val" / "n99", ["a.JPEG"])
    with (folder / "LOC_synset_mapping.txt").open("a", encoding="utf-8") as lines:
        lines.write("n99 goldfish\n")
    (folder / "val" / "n99" / "notes.txt").touch()
    larger = tiny_card("imagenet", pictures=7, classes=4)
    found = read_set(larger, folder, exclude_faults=True)
    assert isinstance(found, ClassificationSet)
    assert (found.class_names, found.labels) == (("tench", "goldfish"), (0, 0, 1))
    assert found.protocol["excluded"] == {"class name repeated": 2, "not a picture": 1}
    assert found.protocol["pictures_of_excluded_classes"] == 4
    assert found.protocol["excluded_samples"] == 5  # those four, and what is no picture
    shutil.rmtree(folder / "val" / "n99")
    mapping = (folder / "LOC_synset_mapping.txt").read_text(encoding="utf-8")
    (folder / "LOC_synset_mapping.txt").write_text(mapping.replace("n99 goldfish\n", ""), "utf-8")
    names = {"n01440764": "crane (bird)", "n01443537": "crane (machine)", "n01484850": "tench"}
    named = read_set(card, folder, class_names=names)
    assert isinstance(named, ClassificationSet)
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
    card = tiny_card("imagenet", pictures=6, classes=3)
    assert faults_of(card, folder, class_names=names) == {"class name repeated": 2}
    found = read_set(card, folder, class_names=names, allow_repeated_class_names=True)
    assert isinstance(found, ClassificationSet)
    assert found.class_names == tuple(names)
    assert found.protocol["repeated_class_names"] == [names[2]]
    # Other words: a model that lower-cases tells them apart.
    assert read_set(card, folder, class_names=["Maße", "dog", "Masse"])


def test_a_picture_beside_the_class_folders_is_told(tmp_path: Path) -> None:
    folder = write_imagenet(tmp_path / "imagenet")
    write_pictures(folder / "val", ["loose.png"])
    names = {"n01440764": "a", "n01443537": "b", "n01484850": "c"}
    told = {"picture in no class folder": 1}
    assert faults_of("image-folder", folder / "val", class_names=names) == told
    found = read_set("image-folder", folder / "val", class_names=names, exclude_faults=True)
    assert found.protocol["excluded_samples"] == 1


def test_classes_of_one_name_stay_and_are_listed_where_that_is_allowed(tmp_path: Path) -> None:
    folder = write_imagenet(tmp_path / "imagenet")
    (folder / "LOC_synset_mapping.txt").write_text(
        "n01440764 crane\nn01443537 crane\nn01484850 tench, Tinca tinca\n", encoding="utf-8"
    )
    card = tiny_card("imagenet", pictures=6, classes=3)
    with pytest.raises(DataFaults, match=r"n01443537: crane(?s:.)*--allow-repeated-class-names"):
        read_set(card, folder)
    found = read_set(card, folder, allow_repeated_class_names=True)
    assert isinstance(found, ClassificationSet)
    assert found.class_names == ("crane", "crane", "tench")
    assert found.protocol["repeated_class_names"] == ["crane"]
    assert found.protocol["excluded"] == {} and len(found.pictures) == 6


def test_a_file_that_names_more_classes_than_there_are_folders_is_told(tmp_path: Path) -> None:
    folder = write_imagenet(tmp_path / "imagenet") / "val"
    names = [f"{path.name} {path.name}" for path in folder.iterdir() if path.is_dir()]
    (folder / "class_names.txt").write_text("\n".join([*names, "gone gone"]), encoding="utf-8")
    assert faults_of("image-folder", folder) == {"class name for a class that is not there": 1}


def test_every_fault_of_class_folders_is_told_at_once(tmp_path: Path) -> None:
    folder = write_imagenet(tmp_path / "imagenet")
    (folder / "val" / "empty").mkdir()
    (folder / "val" / "n01440764" / "notes.txt").write_text("no picture", encoding="utf-8")
    (folder / "val" / "n01440764" / ".DS_Store").write_text("", encoding="utf-8")
    (folder / "val" / "n01443537" / "ILSVRC2012_val_1.JPEG").write_bytes(b"no picture")
    names = {"n01440764": "tench", "n01443537": "goldfish", "gone": "gone", "empty": "empty"}
    assert faults_of("image-folder", folder / "val", class_names=names) == {
        "class folder without pictures": 1,
        "class name for a class that is not there": 1,
        "class without a name": 1,
        "not a picture": 1,
        "picture unreadable": 1,
    }


def test_class_names_in_order_must_be_as_many_as_classes(tmp_path: Path) -> None:
    folder = write_imagenet(tmp_path / "imagenet")
    with pytest.raises(ValueError, match="2 class names for 3 classes"):
        read_set("image-folder", folder / "val", class_names=["tench", "goldfish"])


def test_class_names_of_another_language_need_templates_of_it(tmp_path: Path) -> None:
    folder = write_imagenet(tmp_path / "imagenet")
    card = tiny_card("imagenet", pictures=6, classes=3)
    names = ["Schleie", "Goldfisch", "Weißer Hai"]
    with pytest.raises(ValueError, match="imagenet has no language 'de'"):
        read_set(card, folder, lang="de")
    with pytest.raises(ValueError, match=r"templates of the card are English, lang is 'de'"):
        read_set(card, folder, lang="de", class_names=names)
    templates = ["ein Foto von: {}"]
    found = read_set(card, folder, lang="de", class_names=names, templates=templates)
    assert found.lang == found.protocol["lang"] == "de"
    assert found.protocol["templates_from"] == "given"


def test_a_missing_picture_of_kaggles_list_is_no_wrong_count(tmp_path: Path) -> None:
    folder = write_imagenet_of_kaggle(tmp_path / "imagenet")
    (folder / "ILSVRC" / "Data" / "CLS-LOC" / "val" / "ILSVRC2012_val_1.JPEG").unlink()
    card = tiny_card("imagenet", pictures=2, classes=3)
    assert faults_of(card, folder) == {"picture missing": 1}
