"""ImageNet and class folders are read as their publishers ship them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from published_datasets import (
    errors_of,
    tiny_spec,
    write_imagenet,
    write_imagenet_of_kaggle,
    write_images,
)

from modeling_llm2clip.evaluation.datasets.classification_dataset import ClassificationDataset
from modeling_llm2clip.evaluation.datasets.dataset_registry import find_dataset, load_dataset


def test_imagenet_has_eighty_different_templates() -> None:
    templates = find_dataset("imagenet").templates
    assert len(set(templates)) == len(templates) == 80
    assert all(text.count("{}") == 1 for text in templates)
    # Spelt as published, with their grammar: the score depends on it.
    assert {"itap of my {}.", "a origami {}.", "a embroidered {}."} <= set(templates)
    assert {"a photo of the hard to see {}.", "the {} in a video game."} <= set(templates)


@pytest.mark.parametrize("write", [write_imagenet, write_imagenet_of_kaggle])
def test_imagenet_labels_are_positions_in_the_sorted_list_of_synsets(
    write: Callable[[Path], Path], tmp_path: Path
) -> None:
    folder = write(tmp_path / "imagenet")
    num_images = 6 if write is write_imagenet else 2
    found = load_dataset(tiny_spec("imagenet", images=num_images, classes=3), folder)
    assert isinstance(found, ClassificationDataset)
    assert found.class_names == ("tench", "goldfish", "great white")
    assert found.labels == ((0, 0, 1, 1, 2, 2) if write is write_imagenet else (0, 2))
    assert found.protocol["templates"] == list(found.templates) and len(found.templates) == 80


def test_a_sign_between_class_and_name_is_not_part_of_the_name(tmp_path: Path) -> None:
    folder = write_imagenet(tmp_path / "imagenet")
    mapping = folder / "LOC_synset_mapping.txt"
    lines = mapping.read_text(encoding="utf-8").splitlines()
    mapping.write_text("\n".join(line.replace(" ", " : ", 1) for line in lines), encoding="utf-8")
    with pytest.raises(ValueError, match=r"name that begins with a sign.*mapping\.txt line 1: n0"):
        load_dataset(tiny_spec("imagenet", images=2 * len(lines), classes=len(lines)), folder)


def test_class_folders_may_be_named_in_any_language(tmp_path: Path) -> None:
    folder = write_imagenet(tmp_path / "imagenet") / "val"
    spec = tiny_spec("image-folder")
    plain = load_dataset(spec, folder)
    named = load_dataset(
        spec,
        folder,
        lang="de",
        class_names=["Schleie", "Goldfisch", "Weißer Hai"],
        templates=["ein Foto von: {}"],
    )
    assert isinstance(plain, ClassificationDataset) and isinstance(named, ClassificationDataset)
    assert plain.class_names == ("n01440764", "n01443537", "n01484850")
    assert plain.templates == ("a photo of a {}.",)
    assert named.class_names == ("Schleie", "Goldfisch", "Weißer Hai")
    assert (named.templates, named.lang) == (("ein Foto von: {}",), "de")
    assert named.labels == plain.labels


def test_an_image_beside_the_class_folders_is_an_error(tmp_path: Path) -> None:
    folder = write_imagenet(tmp_path / "imagenet")
    write_images(folder / "val", ["loose.png"])
    names = {"n01440764": "a", "n01443537": "b", "n01484850": "c"}
    wanted = {"image in no class folder": 1}
    assert errors_of("image-folder", folder / "val", class_names=names) == wanted
    found = load_dataset("image-folder", folder / "val", class_names=names, skip_invalid=True)
    assert found.protocol["skipped_samples"] == 1


def test_a_file_that_names_more_classes_than_there_are_folders_is_an_error(tmp_path: Path) -> None:
    folder = write_imagenet(tmp_path / "imagenet") / "val"
    names = [f"{path.name} {path.name}" for path in folder.iterdir() if path.is_dir()]
    (folder / "class_names.txt").write_text("\n".join([*names, "gone gone"]), encoding="utf-8")
    assert errors_of("image-folder", folder) == {"class name for a class that does not exist": 1}


def test_all_errors_of_class_folders_are_reported_at_once(tmp_path: Path) -> None:
    folder = write_imagenet(tmp_path / "imagenet")
    (folder / "val" / "empty").mkdir()
    (folder / "val" / "n01440764" / "notes.txt").write_text("no image", encoding="utf-8")
    (folder / "val" / "n01440764" / ".DS_Store").write_text("", encoding="utf-8")
    hidden = folder / "val" / "n01440764" / ".ipynb_checkpoints" / "no image.png"
    hidden.parent.mkdir()
    hidden.write_bytes(b"no image")
    (folder / "val" / "n01443537" / "ILSVRC2012_val_1.JPEG").write_bytes(b"no image")
    names = {"n01440764": "tench", "n01443537": "goldfish", "gone": "gone", "empty": "empty"}
    assert errors_of("image-folder", folder / "val", class_names=names) == {
        "class folder without images": 1,
        "class name for a class that does not exist": 1,
        "class without a name": 1,
        "not an image": 1,
        "image unreadable": 1,
    }


def test_a_missing_image_of_kaggles_list_is_not_a_wrong_count(tmp_path: Path) -> None:
    folder = write_imagenet_of_kaggle(tmp_path / "imagenet")
    (folder / "ILSVRC" / "Data" / "CLS-LOC" / "val" / "ILSVRC2012_val_1.JPEG").unlink()
    spec = tiny_spec("imagenet", images=2, classes=3)
    assert errors_of(spec, folder) == {"image missing": 1}


def test_an_image_that_kaggles_list_has_twice_is_an_error(tmp_path: Path) -> None:
    folder = write_imagenet_of_kaggle(tmp_path / "imagenet")
    lines = (folder / "LOC_val_solution.csv").read_text().splitlines()
    (folder / "LOC_val_solution.csv").write_text("\n".join([*lines, lines[1]]) + "\n")
    assert errors_of(tiny_spec("imagenet", classes=3), folder) == {"image repeated": 1}
