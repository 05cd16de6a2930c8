"""Bad input of a set is told at once and by name, or left out, counted and reported when asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from published_datasets import (
    COCO_NAMES,
    captions_of,
    errors_of,
    tiny_card,
    write_coco_official,
    write_coco_test,
    write_docci,
    write_flickr30k_cn,
    write_iiw,
    write_images,
    write_json,
    write_json_lines,
    write_karpathy_original,
    write_multi30k,
    write_own_folder,
    write_sharegpt4v,
    write_sugarcrepe,
    write_urban1k,
    write_winoground,
    write_xm3600,
)

from modeling_llm2clip.data.validation_errors import DataValidationError
from modeling_llm2clip.evaluation.datasets.dataset_registry import find_dataset, load_dataset
from modeling_llm2clip.evaluation.datasets.schema import ChoiceDataset, RetrievalDataset

COCO = tiny_card("coco", images=3, captions=15)


def rewrite_coco(folder: Path, change: Any) -> None:
    """Let a function change the items of `coco_karpathy_test.json` in place."""
    file = folder / "coco_karpathy_test.json"
    items = json.loads(file.read_text(encoding="utf-8"))
    change(items)
    write_json(file, items)


def test_a_wrong_count_names_both_numbers_and_what_to_do(tmp_path: Path) -> None:
    folder = write_coco_test(tmp_path)
    with pytest.raises(DataValidationError) as error:
        load_dataset(tiny_card("coco", images=5000, captions=25000), folder)
    message = str(error.value)
    assert "wrong number of images: 1 (found 3, published 5000;" in message
    assert "wrong number of captions: 1 (found 15, published 25000;" in message
    assert "--skip-invalid" in message


def test_a_wrong_count_that_is_asked_for_stands_in_the_protocol(tmp_path: Path) -> None:
    folder = write_coco_test(tmp_path)
    card = tiny_card("coco", images=5000, captions=25000)
    found = load_dataset(card, folder, skip_invalid=True)
    assert found.protocol["differences_from_published"] == {"images": -4997, "captions": -24985}
    assert found.protocol["published"] == {"images": 5000, "captions": 25000}


def spoil_coco(folder: Path) -> None:
    """One error of each kind that a downloaded COCO has had, in six images of seven."""

    def change(items: list[dict[str, Any]]) -> None:
        items[1]["caption"] = captions_of(1, 3)
        items.append({"image": items[2]["image"], "caption": captions_of(7)})
        items.append({"image": "val2014/gone.jpg", "caption": captions_of(8)})
        items.append({"image": "val2014/blank.jpg", "caption": [*captions_of(9, 4), " \n"]})
        items.append({"image": "val2014/none.jpg", "caption": []})
        items.append({"image": "val2014/broken.jpg", "caption": captions_of(10)})
        items.append({"image": "val2014/other.jpg", "caption": captions_of(11)})

    rewrite_coco(folder, change)
    write_images(folder / "val2014", ["blank.jpg", "none.jpg", "broken.jpg"])
    whole = (folder / "val2014" / "broken.jpg").read_bytes()
    (folder / "val2014" / "broken.jpg").write_bytes(whole[: len(whole) // 2])


SPOILT = {
    "fewer than 5 captions": 1,
    "image repeated": 1,
    "image missing": 1,
    "blank caption": 1,
    "no caption": 1,
    "image unreadable": 1,
    "no name of an image, or captions that are no texts": 1,
}


def test_every_error_of_a_set_is_told_at_once(tmp_path: Path) -> None:
    folder = write_coco_test(tmp_path)
    spoil_coco(folder)
    wrong = {"wrong number of images": 1, "wrong number of captions": 1}
    assert errors_of(COCO, folder) == {**SPOILT, **wrong}


def test_errors_that_are_excluded_are_counted_and_leave_the_others_in_place(
    tmp_path: Path,
) -> None:
    folder = write_coco_test(tmp_path)
    spoil_coco(folder)
    found = load_dataset(COCO, folder, skip_invalid=True)
    assert isinstance(found, RetrievalDataset)
    assert found.protocol["excluded"] == SPOILT
    assert found.protocol["skipped_samples"] == 7
    assert found.image_names == (COCO_NAMES[0], COCO_NAMES[2])
    assert found.captions == (*captions_of(0), *captions_of(2))
    assert found.correspondence.image_of_pair.tolist() == [0] * 5 + [1] * 5
    assert (found.protocol["images"], found.protocol["captions"]) == (2, 10)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    missing=st.sets(st.integers(0, 7)), counts=st.lists(st.integers(5, 7), min_size=8, max_size=8)
)
def test_whatever_is_excluded_captions_stay_with_their_image(
    missing: set[int], counts: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("coco")
    names = [f"{number}.jpg" for number in range(8)]
    write_images(folder, [name for n, name in enumerate(names) if n not in missing])
    items = [{"image": name, "caption": captions_of(n, counts[n])} for n, name in enumerate(names)]
    write_json(folder / "coco_karpathy_test.json", items)
    card = tiny_card("coco", images=8, captions=40)
    if len(missing) == 8:
        with pytest.raises(ValueError, match="nothing is left"):
            load_dataset(card, folder, skip_invalid=True)
        return
    found = load_dataset(card, folder, skip_invalid=True)
    assert isinstance(found, RetrievalDataset)
    pairs = found.correspondence
    said = {
        (found.image_names[image], found.captions[text])
        for image, text in zip(
            pairs.image_of_pair.tolist(), pairs.text_of_pair.tolist(), strict=True
        )
    }
    kept = [n for n in range(8) if n not in missing]
    assert said == {(names[n], caption) for n in kept for caption in captions_of(n)}
    assert found.protocol["excluded"] == ({"image missing": len(missing)} if missing else {})
    assert "differences_from_published" not in found.protocol


def test_a_split_that_is_none_of_karpathys_is_told(tmp_path: Path) -> None:
    folder = write_karpathy_original(tmp_path)
    content = json.loads((folder / "dataset_coco.json").read_text(encoding="utf-8"))
    content["images"][1]["split"] = "tset"
    write_json(folder / "dataset_coco.json", content)
    card = tiny_card("coco", images=1, captions=5)
    assert errors_of(card, folder) == {"no split, or an unknown one": 1}


def test_captions_alone_need_no_images(tmp_path: Path) -> None:
    folder = write_coco_test(tmp_path)
    for name in COCO_NAMES:
        (folder / name).unlink()
    assert errors_of(COCO, folder) == {"image missing": 3}
    found = load_dataset(COCO, folder, require_images=False)
    assert isinstance(found, RetrievalDataset)
    assert found.images == ()
    assert [group.captions for group in found.group_captions()] == [
        tuple(captions_of(number)) for number in range(3)
    ]


def test_an_urban1k_image_without_its_caption_and_the_other_way_round(tmp_path: Path) -> None:
    folder = write_urban1k(tmp_path / "Urban1k")
    (folder / "caption" / "3.txt").unlink()
    (folder / "image" / "4.jpg").unlink()
    (folder / "caption" / "5.txt").write_text("\nSecond line only.", encoding="utf-8")
    (folder / "caption" / "6.txt").write_bytes("Straße".encode("latin-1"))
    card = tiny_card("urban1k", images=10, captions=8)
    wanted = {"no caption": 1, "image missing": 1, "blank caption": 1, "not UTF-8": 1}
    assert errors_of(card, folder) == wanted
    found = load_dataset(card, folder, skip_invalid=True)
    assert isinstance(found, RetrievalDataset)
    assert found.image_names == tuple(f"{n}.jpg" for n in (1, 2, 7, 8, 9, 10))
    assert found.protocol["excluded"] == wanted


def test_lines_of_docci_that_are_no_records_are_told(tmp_path: Path) -> None:
    folder = write_docci(tmp_path)
    with (folder / "docci_descriptions.jsonlines").open("a", encoding="utf-8") as lines:
        lines.write('{"split": "test", "image_file": "test_00000.jpg"}\n{"split": "tes\n')
    card = tiny_card("docci", images=2, captions=2)
    told = {"no 'split', 'image_file' and 'description'": 1, "not JSON": 1}
    assert errors_of(card, folder) == told
    assert load_dataset(card, folder, skip_invalid=True).protocol["excluded"] == told


def test_a_record_of_xm3600_without_the_language_is_told(tmp_path: Path) -> None:
    folder = write_xm3600(tmp_path)
    lines = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    del lines[1]["de"]
    write_json_lines(folder / "captions.jsonl", lines)
    card = tiny_card("xm3600", images=1)
    assert errors_of(card, folder, lang="de") == {"no 'image/key', or no captions in 'de'": 1}
    assert load_dataset(tiny_card("xm3600", images=2), folder, lang="en").protocol["excluded"] == {}


def test_files_of_multi30k_of_different_length_are_refused_even_with_exclusions(
    tmp_path: Path,
) -> None:
    # Which line is missing cannot be known, so there is no sample that could be left out.
    folder = write_multi30k(tmp_path)
    names = folder / "data" / "task1" / "image_splits" / "test_2016_flickr.txt"
    names.write_text("1007129816.jpg\n", encoding="utf-8")
    card = tiny_card("multi30k", images=2)
    with pytest.raises(ValueError, match=r"has 2 lines.*has 1;"):
        load_dataset(card, folder, lang="en", skip_invalid=True)


def test_a_list_of_sharegpt4v_that_is_cut_off_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a JSON list, or truncated"):
        load_dataset("sharegpt4v-1k", write_sharegpt4v(tmp_path, records=3))


def test_a_sample_with_several_errors_is_excluded_once(tmp_path: Path) -> None:
    folder = write_own_folder(tmp_path)
    before = load_dataset("folder", folder, lang="en").protocol
    assert before["skipped_samples"] == 0
    with (folder / "captions.jsonl").open("a", encoding="utf-8") as lines:
        lines.write('{"image": "gone.jpg", "captions": [" "], "lang": "en", "surprise": 1}\n')
        lines.write('{"image": 7, "captions": "none", "surprise": 1}\nno JSON\n')
        lines.write('{"image": "broken.jpg", "captions": [""], "lang": "en"}\n')
    (folder / "broken.jpg").write_bytes(b"no image")
    found = load_dataset("folder", folder, lang="en", skip_invalid=True).protocol
    assert sum(found["excluded"].values()) > 4
    assert found["skipped_samples"] == 4
    assert found["images"] == before["images"]


def test_a_repeated_image_is_told_with_its_line(tmp_path: Path) -> None:
    folder = write_own_folder(tmp_path)
    lines = (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "captions.jsonl").write_text("\n".join([*lines, lines[0]]), encoding="utf-8")
    with pytest.raises(DataValidationError) as error:
        load_dataset("folder", folder, lang="en")
    assert error.value.places["image repeated"][0].startswith(
        f"captions.jsonl line {len(lines) + 1}: "
    )
    found = load_dataset("folder", folder, lang="en", skip_invalid=True).protocol
    assert found["skipped_samples"] == 1


def test_images_of_a_folder_that_no_record_names_are_counted(tmp_path: Path) -> None:
    folder = write_own_folder(tmp_path)
    assert "images_without_a_record" not in load_dataset("folder", folder, lang="en").protocol
    write_images(folder / "more", ["extra.jpg", "another.jpg"])
    for lang in ("en", "de"):
        protocol = load_dataset("folder", folder, lang=lang).protocol
        assert protocol["images_without_a_record"] == 2


def test_two_urban1k_images_of_one_name_are_told(tmp_path: Path) -> None:
    folder = write_urban1k(tmp_path / "Urban1k")
    write_images(folder / "image", ["3.png"])
    card = tiny_card("urban1k", images=10, captions=10)
    assert errors_of(card, folder) == {"several images of one name": 1}
    (folder / "caption" / "3.txt").write_bytes("Straße".encode("latin-1"))
    found = load_dataset(card, folder, skip_invalid=True)
    assert isinstance(found, RetrievalDataset)
    assert "3.jpg" not in found.image_names
    assert found.protocol["skipped_samples"] == 1


def test_the_first_captions_of_flickr30k_cn_are_those_of_the_lowest_numbers(
    tmp_path: Path,
) -> None:
    folder = write_flickr30k_cn(tmp_path / "cn")
    file = folder / "flickr30k_cn_test.txt"
    card = tiny_card("flickr30k-cn", images=2, captions=10)
    options = {"images": folder / "flickr30k-images"}
    whole = load_dataset(card, folder, **options)
    lines = file.read_text(encoding="utf-8").splitlines()
    sixth = "1007129816#zhm#5 第六"
    file.write_text("\n".join([sixth, *lines[::-1]]), encoding="utf-8")
    shuffled = load_dataset(card, folder, **options)
    assert isinstance(whole, RetrievalDataset) and isinstance(shuffled, RetrievalDataset)
    assert set(shuffled.captions) == set(whole.captions)
    file.write_text("\n".join([lines[1], *lines, "1009434119#zhm#x 无"]), encoding="utf-8")
    assert errors_of(card, folder, **options) == {
        "number of a caption repeated": 1,
        "no number of the caption": 1,
    }


def test_captions_of_flickr30k_cn_that_are_cut_into_words_are_errors(tmp_path: Path) -> None:
    folder = write_flickr30k_cn(tmp_path / "cn")
    file = folder / "flickr30k_cn_test.txt"
    options = {"images": folder / "flickr30k-images"}
    card = tiny_card("flickr30k-cn", images=2, captions=10)
    lines = file.read_text(encoding="utf-8").splitlines()
    lines[0] = "1007129816#zhm#0 一个:m 男人:n ，:wd 戴:v 帽子:n "
    lines[1] = "1007129816#zhm#1 时间 12:30 的:钟"  # a caption with colons
    file.write_text("\n".join(lines), encoding="utf-8")
    assert errors_of(card, folder, **options) == {"caption cut into words with parts of speech": 1}
    found = load_dataset(card, folder, skip_invalid=True, **options)
    assert isinstance(found, RetrievalDataset)
    assert found.protocol["skipped_samples"] == 1


def test_errors_of_choices_are_told_at_once_or_left_out(tmp_path: Path) -> None:
    folder = write_sugarcrepe(tmp_path)
    same = {"filename": "000000000139.jpg", "caption": "same. ", "negative_caption": "same."}
    gone = {"filename": "gone.jpg", "caption": "one", "negative_caption": "two"}
    write_json(folder / "data" / "add_att.json", {"0": same, "1": gone, "2": {"caption": "one"}})
    card = tiny_card("sugarcrepe", items=8)
    told = {
        "no 'filename', 'caption' and 'negative_caption'": 1,
        "the two captions are the same": 1,
        "image missing": 1,
    }
    options = {"images": folder / "val2017"}
    assert errors_of(card, folder, **options) == told
    found = load_dataset(card, folder, skip_invalid=True, **options)
    assert isinstance(found, ChoiceDataset)
    assert (len(found.items), found.protocol["excluded"]) == (6, told)
    assert found.protocol["skipped_samples"] == 3


def test_a_winoground_item_needs_both_its_images(tmp_path: Path) -> None:
    folder = write_winoground(tmp_path)
    (folder / "data" / "images" / "ex_1_img_0.png").unlink()
    assert errors_of(tiny_card("winoground", items=1), folder) == {"image missing": 1}


def test_choices_with_images_cannot_be_read_without_them(tmp_path: Path) -> None:
    folder = write_sugarcrepe(tmp_path)
    with pytest.raises(ValueError, match="sugarcrepe-text"):
        load_dataset(tiny_card("sugarcrepe", items=7), folder, require_images=False)


def test_a_file_that_differs_from_the_published_one_is_told(tmp_path: Path) -> None:
    folder = write_iiw(tmp_path)
    assert errors_of("iiw", folder) == {
        "file is not the published one": 5,
        "wrong number of captions": 1,
        "wrong number of images": 1,
    }
    protocol = load_dataset("iiw", folder, skip_invalid=True).protocol
    assert set(protocol["checksums"].values()) == {"differs"}


def test_of_a_folder_the_errors_of_another_language_are_no_exclusions_of_this_one(
    tmp_path: Path,
) -> None:
    folder = write_own_folder(tmp_path)
    with (folder / "captions.jsonl").open("a", encoding="utf-8") as lines:
        lines.write('{"image": "c.jpg", "captions": [], "lang": "fr"}\nno JSON\n')
        lines.write('{"image": "gone.jpg", "captions": ["weg"], "lang": "de"}\n')
    assert errors_of("folder", folder, lang="en") == {
        "not JSON": 1,
        "no caption": 1,
        "image missing": 1,
    }
    german = load_dataset("folder", folder, lang="de", skip_invalid=True)
    assert german.protocol["excluded"] == {"not JSON": 1, "image missing": 1}
    assert isinstance(german, RetrievalDataset)
    assert german.captions == ("eine Katze", "ein Hund")


def test_a_folder_of_broken_lines_alone_is_told_with_its_lines(tmp_path: Path) -> None:
    (tmp_path / "captions.jsonl").write_text("{no JSON\n", encoding="utf-8")
    for options in ({}, {"skip_invalid": True}, {"lang": "en"}):
        with pytest.raises(DataValidationError, match=r"not JSON: 1 \(captions\.jsonl line 1\)"):
            load_dataset("folder", tmp_path, **options)


def test_a_record_without_a_long_caption_is_told_where_long_ones_are_asked_for(
    tmp_path: Path,
) -> None:
    assert errors_of("folder-long", write_own_folder(tmp_path), lang="de") == {"no caption": 2}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flickr30k", r"no flickr30k_test\.json and no dataset_flickr30k\.json.*Get it from"),
        ("coco-val2017", "cocodataset.org"),
        ("urban1k", "has no folder 'caption'.*Urban1k.zip"),
        ("docci", "google.github.io/docci"),
        ("xm3600", "google.github.io/crossmodal-3600"),
        ("multi30k", "github.com/multi30k/dataset"),
        ("flickr30k-cn", r"flickr30k_cn_test\.txt.*Flickr30k-CNA"),
        ("coco-cn", "AIMClab/COCO-CN"),
        ("iiw", "github.com/google/imageinwords"),
        ("sugarcrepe", "github.com/RAIVNLab/sugar-crepe"),
        ("winoground", "datasets/facebook/winoground"),
        ("imagenet", "LOC_synset_mapping.txt"),
        ("image-folder", "no class folders"),
        ("folder", "captions.jsonl"),
    ],
)
def test_a_missing_file_is_named_with_where_to_get_it(
    name: str, message: str, tmp_path: Path
) -> None:
    lang = "en" if len(find_dataset(name).languages) > 1 else None
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load_dataset(name, tmp_path, lang=lang)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("coko", {}, "no set 'coko'. Known: coco, coco-cn"),
        ("coco", {"folder": None}, "coco needs a folder with coco_karpathy_test.json"),
        ("coco", {"folder": "nowhere"}, "nowhere does not exist"),
        ("coco", {"lang": "de"}, "coco has no language 'de'. It has en."),
        ("coco", {"image_dir": "nowhere"}, "image_dir='nowhere' is not a folder"),
        ("xm3600", {}, "xm3600 has several languages. Choose one: ar, bn"),
        ("emoji", {"lang": "en"}, "emoji is in the package and takes no folder"),
    ],
)
def test_a_request_that_cannot_be_met_says_what_can(
    name: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_coco_official(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_dataset(name, **{"folder": tmp_path, **options})


def write_winoground_rows(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True)
    datasets.Dataset.from_list(rows).to_parquet(folder / "test.parquet")
    return folder


def test_parquet_that_is_broken_or_lacks_a_column_or_an_image_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    image = {"bytes": b"no image", "path": None}
    row = {"id": 0, "image_0": image, "caption_0": "one", "caption_1": "two"}
    lacking = write_winoground_rows(tmp_path / "lacking", [row])
    assert errors_of(tiny_card("winoground"), lacking) == {"image missing": 1}
    unreadable = write_winoground_rows(tmp_path / "unreadable", [{**row, "image_1": image}])
    assert errors_of(tiny_card("winoground"), unreadable) == {"image unreadable": 2}
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "en-0.parquet").write_bytes(b"PAR1")
    told = {"not a Parquet file, or broken": 1}
    assert errors_of(tiny_card("xm3600"), tmp_path / "broken", lang="en") == told
    (tmp_path / "broken" / "en-0.parquet").unlink()
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "broken" / "en-0.parquet")
    assert errors_of(tiny_card("xm3600"), tmp_path / "broken", lang="en") == {
        "no column captions, image, image_id": 1
    }
