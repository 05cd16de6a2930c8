"""Flickr30k and COCO are read as their publishers ship them."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from PIL import Image
from published_datasets import (
    COCO_NAMES,
    captions_by_image,
    captions_of,
    errors_of,
    read_retrieval,
    tiny_spec,
    write_coco_official,
    write_coco_test,
    write_json,
    write_karpathy_original,
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_coco_keeps_the_first_five_captions_of_each_image_with_that_image(
    tmp_path: Path,
) -> None:
    # A reshape to (images, 5) would shift every caption behind the sixth by one image.
    folder = write_coco_test(tmp_path / "coco", counts=(5, 6, 5))
    found = read_retrieval("coco", folder, {"images": 3, "captions": 15})
    assert captions_by_image(found) == {
        name: captions_of(number) for number, name in enumerate(COCO_NAMES)
    }
    assert found.images == tuple(folder / name for name in COCO_NAMES)
    assert found.protocol["captions_per_image"] == 5


def test_only_the_test_split_of_karpathys_own_file_is_read(tmp_path: Path) -> None:
    folder = write_karpathy_original(tmp_path / "coco")
    found = read_retrieval("coco", folder, {"images": 2, "captions": 10})
    assert captions_by_image(found) == {
        name: captions_of(number) for number, name in enumerate(COCO_NAMES) if number
    }


def test_a_split_that_karpathy_does_not_have_is_an_error(tmp_path: Path) -> None:
    folder = write_karpathy_original(tmp_path)
    content = json.loads((folder / "dataset_coco.json").read_text(encoding="utf-8"))
    content["images"][1]["split"] = "tset"
    write_json(folder / "dataset_coco.json", content)
    spec = tiny_spec("coco", images=1, captions=5)
    assert errors_of(spec, folder) == {"no split, or an unknown one": 1}


def test_images_may_be_without_the_subfolder_that_the_file_names(tmp_path: Path) -> None:
    folder = write_coco_test(tmp_path / "coco")
    found = read_retrieval(
        "coco", folder, {"images": 3, "captions": 15}, image_dir=folder / "val2014"
    )
    assert found.images == tuple(folder / name for name in COCO_NAMES)


def test_official_coco_captions_are_taken_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    folder = write_coco_official(tmp_path / "coco")
    found = read_retrieval(
        "coco-val2017", folder, {"images": 2, "captions": 10}, image_dir=folder / "val2017"
    )
    assert captions_by_image(found) == {
        "000000000139.jpg": captions_of(0),
        "000000000285.jpg": captions_of(1),
    }


def test_only_the_test_split_of_flickr30k_as_parquet_is_read(tmp_path: Path) -> None:
    features = datasets.Features(
        image=datasets.Image(),
        caption=datasets.Sequence(datasets.Value("string")),
        split=datasets.Value("string"),
        filename=datasets.Value("string"),
    )
    rows = [
        {
            "image": Image.new("RGB", (8, 8), "red"),
            "caption": captions_of(number),
            "split": split,
            "filename": f"{number}.jpg",
        }
        for number, split in enumerate(("test", "train", "test"))
    ]
    (tmp_path / "TEST" / "test").mkdir(parents=True)
    table = datasets.Dataset.from_list(rows, features=features)
    table.to_parquet(tmp_path / "TEST" / "test" / "0000.parquet")
    found = read_retrieval("flickr30k", tmp_path, {"images": 2, "captions": 10})
    assert captions_by_image(found) == {"0.jpg": captions_of(0), "2.jpg": captions_of(2)}
    assert [image.row for image in found.images] == [0, 2]  # type: ignore[union-attr]
