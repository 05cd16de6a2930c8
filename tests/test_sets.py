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
from published_sets import (
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

from modeling_llm2clip.data.captioned_sources import read_captioned
from modeling_llm2clip.data.example_data import find_example_data
from modeling_llm2clip.data.pictures import ParquetPicture
from modeling_llm2clip.data.splits import hold_out
from modeling_llm2clip.evaluation.sets.intake import ReadingCache
from modeling_llm2clip.evaluation.sets.readers.sharegpt4v import read_sharegpt4v
from modeling_llm2clip.evaluation.sets.registry import find_languages, find_set, read_set
from modeling_llm2clip.evaluation.sets.retrieval import build_retrieval_set
from modeling_llm2clip.evaluation.sets.schema import (
    ChoiceSet,
    ClassificationSet,
    RetrievalSet,
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def read_retrieval(name: str, folder: Path, counts: dict[str, int], **options: Any) -> RetrievalSet:
    found = read_set(tiny_card(name, **counts), folder, **options)
    assert isinstance(found, RetrievalSet)
    return found


def captions_by_picture(found: RetrievalSet) -> dict[str, list[str]]:
    """What the correspondence says, picture by picture."""
    texts = found.correspondence.texts_of_images()
    return {
        name: [found.captions[text] for text in texts.of(row).tolist()]
        for row, name in enumerate(found.picture_names)
    }


def test_coco_keeps_the_first_five_captions_of_each_picture_with_that_picture(
    tmp_path: Path,
) -> None:
    # A reshape to (pictures, 5) would shift every caption behind the sixth by one picture.
    folder = write_coco_test(tmp_path / "coco", counts=(5, 6, 5))
    found = read_retrieval("coco", folder, {"pictures": 3, "captions": 15})
    assert captions_by_picture(found) == {
        name: captions_of(number) for number, name in enumerate(COCO_NAMES)
    }
    assert found.pictures == tuple(folder / name for name in COCO_NAMES)
    assert found.protocol["captions_per_picture"] == 5


def test_of_karpathys_own_file_the_test_split_counts(tmp_path: Path) -> None:
    folder = write_karpathy_original(tmp_path / "coco")
    found = read_retrieval("coco", folder, {"pictures": 2, "captions": 10})
    assert captions_by_picture(found) == {
        name: captions_of(number) for number, name in enumerate(COCO_NAMES) if number
    }


def test_pictures_may_lie_without_the_subfolder_that_the_file_names(tmp_path: Path) -> None:
    folder = write_coco_test(tmp_path / "coco")
    found = read_retrieval(
        "coco", folder, {"pictures": 3, "captions": 15}, images=folder / "val2014"
    )
    assert found.pictures == tuple(folder / name for name in COCO_NAMES)


def test_official_coco_captions_are_taken_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    folder = write_coco_official(tmp_path / "coco")
    found = read_retrieval(
        "coco-val2017", folder, {"pictures": 2, "captions": 10}, images=folder / "val2017"
    )
    assert captions_by_picture(found) == {
        "000000000139.jpg": captions_of(0),
        "000000000285.jpg": captions_of(1),
    }


def test_of_an_urban1k_caption_the_first_line_counts_and_the_others_are_told(
    tmp_path: Path,
) -> None:
    found = read_retrieval(
        "urban1k", write_urban1k(tmp_path / "Urban1k"), {"pictures": 10, "captions": 10}
    )
    assert found.captions == tuple(f"Street {number}." for number in range(1, 11))
    assert found.picture_names == tuple(f"{number}.jpg" for number in range(1, 11))
    assert found.protocol["captions_cut_to_their_first_line"] == 1


def test_only_the_wanted_records_of_sharegpt4v_are_read(tmp_path: Path) -> None:
    # What follows the third record is broken, which a reader of the whole file would meet.
    folder = write_sharegpt4v(tmp_path / "sharegpt4v", records=3)
    assert find_set("sharegpt4v-1k").protocol["split"] == "first 1000 records"
    build = partial(build_retrieval_set, read=partial(read_sharegpt4v, records=3))
    card = replace(tiny_card("sharegpt4v-1k", pictures=3, captions=3), build=build)
    found = read_set(card, folder)
    assert isinstance(found, RetrievalSet)
    assert found.captions == tuple(f"A long answer. It is number {n}." for n in range(3))


def test_only_the_test_split_of_docci_is_read(tmp_path: Path) -> None:
    found = read_retrieval("docci", write_docci(tmp_path), {"pictures": 2, "captions": 2})
    assert captions_by_picture(found) == {
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
    counts = {"pictures": 2, "captions": len(captions)}
    found = read_retrieval("xm3600", write_xm3600(tmp_path), counts, lang=lang)
    assert found.captions == captions
    assert found.lang == found.protocol["lang"] == lang


def test_lines_of_multi30k_end_at_line_feeds_only(tmp_path: Path) -> None:
    # The first caption holds a line separator of Unicode, at which Python's splitlines would cut.
    folder = write_multi30k(tmp_path)
    options = {"images": folder / "flickr30k-images", "lang": "en"}
    found = read_retrieval("multi30k", folder, {"pictures": 2, "captions": 2}, **options)
    assert captions_by_picture(found) == {
        "1007129816.jpg": ["A man in a hat."],
        "1009434119.jpg": ["A dog."],
    }


def test_chinese_captions_name_pictures_as_flickr30k_does(tmp_path: Path) -> None:
    english = read_retrieval(
        "flickr30k", write_flickr30k(tmp_path / "en"), {"pictures": 2, "captions": 10}
    )
    folder = write_flickr30k_cn(tmp_path / "zh")
    chinese = read_retrieval(
        "flickr30k-cn",
        folder,
        {"pictures": 2, "captions": 10},
        images=folder / "flickr30k-images",
    )
    assert [Path(name).name for name in english.picture_names] == list(chinese.picture_names)
    assert chinese.captions[0] == "图片1007129816的 标题0"
    assert chinese.lang == "zh"


def test_coco_cn_has_the_captions_of_its_test_split_in_that_splits_order(tmp_path: Path) -> None:
    found = read_retrieval("coco-cn", write_coco_cn(tmp_path), {"pictures": 2, "captions": 3})
    assert captions_by_picture(found) == {
        "val2014/COCO_val2014_000000000042.jpg": ["一只狗。", "狗在睡觉。"],
        "train2014/COCO_train2014_000000000009.jpg": ["火车站。"],
    }


def test_imageinwords_are_texts_of_which_pairs_can_be_chosen(tmp_path: Path) -> None:
    folder = write_iiw(tmp_path)
    everything = read_retrieval("iiw", folder, {"pictures": 6, "captions": 8})
    assert everything.pictures == ()
    assert [len(group.captions) for group in everything.group_captions()] == [2, 1, 2, 1, 1, 1]
    pairs = read_retrieval("iiw-pairs", folder, {"pictures": 2, "captions": 4})
    assert [group.captions for group in pairs.group_captions()] == [
        ("Long one.", "Made one."),
        ("Long three.", "Short three."),
    ]
    by_people = read_retrieval(
        "iiw-400", folder, {"pictures": 2, "captions": 2}, images=folder / "aar"
    )
    assert by_people.captions == ("Long one.", "Long two.")


def test_sugarcrepe_asks_with_a_picture_or_with_another_caption_of_it(tmp_path: Path) -> None:
    folder = write_sugarcrepe(tmp_path)
    seen = read_set(tiny_card("sugarcrepe", items=7), folder, images=folder / "val2017")
    read = read_set(tiny_card("sugarcrepe-text", items=7), folder)
    assert isinstance(seen, ChoiceSet) and isinstance(read, ChoiceSet)
    assert [item.category for item in seen.items][:2] == ["add_att", "add_obj"]
    assert seen.items[1].captions == ("picture 0, caption 1", "picture 1, caption 1")
    assert seen.items[1].pictures == (folder / "val2017" / "000000000139.jpg",)
    # The anchor is another caption than the true one, which in the first item is caption 0.
    assert [item.anchor for item in read.items][:2] == [
        "picture 0, caption 1",
        "picture 0, caption 0",
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
def test_winoground_has_two_pictures_for_two_captions_from_either_form(
    write: Callable[[Path], Path], tmp_path: Path
) -> None:
    found = read_set(tiny_card("winoground", items=2), write(tmp_path / "winoground"))
    assert isinstance(found, ChoiceSet)
    assert [item.captions for item in found.items] == [
        ("0 over one", "one over 0"),
        ("1 over one", "one over 1"),
    ]
    assert [item.category for item in found.items] == ["Object", "Relation"]
    assert all(len(set(item.pictures)) == 2 for item in found.items)


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
            {"image": Image.new("RGB", (8, 8), colour), "image_id": colour, "captions": [lang]}
            for colour in ("red", "blue")
        ]
        (snapshot / "data").mkdir(parents=True, exist_ok=True)
        table = datasets.Dataset.from_list(rows, features=features)
        table.to_parquet(snapshot / "data" / f"{lang}-00000-of-00001.parquet")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    card = tiny_card("xm3600", pictures=2, captions=2)
    found = read_set(card, f"hub:mteb/xm3600@{commit}", lang="de")
    assert isinstance(found, RetrievalSet)
    assert captions_by_picture(found) == {"red": ["de"], "blue": ["de"]}
    assert all(isinstance(picture, ParquetPicture) for picture in found.pictures)
    assert found.protocol["source"] == f"hub:mteb/xm3600@{commit}"
    with pytest.raises(ValueError, match="cannot be fetched"):
        read_set(card, f"hub:mteb/xm3600@{'6' * 40}", lang="de")
    with pytest.raises(ValueError, match="pins no commit"):
        read_set(card, "hub:mteb/xm3600@main", lang="de")


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
    found = read_retrieval("flickr30k", tmp_path, {"pictures": 2, "captions": 10})
    assert captions_by_picture(found) == {"0.jpg": captions_of(0), "2.jpg": captions_of(2)}
    assert [picture.row for picture in found.pictures] == [0, 2]  # type: ignore[union-attr]


@pytest.mark.parametrize("write", [write_imagenet, write_imagenet_of_kaggle])
def test_imagenet_labels_are_places_in_the_sorted_list_of_synsets(
    write: Callable[[Path], Path], tmp_path: Path
) -> None:
    folder = write(tmp_path / "imagenet")
    num_pictures = 6 if write is write_imagenet else 2
    found = read_set(tiny_card("imagenet", pictures=num_pictures, classes=3), folder)
    assert isinstance(found, ClassificationSet)
    assert found.class_names == ("tench", "goldfish", "great white")
    assert found.labels == ((0, 0, 1, 1, 2, 2) if write is write_imagenet else (0, 2))
    assert found.protocol["templates"] == list(found.templates) and len(found.templates) == 80


def test_a_protocol_says_which_class_names_stood_in_the_prompts(tmp_path: Path) -> None:
    folder = write_imagenet(tmp_path / "imagenet")
    card = tiny_card("imagenet", pictures=6, classes=3)
    names = ["tench", "goldfish", "great white"]
    stated = [read_set(card, folder).protocol, read_set(card, folder, class_names=names).protocol]
    (folder / "class_names.txt").write_text(
        "n01440764 tench\nn01443537 goldfish\nn01484850 great white shark\n", encoding="utf-8"
    )
    stated.append(read_set(card, folder).protocol)
    stated.append(read_set("image-folder", folder / "val").protocol)
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
    plain = read_set(card, folder)
    named = read_set(
        card,
        folder,
        lang="de",
        class_names=["Schleie", "Goldfisch", "Weißer Hai"],
        templates=["ein Foto von: {}"],
    )
    assert isinstance(plain, ClassificationSet) and isinstance(named, ClassificationSet)
    assert plain.class_names == ("n01440764", "n01443537", "n01484850")
    assert plain.templates == ("a photo of a {}.",)
    assert named.class_names == ("Schleie", "Goldfisch", "Weißer Hai")
    assert (named.templates, named.lang) == (("ein Foto von: {}",), "de")
    assert named.labels == plain.labels


def test_pictures_of_one_key_share_their_captions_each_text_once(tmp_path: Path) -> None:
    found = read_set("folder", write_own_folder(tmp_path), lang="en")
    assert isinstance(found, RetrievalSet)
    assert captions_by_picture(found) == {
        "a.jpg": ["a cat", "one cat"],
        "b.jpg": ["a cat", "one cat"],
        "c.jpg": ["a dog"],
    }
    # To a text encoder the two cats are one thing, not two that say the same.
    assert [group.captions for group in found.group_captions()] == [
        ("a cat", "one cat"),
        ("a dog",),
    ]
    long = read_set("folder-long", tmp_path, lang="en")
    assert isinstance(long, RetrievalSet)
    assert long.captions == ("A cat, seen from afar.", "A cat, seen from near.", "A dog.")


def test_languages_of_a_folder_share_one_reading(tmp_path: Path) -> None:
    folder = write_own_folder(tmp_path)
    cache = ReadingCache()
    assert find_languages("folder", folder, cache=cache) == ("en", "de")
    english = read_set("folder", folder, lang="en", cache=cache)
    # Nothing is left to read or to decode: the files are gone, and German is there.
    for file in folder.iterdir():
        file.unlink()
    german = read_set("folder", folder, lang="de", cache=cache)
    assert isinstance(english, RetrievalSet) and isinstance(german, RetrievalSet)
    assert german.captions == ("eine Katze", "ein Hund")
    assert german.pictures == (english.pictures[0], english.pictures[2])


def test_the_emoji_are_those_that_the_demo_holds_out_in_every_language() -> None:
    records = read_captioned(find_example_data() / "emoji")
    english = [record for record in records if record.lang == "en"]
    held_out = hold_out(english, seed=0)
    cache = ReadingCache()
    names = {}
    for lang in find_languages("emoji"):
        found = read_set("emoji", lang=lang, cache=cache)
        assert isinstance(found, RetrievalSet)
        assert {Path(name).stem for name in found.picture_names} == held_out
        assert len(found.captions) == len(set(found.captions)) == len(held_out) == 300
        names[lang] = found.picture_names
    assert len(names) == 12
    assert len(set(names.values())) == 1
    # What training sees in English shows up in no caption that tests English.
    trained = {text for r in english if r.key not in held_out for text in r.captions}
    tested = read_set("emoji", lang="en", cache=cache)
    assert isinstance(tested, RetrievalSet)
    assert not trained & set(tested.captions)
