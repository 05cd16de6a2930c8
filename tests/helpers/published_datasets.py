"""Tiny datasets in the formats of their publishers, written for tests: about three images each.

Every function writes into a folder and returns it. Names, fields and layout are the publishers';
images and captions are made up.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from modeling_llm2clip.data.validation_errors import DataValidationError
from modeling_llm2clip.evaluation.datasets.dataset_registry import find_dataset, load_dataset
from modeling_llm2clip.evaluation.datasets.dataset_spec import DatasetSpec
from modeling_llm2clip.evaluation.datasets.retrieval_dataset import RetrievalDataset

COLORS = ("red", "green", "blue", "white", "black", "yellow")


def errors_of(spec: DatasetSpec | str, folder: Path, **options: Any) -> dict[str, int]:
    """Read a dataset that has errors; returns the count of each kind."""
    with pytest.raises(DataValidationError) as error:
        load_dataset(spec, folder, **options)
    return error.value.counts


def tiny_spec(name: str, **counts: int) -> DatasetSpec:
    """A spec of the registry with other counts, for files that nobody published."""
    return replace(find_dataset(name), counts=counts, counts_of_language={}, checksums={})


def load_retrieval(*arguments: Any, **options: Any) -> RetrievalDataset:
    found = load_dataset(*arguments, **options)
    assert isinstance(found, RetrievalDataset)
    return found


def read_retrieval(
    name: str, folder: Path, counts: dict[str, int], **options: Any
) -> RetrievalDataset:
    """Read a dataset of the registry that has other counts."""
    return load_retrieval(tiny_spec(name, **counts), folder, **options)


def captions_by_image(found: RetrievalDataset) -> dict[str, list[str]]:
    """The captions of each image according to the correspondence."""
    texts = found.correspondence.texts_of_images()
    return {
        name: [found.captions[text] for text in texts.of(row).tolist()]
        for row, name in enumerate(found.image_names)
    }


def write_images(folder: Path, names: Iterable[str]) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        color = COLORS[number % len(COLORS)]
        Image.new("RGB", (9, 6), color).save(folder / name, format="JPEG")


def write_json(file: Path, content: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return file


def write_json_lines(file: Path, lines: Iterable[Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    file.write_text(text, encoding="utf-8")
    return file


def captions_of(number: int, count: int = 5) -> list[str]:
    return [f"image {number}, caption {caption}" for caption in range(count)]


COCO_NAMES = [f"val2014/COCO_val2014_{number:012d}.jpg" for number in (42, 73, 74)]


def write_coco_test(folder: Path, *, counts: Sequence[int] = (5, 6, 5)) -> Path:
    """`coco_karpathy_test.json`, where some images have more than five captions."""
    items = [
        {"image": name, "caption": captions_of(number, count)}
        for number, (name, count) in enumerate(zip(COCO_NAMES, counts, strict=True))
    ]
    write_json(folder / "coco_karpathy_test.json", items)
    write_images(folder, COCO_NAMES)
    return folder


def write_karpathy_original(folder: Path) -> Path:
    """`dataset_coco.json`: all splits in one file, captions as sentences."""
    images = [
        {
            "filepath": name.partition("/")[0],
            "filename": name.partition("/")[2],
            "split": split,
            "sentences": [{"raw": text, "tokens": text.split()} for text in captions_of(number)],
        }
        for number, (name, split) in enumerate(
            zip(COCO_NAMES, ("train", "test", "test"), strict=True)
        )
    ]
    write_json(folder / "dataset_coco.json", {"dataset": "coco", "images": images})
    write_images(folder, COCO_NAMES)
    return folder


def write_coco_official(folder: Path) -> Path:
    """`annotations/captions_val2017.json` and its images, which are in `val2017`."""
    names = ["000000000139.jpg", "000000000285.jpg"]
    annotations = [
        {"id": 10 * number + index, "image_id": number, "caption": f"{text}\n"}
        for number in range(2)
        for index, text in enumerate(captions_of(number, 5 + number))
    ]
    content = {
        "info": {},
        "images": [{"id": n, "file_name": name, "height": 6} for n, name in enumerate(names)],
        "annotations": annotations[::-1],
    }
    write_json(folder / "annotations" / "captions_val2017.json", content)
    write_images(folder / "val2017", names)
    return folder


def write_flickr30k(folder: Path) -> Path:
    names = [f"flickr30k-images/{number}.jpg" for number in (1007129816, 1009434119)]
    items = [{"image": name, "caption": captions_of(number)} for number, name in enumerate(names)]
    write_json(folder / "flickr30k_test.json", items)
    write_images(folder, names)
    return folder


def write_sharegpt4v(folder: Path, *, records: int = 3) -> Path:
    """A list of conversations; the last record is broken, and comes after those that are read."""
    names = [f"sam/images/sa_{number}.jpg" for number in range(records)]
    items = [
        {
            "id": f"sa_{number}",
            "image": name,
            "conversations": [
                {"from": "human", "value": "<image>\nWhat do you see?"},
                {"from": "gpt", "value": f"A long answer.\n\nIt is number {number}. "},
            ],
        }
        for number, name in enumerate(names)
    ]
    file = folder / "share-captioner_coco_lcs_sam_1246k_1107.json"
    text = json.dumps(items, indent=1).removesuffix("\n]")
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(text + ', {"id": "cut o', encoding="utf-8")
    write_images(folder, names)
    return folder


def write_urban1k(folder: Path) -> Path:
    """Ten numbered pairs; the second caption has lines that its publisher does not use."""
    (folder / "caption").mkdir(parents=True)
    for number in range(1, 11):
        more = "\n\nA second paragraph.\n" if number == 2 else ""
        (folder / "caption" / f"{number}.txt").write_text(f"Street {number}. {more}", "utf-8")
    write_images(folder / "image", [f"{number}.jpg" for number in range(1, 11)])
    return folder


def write_docci(folder: Path) -> Path:
    splits = {"train_00000": "train", "test_00000": "test", "test_00001": "test"}
    splits["qual_dev_00000"] = "qual_dev"
    lines = [
        {"example_id": name, "split": split, "image_file": f"{name}.jpg", "description": f"{name}."}
        for name, split in splits.items()
    ]
    write_json_lines(folder / "docci_descriptions.jsonlines", lines)
    write_images(folder / "images", [f"{name}.jpg" for name in splits])
    return folder


def write_xm3600(folder: Path) -> Path:
    keys = ["000411001ff7dd4f", "0006eebafc6d04c0"]
    captions = {"en": ["a cat", "one cat"], "de": ["eine Katze"], "zh": ["一只猫", "猫"]}
    lines = [
        {
            "image/key": key,
            "image/locale": "en",
            **{
                lang: {
                    "caption": [f"{text} {number}" for text in texts],
                    "caption/tokenized": texts,
                }
                for lang, texts in captions.items()
            },
        }
        for number, key in enumerate(keys)
    ]
    write_json_lines(folder / "captions.jsonl", lines)
    write_images(folder / "images", [f"{key}.jpg" for key in keys])
    return folder


def write_multi30k(folder: Path) -> Path:
    """The repository's own folders; captions are compressed, names of images are not."""
    names = ["1007129816.jpg", "1009434119.jpg"]
    texts = {"en": "A man\u2028in a hat.\nA dog.\n", "de": "Ein Mann.\nEin Hund.\n"}
    raw = folder / "data" / "task1" / "raw"
    raw.mkdir(parents=True)
    for lang, text in texts.items():
        (raw / f"test_2016_flickr.{lang}.gz").write_bytes(gzip.compress(text.encode()))
    splits = folder / "data" / "task1" / "image_splits"
    splits.mkdir()
    (splits / "test_2016_flickr.txt").write_text("\n".join(names) + "\n", "utf-8")
    write_images(folder / "flickr30k-images", names)
    return folder


def write_flickr30k_cn(folder: Path) -> Path:
    lines = [
        f"{number}#zhm#{caption} 图片{number}的 标题{caption}"
        for number in (1007129816, 1009434119)
        for caption in range(5)
    ]
    folder.mkdir(parents=True)
    (folder / "flickr30k_cn_test.txt").write_text("\n".join(lines) + "\n", "utf-8")
    write_images(folder / "flickr30k-images", ["1007129816.jpg", "1009434119.jpg"])
    return folder


def write_coco_cn(folder: Path) -> Path:
    """Two images of the test split, one from each part of COCO 2014, and one of another split."""
    stems = ["COCO_val2014_000000000042", "COCO_train2014_000000000009"]
    lines = [
        f"{stems[1]}#0\t火车站。",
        "COCO_train2014_000000000030#0\t别的图片。",
        f"{stems[0]}#0\t一只狗。",
        f"{stems[0]}#1\t狗在睡觉。",
    ]
    root = folder / "coco-cn-version1805v1.1"
    root.mkdir(parents=True)
    (root / "coco-cn_test.txt").write_text("\n".join(stems) + "\n", "utf-8")
    (root / "imageid.human-written-caption.txt").write_text("\n".join(lines), "utf-8")
    write_images(folder, [f"val2014/{stems[0]}.jpg", f"train2014/{stems[1]}.jpg"])
    return folder


def write_iiw(folder: Path) -> Path:
    subsets = {
        "IIW-400": [
            {"image/key": "aar_1", "IIW": "Long one.", "IIW-P5B": "Made one."},
            {"image/key": "aar_2", "IIW": "Long two."},
        ],
        "DOCCI_Test": [{"image": "test_1", "DOCCI": "Short three.", "IIW": "Long three."}],
        "DCI_Test": [{"image": "sa_1.jpg", "ex_id": "1-data.json", "IIW": "Long four."}],
        "CM_3600": [{"image/key": "0a", "image/source": "0a", "IIW-P5B": "Made five."}],
        "LocNar_Eval": [{"image/key": "0a", "image/source": "0a_95", "IIW-P5B": "Made six."}],
    }
    for subset, lines in subsets.items():
        write_json_lines(folder / "datasets" / subset / "data.jsonl", lines)
    write_images(folder / "aar", ["aar_1.jpg", "aar_2.jpg"])
    return folder


SUGARCREPE_CATEGORIES = "add_att add_obj replace_att replace_obj replace_rel swap_att swap_obj"


def write_sugarcrepe(folder: Path) -> Path:
    """One item per category, all of the first image of `write_coco_official`."""
    for number, category in enumerate(SUGARCREPE_CATEGORIES.split()):
        item = {
            "filename": "000000000139.jpg",
            "caption": f"image 0, caption {number % 2}",
            "negative_caption": f"image 1, caption {number % 2}",
        }
        write_json(folder / "data" / f"{category}.json", {str(number): item})
    return write_coco_official(folder)


def winoground_items() -> list[dict[str, Any]]:
    return [
        {
            "id": number,
            "image_0": f"ex_{number}_img_0",
            "image_1": f"ex_{number}_img_1",
            "caption_0": f"{number} over one",
            "caption_1": f"one over {number}",
            "tag": "Adjective",
            "collapsed_tag": tag,
            "num_main_preds": 1,
        }
        for number, tag in enumerate(("Object", "Relation"))
    ]


def write_winoground(folder: Path) -> Path:
    items = winoground_items()
    write_json_lines(folder / "data" / "examples.jsonl", items)
    names = [item[column] for item in items for column in ("image_0", "image_1")]
    write_images(folder / "data" / "images", [f"{name}.png" for name in names])
    return folder


SYNSETS = {"n01440764": "tench, Tinca tinca", "n01443537": "goldfish", "n01484850": "great white"}


def write_imagenet(folder: Path) -> Path:
    """`val` in class folders, and the list of names that Kaggle ships."""
    folder.mkdir(parents=True)
    lines = [f"{synset} {names}" for synset, names in SYNSETS.items()]
    (folder / "LOC_synset_mapping.txt").write_text("\n".join(lines) + "\n", "utf-8")
    images = [f"{synset}/ILSVRC2012_val_{number}.JPEG" for synset in SYNSETS for number in (1, 2)]
    write_images(folder / "val", images)
    return folder


def write_imagenet_of_kaggle(folder: Path) -> Path:
    """The images in one folder, their classes in `LOC_val_solution.csv`."""
    folder.mkdir(parents=True)
    lines = [f"{synset} {names}" for synset, names in SYNSETS.items()]
    (folder / "LOC_synset_mapping.txt").write_text("\n".join(lines) + "\n", "utf-8")
    names = {"ILSVRC2012_val_2": "n01484850", "ILSVRC2012_val_1": "n01440764"}
    rows = [f"{name},{synset} 85 1 499 272 " for name, synset in names.items()]
    table = "\n".join(["ImageId,PredictionString", *rows]) + "\n"
    (folder / "LOC_val_solution.csv").write_text(table, "utf-8")
    write_images(folder / "ILSVRC" / "Data" / "CLS-LOC" / "val", [f"{name}.JPEG" for name in names])
    return folder


def write_own_folder(folder: Path) -> Path:
    """Two groups in two languages, one of them with two images."""
    lines: list[dict[str, Any]] = [
        {"image": "a.jpg", "group_id": "cat", "captions": ["a cat"], "lang": "en",
         "long_captions": ["A cat, seen from afar."]},
        {"image": "b.jpg", "group_id": "cat", "captions": ["a cat", "one cat"], "lang": "en",
         "long_captions": ["A cat, seen from near."]},
        {"image": "c.jpg", "captions": ["a dog"], "lang": "en", "long_captions": ["A dog."]},
        {"image": "a.jpg", "group_id": "cat", "captions": ["eine Katze"], "lang": "de"},
        {"image": "c.jpg", "captions": ["ein Hund"], "lang": "de"},
    ]  # fmt: skip
    write_json_lines(folder / "captions.jsonl", lines)
    write_images(folder, ["a.jpg", "b.jpg", "c.jpg"])
    return folder
