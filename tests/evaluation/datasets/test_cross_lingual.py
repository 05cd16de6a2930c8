"""Flickr30k-CN, COCO-CN, Crossmodal-3600 and Multi30k are read as their publishers ship them."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from PIL import Image
from published_datasets import (
    captions_by_image,
    errors_of,
    read_retrieval,
    tiny_spec,
    write_coco_cn,
    write_flickr30k,
    write_flickr30k_cn,
    write_json_lines,
    write_multi30k,
    write_xm3600,
)

from modeling_llm2clip.data.images.image_sources import ParquetImage
from modeling_llm2clip.evaluation.datasets.dataset_registry import (
    load_dataset,
)
from modeling_llm2clip.evaluation.datasets.retrieval_dataset import (
    RetrievalDataset,
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize(
    ("lang", "captions"),
    [("en", ("a cat 0", "one cat 0", "a cat 1", "one cat 1")),
     ("de", ("eine Katze 0", "eine Katze 1")),
     ("zh", ("一只猫 0", "猫 0", "一只猫 1", "猫 1"))],
)  # fmt: skip
def test_xm3600_has_all_captions_of_the_asked_language(
    lang: str, captions: tuple[str, ...], tmp_path: Path
) -> None:
    counts = {"images": 2, "captions": len(captions)}
    found = read_retrieval("xm3600", write_xm3600(tmp_path), counts, lang=lang)
    assert found.captions == captions
    assert found.lang == found.protocol["lang"] == lang


def test_a_record_of_xm3600_without_the_language_is_an_error(tmp_path: Path) -> None:
    folder = write_xm3600(tmp_path)
    lines = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    del lines[1]["de"]
    write_json_lines(folder / "captions.jsonl", lines)
    spec = tiny_spec("xm3600", images=1)
    assert errors_of(spec, folder, lang="de") == {"no 'image/key', or no captions in 'de'": 1}
    assert load_dataset(tiny_spec("xm3600", images=2), folder, lang="en").protocol["skipped"] == {}


def test_captions_of_xm3600_that_are_a_text_in_place_of_a_list_are_an_error(
    tmp_path: Path,
) -> None:
    folder = write_xm3600(tmp_path)
    lines = (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    record = json.loads(lines[0])
    record["de"]["caption"] = "Ein Hund."
    lines[0] = json.dumps(record)
    (folder / "captions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    wanted = {"no 'image/key', or no captions in 'de'": 1}
    assert errors_of(tiny_spec("xm3600", images=1), folder, lang="de") == wanted


def test_parquet_of_a_hub_is_read_at_its_commit_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The layout that huggingface_hub keeps; offline it looks nowhere else.
    commit = "5" * 40
    snapshot = tmp_path / "hub" / "datasets--mteb--xm3600" / "snapshots" / commit
    features = datasets.Features(
        image=datasets.Image(),
        image_id=datasets.Value("string"),
        captions=datasets.Sequence(datasets.Value("string")),
    )
    for lang in ("de", "en"):
        rows = [
            {"image": Image.new("RGB", (8, 8), color), "image_id": color, "captions": [lang]}
            for color in ("red", "blue")
        ]
        (snapshot / "data").mkdir(parents=True, exist_ok=True)
        table = datasets.Dataset.from_list(rows, features=features)
        table.to_parquet(snapshot / "data" / f"{lang}-00000-of-00001.parquet")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    spec = tiny_spec("xm3600", images=2, captions=2)
    found = load_dataset(spec, f"hub:mteb/xm3600@{commit}", lang="de")
    assert isinstance(found, RetrievalDataset)
    assert captions_by_image(found) == {"red": ["de"], "blue": ["de"]}
    assert all(isinstance(image, ParquetImage) for image in found.images)
    assert found.protocol["source"] == f"hub:mteb/xm3600@{commit}"
    with pytest.raises(ValueError, match="cannot be fetched"):
        load_dataset(spec, f"hub:mteb/xm3600@{'6' * 40}", lang="de")
    with pytest.raises(ValueError, match="does not pin a commit"):
        load_dataset(spec, "hub:mteb/xm3600@main", lang="de")


def test_lines_of_multi30k_end_at_line_feeds_only(tmp_path: Path) -> None:
    # The first caption holds a line separator of Unicode, at which Python's splitlines would split.
    folder = write_multi30k(tmp_path)
    options = {"image_dir": folder / "flickr30k-images", "lang": "en"}
    found = read_retrieval("multi30k", folder, {"images": 2, "captions": 2}, **options)
    assert captions_by_image(found) == {
        "1007129816.jpg": ["A man in a hat."],
        "1009434119.jpg": ["A dog."],
    }


def test_files_of_multi30k_of_different_length_are_refused_even_if_samples_may_be_skipped(
    tmp_path: Path,
) -> None:
    # Which line is missing cannot be known, so there is no sample that could be left out.
    folder = write_multi30k(tmp_path)
    names = folder / "data" / "task1" / "image_splits" / "test_2016_flickr.txt"
    names.write_text("1007129816.jpg\n", encoding="utf-8")
    spec = tiny_spec("multi30k", images=2)
    with pytest.raises(ValueError, match=r"has 2 lines.*has 1;"):
        load_dataset(spec, folder, lang="en", skip_invalid=True)


def test_chinese_captions_name_images_as_flickr30k_does(tmp_path: Path) -> None:
    english = read_retrieval(
        "flickr30k", write_flickr30k(tmp_path / "en"), {"images": 2, "captions": 10}
    )
    folder = write_flickr30k_cn(tmp_path / "zh")
    chinese = read_retrieval(
        "flickr30k-cn",
        folder,
        {"images": 2, "captions": 10},
        image_dir=folder / "flickr30k-images",
    )
    assert [Path(name).name for name in english.image_names] == list(chinese.image_names)
    assert chinese.captions[0] == "图片1007129816的 标题0"
    assert chinese.lang == "zh"


def test_the_first_captions_of_flickr30k_cn_are_those_of_the_lowest_numbers(
    tmp_path: Path,
) -> None:
    folder = write_flickr30k_cn(tmp_path / "cn")
    file = folder / "flickr30k_cn_test.txt"
    spec = tiny_spec("flickr30k-cn", images=2, captions=10)
    options = {"image_dir": folder / "flickr30k-images"}
    whole = load_dataset(spec, folder, **options)
    lines = file.read_text(encoding="utf-8").splitlines()
    sixth = "1007129816#zhm#5 第六"
    file.write_text("\n".join([sixth, *lines[::-1]]), encoding="utf-8")
    shuffled = load_dataset(spec, folder, **options)
    assert isinstance(whole, RetrievalDataset) and isinstance(shuffled, RetrievalDataset)
    assert set(shuffled.captions) == set(whole.captions)
    file.write_text("\n".join([lines[1], *lines, "1009434119#zhm#x 无"]), encoding="utf-8")
    assert errors_of(tiny_spec("flickr30k-cn"), folder, **options) == {
        "number of a caption repeated": 1,
        "no 'image#number' at the start of the line": 1,
    }


def test_captions_of_flickr30k_cn_that_are_split_into_words_are_errors(tmp_path: Path) -> None:
    folder = write_flickr30k_cn(tmp_path / "cn")
    file = folder / "flickr30k_cn_test.txt"
    options = {"image_dir": folder / "flickr30k-images"}
    spec = tiny_spec("flickr30k-cn", images=2, captions=10)
    lines = file.read_text(encoding="utf-8").splitlines()
    lines[0] = "1007129816#zhm#0 一个:m 男人:n ，:wd 戴:v 帽子:n "
    lines[1] = "1007129816#zhm#1 时间 12:30 的:钟"  # a caption with colons
    file.write_text("\n".join(lines), encoding="utf-8")
    assert errors_of(tiny_spec("flickr30k-cn"), folder, **options) == {
        "caption split into words with parts of speech": 1
    }
    found = load_dataset(spec, folder, skip_invalid=True, **options)
    assert isinstance(found, RetrievalDataset)
    assert found.protocol["skipped_samples"] == 1


def test_coco_cn_has_the_captions_of_its_test_split_in_that_splits_order(tmp_path: Path) -> None:
    found = read_retrieval("coco-cn", write_coco_cn(tmp_path), {"images": 2, "captions": 3})
    assert captions_by_image(found) == {
        "val2014/COCO_val2014_000000000042.jpg": ["一只狗。", "狗在睡觉。"],
        "train2014/COCO_train2014_000000000009.jpg": ["火车站。"],
    }
