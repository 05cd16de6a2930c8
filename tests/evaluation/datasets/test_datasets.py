"""Every set of the registry is read as its publisher ships it, on tiny sets in those formats."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image
from published_datasets import (
    COCO_NAMES,
    captions_of,
    tiny_card,
    winoground_items,
    write_coco_cn,
    write_coco_official,
    write_coco_test,
    write_docci,
    write_flickr30k,
    write_flickr30k_cn,
    write_iiw,
    write_imagenet,
    write_imagenet_of_kaggle,
    write_karpathy_original,
    write_multi30k,
    write_own_folder,
    write_sharegpt4v,
    write_sugarcrepe,
    write_urban1k,
    write_winoground,
    write_xm3600,
)

from modeling_llm2clip.data.image_sources import ParquetImage
from modeling_llm2clip.data.record_loading import find_example_data, load_records
from modeling_llm2clip.demo.stages import hold_out
from modeling_llm2clip.evaluation.datasets.dataset_registry import (
    find_dataset,
    find_languages,
    load_dataset,
)
from modeling_llm2clip.evaluation.datasets.readers.sharegpt4v import read_sharegpt4v
from modeling_llm2clip.evaluation.datasets.retrieval_dataset import build_retrieval_dataset
from modeling_llm2clip.evaluation.datasets.schema import (
    ChoiceDataset,
    ClassificationDataset,
    RetrievalDataset,
)
from modeling_llm2clip.evaluation.datasets.validation import ReadingCache


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def read_retrieval(
    name: str, folder: Path, counts: dict[str, int], **options: Any
) -> RetrievalDataset:
    found = load_dataset(tiny_card(name, **counts), folder, **options)
    assert isinstance(found, RetrievalDataset)
    return found


def captions_by_image(found: RetrievalDataset) -> dict[str, list[str]]:
    """What the correspondence says, image by image."""
    texts = found.correspondence.texts_of_images()
    return {
        name: [found.captions[text] for text in texts.of(row).tolist()]
        for row, name in enumerate(found.image_names)
    }


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


def test_of_karpathys_own_file_the_test_split_counts(tmp_path: Path) -> None:
    folder = write_karpathy_original(tmp_path / "coco")
    found = read_retrieval("coco", folder, {"images": 2, "captions": 10})
    assert captions_by_image(found) == {
        name: captions_of(number) for number, name in enumerate(COCO_NAMES) if number
    }


def test_images_may_lie_without_the_subfolder_that_the_file_names(tmp_path: Path) -> None:
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


def test_of_an_urban1k_caption_the_first_line_counts_and_the_others_are_told(
    tmp_path: Path,
) -> None:
    found = read_retrieval(
        "urban1k", write_urban1k(tmp_path / "Urban1k"), {"images": 10, "captions": 10}
    )
    assert found.captions == tuple(f"Street {number}." for number in range(1, 11))
    assert found.image_names == tuple(f"{number}.jpg" for number in range(1, 11))
    assert found.protocol["captions_cut_to_their_first_line"] == 1


def test_only_the_wanted_records_of_sharegpt4v_are_read(tmp_path: Path) -> None:
    # What follows the third record is broken, which a reader of the whole file would meet.
    folder = write_sharegpt4v(tmp_path / "sharegpt4v", records=3)
    assert find_dataset("sharegpt4v-1k").protocol["split"] == "first 1000 records"
    build = partial(build_retrieval_dataset, read=partial(read_sharegpt4v, records=3))
    card = replace(tiny_card("sharegpt4v-1k", images=3, captions=3), build=build)
    found = load_dataset(card, folder)
    assert isinstance(found, RetrievalDataset)
    assert found.captions == tuple(f"A long answer. It is number {n}." for n in range(3))


def test_only_the_test_split_of_docci_is_read(tmp_path: Path) -> None:
    found = read_retrieval("docci", write_docci(tmp_path), {"images": 2, "captions": 2})
    assert captions_by_image(found) == {
        "test_00000.jpg": ["test_00000."],
        "test_00001.jpg": ["test_00001."],
    }


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


def test_lines_of_multi30k_end_at_line_feeds_only(tmp_path: Path) -> None:
    # The first caption holds a line separator of Unicode, at which Python's splitlines would cut.
    folder = write_multi30k(tmp_path)
    options = {"images": folder / "flickr30k-images", "lang": "en"}
    found = read_retrieval("multi30k", folder, {"images": 2, "captions": 2}, **options)
    assert captions_by_image(found) == {
        "1007129816.jpg": ["A man in a hat."],
        "1009434119.jpg": ["A dog."],
    }


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


def test_coco_cn_has_the_captions_of_its_test_split_in_that_splits_order(tmp_path: Path) -> None:
    found = read_retrieval("coco-cn", write_coco_cn(tmp_path), {"images": 2, "captions": 3})
    assert captions_by_image(found) == {
        "val2014/COCO_val2014_000000000042.jpg": ["一只狗。", "狗在睡觉。"],
        "train2014/COCO_train2014_000000000009.jpg": ["火车站。"],
    }


def test_imageinwords_are_texts_of_which_pairs_can_be_chosen(tmp_path: Path) -> None:
    folder = write_iiw(tmp_path)
    everything = read_retrieval("iiw", folder, {"images": 6, "captions": 8})
    assert everything.images == ()
    assert [len(group.captions) for group in everything.group_captions()] == [2, 1, 2, 1, 1, 1]
    pairs = read_retrieval("iiw-pairs", folder, {"images": 2, "captions": 4})
    assert [group.captions for group in pairs.group_captions()] == [
        ("Long one.", "Made one."),
        ("Long three.", "Short three."),
    ]
    by_people = read_retrieval(
        "iiw-400", folder, {"images": 2, "captions": 2}, image_dir=folder / "aar"
    )
    assert by_people.captions == ("Long one.", "Long two.")


def test_sugarcrepe_asks_with_an_image_or_with_another_caption_of_it(tmp_path: Path) -> None:
    folder = write_sugarcrepe(tmp_path)
    seen = load_dataset(tiny_card("sugarcrepe", items=7), folder, image_dir=folder / "val2017")
    read = load_dataset(tiny_card("sugarcrepe-text", items=7), folder)
    assert isinstance(seen, ChoiceDataset) and isinstance(read, ChoiceDataset)
    assert [item.category for item in seen.items][:2] == ["add_att", "add_obj"]
    assert seen.items[1].captions == ("image 0, caption 1", "image 1, caption 1")
    assert seen.items[1].images == (folder / "val2017" / "000000000139.jpg",)
    # The anchor is another caption than the true one, which in the first item is caption 0.
    assert [item.anchor for item in read.items][:2] == [
        "image 0, caption 1",
        "image 0, caption 0",
    ]


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
    found = load_dataset(tiny_card("winoground", items=2), write(tmp_path / "winoground"))
    assert isinstance(found, ChoiceDataset)
    assert [item.captions for item in found.items] == [
        ("0 over one", "one over 0"),
        ("1 over one", "one over 1"),
    ]
    assert [item.category for item in found.items] == ["Object", "Relation"]
    assert all(len(set(item.images)) == 2 for item in found.items)


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
    card = tiny_card("xm3600", images=2, captions=2)
    found = load_dataset(card, f"hub:mteb/xm3600@{commit}", lang="de")
    assert isinstance(found, RetrievalDataset)
    assert captions_by_image(found) == {"red": ["de"], "blue": ["de"]}
    assert all(isinstance(image, ParquetImage) for image in found.images)
    assert found.protocol["source"] == f"hub:mteb/xm3600@{commit}"
    with pytest.raises(ValueError, match="cannot be fetched"):
        load_dataset(card, f"hub:mteb/xm3600@{'6' * 40}", lang="de")
    with pytest.raises(ValueError, match="does not pin a commit"):
        load_dataset(card, "hub:mteb/xm3600@main", lang="de")


def test_of_flickr30k_as_parquet_the_test_split_is_read(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("write", [write_imagenet, write_imagenet_of_kaggle])
def test_imagenet_labels_are_places_in_the_sorted_list_of_synsets(
    write: Callable[[Path], Path], tmp_path: Path
) -> None:
    folder = write(tmp_path / "imagenet")
    num_images = 6 if write is write_imagenet else 2
    found = load_dataset(tiny_card("imagenet", images=num_images, classes=3), folder)
    assert isinstance(found, ClassificationDataset)
    assert found.class_names == ("tench", "goldfish", "great white")
    assert found.labels == ((0, 0, 1, 1, 2, 2) if write is write_imagenet else (0, 2))
    assert found.protocol["templates"] == list(found.templates) and len(found.templates) == 80


def test_a_protocol_says_which_class_names_stood_in_the_prompts(tmp_path: Path) -> None:
    folder = write_imagenet(tmp_path / "imagenet")
    card = tiny_card("imagenet", images=6, classes=3)
    names = ["tench", "goldfish", "great white"]
    stated = [
        load_dataset(card, folder).protocol,
        load_dataset(card, folder, class_names=names).protocol,
    ]
    (folder / "class_names.txt").write_text(
        "n01440764 tench\nn01443537 goldfish\nn01484850 great white shark\n", encoding="utf-8"
    )
    stated.append(load_dataset(card, folder).protocol)
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


def test_class_folders_may_be_named_in_any_language(tmp_path: Path) -> None:
    folder = write_imagenet(tmp_path / "imagenet") / "val"
    card = tiny_card("image-folder")
    plain = load_dataset(card, folder)
    named = load_dataset(
        card,
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


def test_images_of_one_group_share_their_captions_each_text_once(tmp_path: Path) -> None:
    found = load_dataset("folder", write_own_folder(tmp_path), lang="en")
    assert isinstance(found, RetrievalDataset)
    assert captions_by_image(found) == {
        "a.jpg": ["a cat", "one cat"],
        "b.jpg": ["a cat", "one cat"],
        "c.jpg": ["a dog"],
    }
    # To a text encoder the two cats are one thing, not two that say the same.
    assert [group.captions for group in found.group_captions()] == [
        ("a cat", "one cat"),
        ("a dog",),
    ]
    long = load_dataset("folder-long", tmp_path, lang="en")
    assert isinstance(long, RetrievalDataset)
    assert long.captions == ("A cat, seen from afar.", "A cat, seen from near.", "A dog.")


def test_languages_of_a_folder_share_one_reading(tmp_path: Path) -> None:
    folder = write_own_folder(tmp_path)
    cache = ReadingCache()
    assert find_languages("folder", folder, cache=cache) == ("en", "de")
    english = load_dataset("folder", folder, lang="en", cache=cache)
    # Nothing is left to read or to decode: the files are gone, and German is there.
    for file in folder.iterdir():
        file.unlink()
    german = load_dataset("folder", folder, lang="de", cache=cache)
    assert isinstance(english, RetrievalDataset) and isinstance(german, RetrievalDataset)
    assert german.captions == ("eine Katze", "ein Hund")
    assert german.images == (english.images[0], english.images[2])


def test_the_emoji_are_those_that_the_demo_holds_out_in_every_language() -> None:
    records = load_records(find_example_data() / "emoji")
    english = [record for record in records if record.lang == "en"]
    held_out = hold_out(english, seed=0)
    cache = ReadingCache()
    names = {}
    for lang in find_languages("emoji"):
        found = load_dataset("emoji", lang=lang, cache=cache)
        assert isinstance(found, RetrievalDataset)
        assert {Path(name).stem for name in found.image_names} == held_out
        assert len(found.captions) == len(set(found.captions)) == len(held_out) == 300
        names[lang] = found.image_names
    assert len(names) == 12
    assert len(set(names.values())) == 1
    # What training sees in English shows up in no caption that tests English.
    trained = {text for r in english if r.group_id not in held_out for text in r.captions}
    tested = load_dataset("emoji", lang="en", cache=cache)
    assert isinstance(tested, RetrievalDataset)
    assert not trained & set(tested.captions)
