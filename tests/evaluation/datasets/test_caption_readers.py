"""Published captions are read as their publishers ship them, and what is broken is reported."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image
from published_datasets import (
    COCO_NAMES,
    captions_by_image,
    captions_of,
    errors_of,
    load_retrieval,
    read_retrieval,
    tiny_spec,
    write_coco_cn,
    write_coco_official,
    write_coco_test,
    write_docci,
    write_flickr30k,
    write_flickr30k_cn,
    write_iiw,
    write_images,
    write_json,
    write_json_lines,
    write_karpathy_original,
    write_multi30k,
    write_sharegpt4v,
    write_urban1k,
    write_xm3600,
)

from modeling_llm2clip.data.images.image_sources import ParquetImage
from modeling_llm2clip.demo.run_demo import split_emoji
from modeling_llm2clip.evaluation.datasets.caption_readers import JsonCaptions
from modeling_llm2clip.evaluation.datasets.dataset_registry import (
    find_dataset,
    find_languages,
    load_dataset,
)
from modeling_llm2clip.evaluation.datasets.dataset_spec import ReadingCache

COCO = {name: captions_of(number) for number, name in enumerate(COCO_NAMES)}


def list_xm3600(*texts: str) -> dict[str, list[str]]:
    names = ("000411001ff7dd4f.jpg", "0006eebafc6d04c0.jpg")
    return {name: [f"{text} {number}" for text in texts] for number, name in enumerate(names)}


@pytest.mark.parametrize(
    ("name", "write", "options", "captions"),
    [
        # A reshape to (images, 5) would shift every caption behind the sixth by one image.
        ("coco", write_coco_test, {}, COCO),
        # Images without the subfolder that the file names.
        ("coco", write_coco_test, {"image_dir": "val2014"}, COCO),
        # All splits are in one file.
        ("coco", write_karpathy_original, {}, {name: COCO[name] for name in COCO_NAMES[1:]}),
        (
            "coco-val2017",
            write_coco_official,
            {"image_dir": "val2017"},
            {"000000000139.jpg": captions_of(0), "000000000285.jpg": captions_of(1)},
        ),
        (
            "docci",
            write_docci,
            {},
            {f"test_0000{number}.jpg": [f"test_0000{number}."] for number in range(2)},
        ),
        # The first caption has a line separator of Unicode, at which Python's splitlines would
        # split.
        (
            "multi30k",
            write_multi30k,
            {"image_dir": "flickr30k-images", "lang": "en"},
            {"1007129816.jpg": ["A man in a hat."], "1009434119.jpg": ["A dog."]},
        ),
        (
            "coco-cn",
            write_coco_cn,
            {},
            {
                "val2014/COCO_val2014_000000000042.jpg": ["一只狗。", "狗在睡觉。"],
                "train2014/COCO_train2014_000000000009.jpg": ["火车站。"],
            },
        ),
        ("xm3600", write_xm3600, {"lang": "en"}, list_xm3600("a cat", "one cat")),
        ("xm3600", write_xm3600, {"lang": "de"}, list_xm3600("eine Katze")),
        ("xm3600", write_xm3600, {"lang": "zh"}, list_xm3600("一只猫", "猫")),
    ],
)  # fmt: skip
def test_each_image_has_its_captions_of_the_split_and_language(
    name: str, write: Callable[[Path], Path], options: dict[str, Any],
    captions: dict[str, list[str]], tmp_path: Path,
) -> None:  # fmt: skip
    folder = write(tmp_path / "data")
    if "image_dir" in options:
        options = {**options, "image_dir": folder / options["image_dir"]}
    counts = {"images": len(captions), "captions": sum(map(len, captions.values()))}
    dataset = read_retrieval(name, folder, counts, **options)
    assert captions_by_image(dataset) == captions
    num_used = 5 if name in ("coco", "coco-val2017") else "all"
    assert dataset.protocol["captions_per_image"] == num_used
    assert all(Path(str(image)).is_file() for image in dataset.images)
    if "lang" in options:
        assert dataset.lang == dataset.protocol["lang"] == options["lang"]


def test_a_split_that_karpathy_does_not_have_is_an_error(tmp_path: Path) -> None:
    folder = write_karpathy_original(tmp_path)
    content = json.loads((folder / "dataset_coco.json").read_text(encoding="utf-8"))
    content["images"][1]["split"] = "tset"
    write_json(folder / "dataset_coco.json", content)
    spec = tiny_spec("coco", images=1, captions=5)
    assert errors_of(spec, folder) == {"no split, or an unknown one": 1}


def test_only_the_test_split_of_flickr30k_as_parquet_is_read(tmp_path: Path) -> None:
    features = datasets.Features(
        image=datasets.Image(),
        caption=datasets.Sequence(datasets.Value("string")),
        split=datasets.Value("string"),
        filename=datasets.Value("string"),
    )
    image = Image.new("RGB", (8, 8), "red")
    rows = [
        {"image": image, "caption": captions_of(n), "split": split, "filename": f"{n}.jpg"}
        for n, split in enumerate(("test", "train", "test"))
    ]
    (tmp_path / "TEST" / "test").mkdir(parents=True)
    table = datasets.Dataset.from_list(rows, features=features)
    table.to_parquet(tmp_path / "TEST" / "test" / "0000.parquet")
    dataset = read_retrieval("flickr30k", tmp_path, {"images": 2, "captions": 10})
    assert captions_by_image(dataset) == {"0.jpg": captions_of(0), "2.jpg": captions_of(2)}
    assert [image.row for image in dataset.images] == [0, 2]  # type: ignore[union-attr]


def test_parquet_of_a_hub_is_read_at_its_commit_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The layout that huggingface_hub keeps; offline it looks nowhere else.
    commit = "5" * 40
    snapshot = tmp_path / "hub" / "datasets--mteb--xm3600" / "snapshots" / commit
    (snapshot / "data").mkdir(parents=True)
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
        table = datasets.Dataset.from_list(rows, features=features)
        table.to_parquet(snapshot / "data" / f"{lang}-00000-of-00001.parquet")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    spec = tiny_spec("xm3600", images=2, captions=2)
    dataset = load_retrieval(spec, f"hub:mteb/xm3600@{commit}", lang="de")
    assert captions_by_image(dataset) == {"red": ["de"], "blue": ["de"]}
    assert all(isinstance(image, ParquetImage) for image in dataset.images)
    assert dataset.protocol["source"] == f"hub:mteb/xm3600@{commit}"
    with pytest.raises(ValueError, match="cannot be downloaded"):
        load_dataset(spec, f"hub:mteb/xm3600@{'6' * 40}", lang="de")
    with pytest.raises(ValueError, match="does not pin a commit"):
        load_dataset(spec, "hub:mteb/xm3600@main", lang="de")


def test_the_first_line_of_an_urban1k_file_is_the_caption_and_longer_files_are_counted(
    tmp_path: Path,
) -> None:
    folder = write_urban1k(tmp_path / "Urban1k")
    dataset = read_retrieval("urban1k", folder, {"images": 10, "captions": 10})
    assert dataset.captions == tuple(f"Street {number}." for number in range(1, 11))
    assert dataset.image_names == tuple(f"{number}.jpg" for number in range(1, 11))
    assert dataset.protocol["captions_truncated_to_first_line"] == 1
    write_images(folder / "image", ["3.png"])
    assert errors_of(tiny_spec("urban1k"), folder) == {"image repeated": 1}


def test_an_urban1k_image_without_its_caption_is_an_error_and_vice_versa(tmp_path: Path) -> None:
    folder = write_urban1k(tmp_path / "Urban1k")
    (folder / "caption" / "3.txt").unlink()
    (folder / "image" / "4.jpg").unlink()
    (folder / "caption" / "5.txt").write_text("\nSecond line only.", encoding="utf-8")
    spec = tiny_spec("urban1k", images=10, captions=9)
    errors = {"no caption": 1, "image missing": 1, "blank caption": 1}
    assert errors_of(spec, folder) == errors
    dataset = load_retrieval(spec, folder, skip_invalid=True)
    assert dataset.image_names == tuple(f"{n}.jpg" for n in (1, 2, 6, 7, 8, 9, 10))
    assert dataset.protocol["skipped"] == errors
    (folder / "caption" / "6.txt").write_bytes("Straße".encode("latin-1"))
    with pytest.raises(ValueError, match=r"6\.txt cannot be read as text .*Download it again"):
        load_dataset(spec, folder, skip_invalid=True)


def test_only_the_first_records_of_sharegpt4v_are_read(tmp_path: Path) -> None:
    # What follows the third record is broken, which a reader of the whole file would meet.
    folder = write_sharegpt4v(tmp_path / "sharegpt4v", records=3)
    assert find_dataset("sharegpt4v-1k").protocol["split"] == "first 1000 records"
    spec = tiny_spec("sharegpt4v-1k", images=3, captions=3)
    assert isinstance(spec.read, JsonCaptions)
    dataset = load_retrieval(replace(spec, read=replace(spec.read, first=3)), folder)
    assert dataset.captions == tuple(f"A long answer. It is number {n}." for n in range(3))
    with pytest.raises(ValueError, match="not a JSON list, or truncated"):
        load_dataset("sharegpt4v-1k", folder)


def test_lines_of_docci_that_are_not_records_are_errors(tmp_path: Path) -> None:
    folder = write_docci(tmp_path)
    with (folder / "docci_descriptions.jsonlines").open("a", encoding="utf-8") as lines:
        lines.write('{"split": "test", "image_file": "test_00000.jpg"}\n{"split": "tes\n')
    spec = tiny_spec("docci", images=2, captions=2)
    errors = {"no 'split', 'image_file' and 'description'": 1, "not JSON": 1}
    assert errors_of(spec, folder) == errors
    assert load_dataset(spec, folder, skip_invalid=True).protocol["skipped"] == errors


def test_imageinwords_are_texts_of_which_pairs_can_be_selected(tmp_path: Path) -> None:
    folder = write_iiw(tmp_path)
    everything = read_retrieval("iiw", folder, {"images": 6, "captions": 8})
    assert everything.images == ()
    assert [len(group.captions) for group in everything.group_captions()] == [2, 1, 2, 1, 1, 1]
    pairs = read_retrieval("iiw-pairs", folder, {"images": 2, "captions": 4})
    assert [group.captions for group in pairs.group_captions()] == [
        ("Long one.", "Made one."),
        ("Long three.", "Short three."),
    ]
    counts = {"images": 2, "captions": 2}
    by_people = read_retrieval("iiw-400", folder, counts, image_dir=folder / "aar")
    assert by_people.captions == ("Long one.", "Long two.")


def test_a_record_of_xm3600_without_captions_in_the_language_is_an_error(tmp_path: Path) -> None:
    folder = write_xm3600(tmp_path)
    lines = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    del lines[1]["de"]
    lines[0]["de"]["caption"] = "Ein Hund."  # a text in place of a list
    write_json_lines(folder / "captions.jsonl", lines)
    errors = {"no 'image/key', or no captions in 'de'": 2}
    assert errors_of(tiny_spec("xm3600"), folder, lang="de") == errors
    assert load_dataset(tiny_spec("xm3600", images=2), folder, lang="en").protocol["skipped"] == {}


def test_files_of_multi30k_of_different_length_are_refused_even_if_samples_may_be_skipped(
    tmp_path: Path,
) -> None:
    # Which line is missing cannot be known, so there is no sample that could be left out.
    folder = write_multi30k(tmp_path)
    names = folder / "data" / "task1" / "image_splits" / "test_2016_flickr.txt"
    names.write_text("1007129816.jpg\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"has 2 lines.*has 1;"):
        load_dataset(tiny_spec("multi30k", images=2), folder, lang="en", skip_invalid=True)


def test_damaged_compressed_captions_are_named(tmp_path: Path) -> None:
    file = write_multi30k(tmp_path) / "data" / "task1" / "raw" / "test_2016_flickr.en.gz"
    content = bytearray(file.read_bytes())
    content[10] ^= 0xFF  # the first byte after the header
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"test_2016_flickr\.en\.gz cannot be read"):
        load_dataset(tiny_spec("multi30k", images=2), tmp_path, lang="en")


def test_chinese_captions_name_images_as_flickr30k_does(tmp_path: Path) -> None:
    counts = {"images": 2, "captions": 10}
    english = read_retrieval("flickr30k", write_flickr30k(tmp_path / "en"), counts)
    folder = write_flickr30k_cn(tmp_path / "zh")
    image_dir = folder / "flickr30k-images"
    chinese = read_retrieval("flickr30k-cn", folder, counts, image_dir=image_dir)
    assert [Path(name).name for name in english.image_names] == list(chinese.image_names)
    assert chinese.captions[0] == "图片1007129816的 标题0"
    assert chinese.lang == "zh"


def test_captions_of_flickr30k_cn_are_those_of_the_lowest_numbers_and_not_split_into_words(
    tmp_path: Path,
) -> None:
    folder = write_flickr30k_cn(tmp_path / "cn")
    file = folder / "flickr30k_cn_test.txt"
    spec = tiny_spec("flickr30k-cn", images=2, captions=10)
    options = {"image_dir": folder / "flickr30k-images"}
    whole = load_retrieval(spec, folder, **options)
    lines = file.read_text(encoding="utf-8").splitlines()
    sixth = "1007129816#zhm#5 第六"
    file.write_text("\n".join([sixth, *lines[::-1]]), encoding="utf-8")
    assert set(load_retrieval(spec, folder, **options).captions) == set(whole.captions)
    file.write_text("\n".join([lines[1], "", *lines, "1009434119#zhm#x 无"]), encoding="utf-8")
    assert errors_of(tiny_spec("flickr30k-cn"), folder, **options) == {
        "number of a caption repeated": 1,
        "no 'image#number' at the start of the line": 2,
    }
    lines[0] = "1007129816#zhm#0 一个:m 男人:n ，:wd 戴:v 帽子:n "
    lines[1] = "1007129816#zhm#1 时间 12:30 的:钟"  # a caption with colons
    file.write_text("\n".join(lines), encoding="utf-8")
    assert errors_of(tiny_spec("flickr30k-cn"), folder, **options) == {
        "caption split into words with parts of speech": 1
    }
    assert load_dataset(spec, folder, skip_invalid=True, **options).protocol["skipped_samples"] == 1


@pytest.mark.slow
def test_the_emoji_are_those_that_the_demo_holds_out_in_every_language() -> None:
    train, test = split_emoji(seed=0)
    held_out = {record.group_id for record in test}
    cache = ReadingCache()
    read = {
        lang: load_retrieval("emoji", lang=lang, cache=cache, check_images=False)
        for lang in find_languages("emoji")
    }
    for dataset in read.values():
        assert {Path(name).stem for name in dataset.image_names} == held_out
        assert len(dataset.captions) == len(set(dataset.captions)) == len(held_out) == 300
    assert len(read) == 12
    assert len({dataset.image_names for dataset in read.values()}) == 1
    # What training sees in English shows up in no caption that tests English.
    trained = {text for record in train for text in record.captions}
    assert not trained & set(read["en"].captions)
