"""Questions of SugarCrepe and Winoground are whole, or what is broken is reported and counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image
from published_datasets import (
    errors_of,
    tiny_spec,
    winoground_items,
    write_json,
    write_sugarcrepe,
    write_winoground,
)

from modeling_llm2clip.data.validation_errors import DataValidationError
from modeling_llm2clip.evaluation.datasets.choice_dataset import ChoiceDataset, ChoiceItem
from modeling_llm2clip.evaluation.datasets.dataset_registry import find_dataset, load_dataset


def test_sugarcrepe_has_an_image_or_another_caption_of_it(tmp_path: Path) -> None:
    folder = write_sugarcrepe(tmp_path)
    seen = load_dataset(tiny_spec("sugarcrepe", items=7), folder, image_dir=folder / "val2017")
    read = load_dataset(tiny_spec("sugarcrepe-text", items=7), folder)
    assert isinstance(seen, ChoiceDataset) and isinstance(read, ChoiceDataset)
    assert [item.category for item in seen.items][:2] == ["add_att", "add_obj"]
    assert seen.items[1].captions == ("image 0, caption 1", "image 1, caption 1")
    assert seen.items[1].images == (folder / "val2017" / "000000000139.jpg",)
    assert [item.image_names for item in read.items] == [item.image_names for item in seen.items]
    # The anchor is another caption than the true one, which in the first item is caption 0.
    assert [item.anchor for item in read.items][:2] == ["image 0, caption 1", "image 0, caption 0"]


def write_winoground_parquet(folder: Path) -> Path:
    features = datasets.Features(
        id=datasets.Value("int32"),
        image_0=datasets.Image(),
        image_1=datasets.Image(),
        caption_0=datasets.Value("string"),
        caption_1=datasets.Value("string"),
        collapsed_tag=datasets.Value("string"),
    )
    rows = [
        {
            **{name: value for name, value in item.items() if name in features},
            "image_0": Image.new("RGB", (8, 8), "red"),
            "image_1": Image.new("RGB", (8, 8), "blue"),
        }
        for item in winoground_items()
    ]
    (folder / "data").mkdir(parents=True)
    table = datasets.Dataset.from_list(rows, features=features)
    table.to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    return folder


@pytest.mark.parametrize("write", [write_winoground, write_winoground_parquet])
def test_winoground_has_two_images_for_two_captions_from_either_form(
    write: Callable[[Path], Path], tmp_path: Path
) -> None:
    dataset = load_dataset(tiny_spec("winoground", items=2), write(tmp_path / "winoground"))
    assert isinstance(dataset, ChoiceDataset)
    assert [item.captions for item in dataset.items] == [
        ("0 over one", "one over 0"),
        ("1 over one", "one over 1"),
    ]
    assert [item.category for item in dataset.items] == ["Object", "Relation"]
    assert all(len(set(item.images)) == 2 for item in dataset.items)


def test_a_winoground_item_needs_both_its_images(tmp_path: Path) -> None:
    folder = write_winoground(tmp_path)
    (folder / "data" / "images" / "ex_1_img_0.png").unlink()
    assert errors_of(tiny_spec("winoground", items=1), folder) == {"image missing": 1}


def write_rows(file: Path, row: dict[str, Any]) -> Path:
    file.parent.mkdir(parents=True)
    datasets.Dataset.from_list([row]).to_parquet(file)
    return file.parent


def test_parquet_that_lacks_an_image_or_has_a_broken_one_is_reported(tmp_path: Path) -> None:
    image = {"bytes": b"no image", "path": None}
    row = {"id": 0, "image_0": image, "caption_0": "one", "caption_1": "two"}
    lacking = write_rows(tmp_path / "lacking" / "test.parquet", row)
    assert errors_of(tiny_spec("winoground"), lacking) == {"image missing": 1}
    unreadable = write_rows(tmp_path / "unreadable" / "test.parquet", {**row, "image_1": image})
    assert errors_of(tiny_spec("winoground"), unreadable) == {"image unreadable": 2}


def test_errors_of_choices_are_reported_at_once_or_skipped(tmp_path: Path) -> None:
    folder = write_sugarcrepe(tmp_path)
    same = {"filename": "000000000139.jpg", "caption": "same. ", "negative_caption": "same."}
    gone = {"filename": "gone.jpg", "caption": "one", "negative_caption": "two"}
    write_json(folder / "data" / "add_att.json", {"0": same, "1": gone, "2": {"caption": "one"}})
    spec = tiny_spec("sugarcrepe", items=8)
    errors = {
        "no 'filename', 'caption' and 'negative_caption'": 1,
        "the two captions are the same": 1,
        "image missing": 1,
    }
    options = {"image_dir": folder / "val2017"}
    assert errors_of(spec, folder, **options) == errors
    dataset = load_dataset(spec, folder, skip_invalid=True, **options)
    assert isinstance(dataset, ChoiceDataset)
    assert (len(dataset.items), dataset.protocol["skipped"]) == (6, errors)
    assert dataset.protocol["skipped_samples"] == 3


def test_items_of_one_name_are_an_error_because_embeddings_are_stored_by_name() -> None:
    items = [ChoiceItem("0", "all", ("one", text), anchor="uno") for text in ("two", "three")]
    spec = replace(
        find_dataset("sugarcrepe-text"), counts={}, origin="package", read=lambda _: iter(items)
    )
    with pytest.raises(DataValidationError) as error:
        load_dataset(spec)
    assert error.value.counts == {"item repeated": 1}
    dataset = load_dataset(spec, skip_invalid=True)
    assert isinstance(dataset, ChoiceDataset)
    assert [item.captions[1] for item in dataset.items] == ["two"]


def test_choices_with_images_cannot_be_read_without_them(tmp_path: Path) -> None:
    folder = write_sugarcrepe(tmp_path)
    with pytest.raises(ValueError, match="sugarcrepe-text"):
        load_dataset(tiny_spec("sugarcrepe", items=7), folder, require_images=False)
