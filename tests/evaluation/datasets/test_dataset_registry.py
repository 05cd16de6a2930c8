"""Every dataset says what it is, where it comes from, and what is missing."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from published_datasets import write_coco_official, write_imagenet, write_own_folder

from modeling_llm2clip.configs.config_fields import DataConfig
from modeling_llm2clip.configs.evaluation_config import EvaluatedDataset, EvaluationConfig
from modeling_llm2clip.data.records.record_loading import load_records
from modeling_llm2clip.data.validation_errors import DataValidationError
from modeling_llm2clip.evaluation.datasets.custom_folder import make_records_spec
from modeling_llm2clip.evaluation.datasets.dataset_registry import (
    find_dataset,
    list_datasets,
    load_dataset,
    parse_dataset,
    read_data,
)
from modeling_llm2clip.evaluation.datasets.dataset_spec import DatasetSpec
from modeling_llm2clip.evaluation.evaluate import check_eval_data

OWN = {"folder", "folder-long", "image-folder"}


@pytest.mark.parametrize("spec", list_datasets(), ids=lambda spec: spec.name)
def test_every_spec_names_its_publisher_source_choices_counts_and_digests(
    spec: DatasetSpec,
) -> None:
    assert find_dataset(spec.name) is spec
    for text in (spec.title, spec.license, spec.citation, spec.source, spec.files):
        assert text and text == text.strip()
    assert "split" in spec.protocol
    assert json.loads(json.dumps(dict(spec.protocol))) == spec.protocol
    assert "\n" not in spec.describe() and spec.describe().startswith(f"{spec.name}: ")
    lengths = {"md5": 32, "sha256": 64}
    for published in spec.checksums.values():
        algorithm, _, digest = published.partition(":")
        assert len(bytes.fromhex(digest)) * 2 == lengths[algorithm]
    if spec.name in OWN:
        assert not spec.counts and not spec.languages
        return
    units = {"choice": {"items"}, "classification": {"images", "classes"}}
    for lang in spec.languages:
        counts = spec.list_published_counts(lang)
        assert set(counts) == units.get(spec.dataset_type, {"images", "captions"})
        assert all(count > 0 for count in counts.values())


def test_datasets_are_listed_by_name_and_xm3600_has_as_many_captions_as_its_paper() -> None:
    names = [spec.name for spec in list_datasets()]
    assert names == sorted(set(names))
    assert {"flickr30k", "coco", "xm3600", "imagenet", "winoground", "emoji"} <= set(names)
    # 261,375 captions in 36 languages (Thapliyal et al., EMNLP 2022, abstract).
    counts = find_dataset("xm3600").counts_of_language
    assert len(counts) == 36
    assert sum(count["captions"] for count in counts.values()) == 261_375


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flickr30k", r"no flickr30k_test\.json or dataset_flickr30k\.json.*Get it from"),
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
        ("image-folder", "has no class folders"),
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
        ("coko", {}, "no dataset or folder named 'coko'. Known datasets: coco, coco-cn"),
        ("coco", {"folder": None}, "coco needs a folder with coco_karpathy_test.json"),
        ("coco", {"folder": "nowhere"}, "nowhere does not exist"),
        ("coco", {"lang": "de"}, "coco has no language 'de'. Choose from en."),
        ("coco", {"image_dir": "nowhere"}, "image_dir='nowhere' is not a folder"),
        ("xm3600", {}, "xm3600 has several languages. Choose one: ar, bn"),
        ("emoji", {"lang": "en"}, "emoji takes no folder"),
    ],
)
def test_a_request_that_cannot_be_met_says_what_can_be(
    name: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_coco_official(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_dataset(name, **{"folder": tmp_path, **options})


def test_the_name_of_a_dataset_is_never_a_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("emoji", "mine", "a=b"):
        (tmp_path / name).mkdir()
    with pytest.warns(UserWarning, match=r"emoji is both a dataset and a path.*write \./emoji"):
        assert parse_dataset("emoji") == EvaluatedDataset(name="emoji")
    assert parse_dataset("./emoji") == EvaluatedDataset(name="folder", folder="./emoji")
    assert parse_dataset("mine") == EvaluatedDataset(name="folder", folder="mine")
    # What exists is a path, whatever signs are in it.
    assert parse_dataset("a=b") == EvaluatedDataset(name="folder", folder="a=b")


def test_a_name_with_a_folder_is_the_same_as_both(tmp_path: Path) -> None:
    folder = write_imagenet(tmp_path / "imagenet") / "val"
    expected = load_dataset("image-folder", folder)
    dataset = load_dataset(f"image-folder={folder}")
    assert dataset.list_content() == expected.list_content()
    assert dataset.protocol == expected.protocol
    assert parse_dataset(f"coco={folder}") == EvaluatedDataset(name="coco", folder=str(folder))
    # A name of one's own.
    folder = write_own_folder(tmp_path / "a=b")
    dataset, expected = (load_dataset(s, lang="en") for s in (f"my-photos={folder}", folder))
    assert dataset.name == dataset.protocol["dataset"] == "my-photos"
    assert expected.name == "folder" and dataset.list_content() == expected.list_content()


@pytest.mark.parametrize("name", ["mine", "coco"])
@pytest.mark.parametrize("place", ["s3://bucket/data", "https://e.org/data.tar?a=b"])
def test_a_url_takes_a_name_as_a_folder_does(name: str, place: str) -> None:
    assert parse_dataset(f"{name}={place}") == EvaluatedDataset(name=name, folder=place)
    assert parse_dataset(place) == EvaluatedDataset(name="folder", folder=place)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("=mine", "'=mine' must be NAME=FOLDER"),
        ("mine=", "'mine=' must be NAME=FOLDER"),
        ("no/such=mine", "no such path, and 'no/such' cannot be a dataset name"),
        ("..=mine", "'..' cannot be a dataset name"),
        ("emojis=mine", "'emojis' is too similar to the dataset name emoji"),
        ("COCO=mine", "'COCO' is too similar to the dataset name coco"),
        ("emojis", "Did you mean emoji?"),
    ],
)
def test_a_name_that_cannot_be_ones_own_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_dataset(text)


def test_the_name_of_a_dataset_in_the_package_takes_no_folder(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"emoji takes no folder, .*choose another name for your own"
    ):
        load_dataset(f"emoji={write_own_folder(tmp_path)}")


def test_records_are_a_dataset_that_is_named_by_their_hash(tmp_path: Path) -> None:
    folder = write_own_folder(tmp_path)
    records = load_records(folder)
    dataset = load_dataset(records, lang="en")
    assert dataset.list_content() == load_dataset(folder, lang="en").list_content()
    assert dataset.name.startswith("records-")
    assert dataset.name == load_dataset(records[:], lang="de").name
    assert dataset.name != load_dataset(records[:3]).name
    assert dataset.protocol["source"] == "records" and dataset.protocol["dataset"] == dataset.name
    with pytest.raises(ValueError, match=r"several languages\. Choose one: en, de"):
        load_dataset(records)
    with pytest.raises(ValueError, match="Got no records"):
        load_dataset([])
    with pytest.raises(ValueError, match=r"records-[0-9a-f]{8} takes no folder"):
        load_dataset(records, folder, lang="en")
    for fields in ({"caption_fields": ("captions",)}, {"ignore_fields": ("url",)}):
        with pytest.raises(ValueError, match=r"no effect on records in memory.*load_records"):
            load_dataset(records, lang="en", **fields)  # type: ignore[arg-type]
    # The held-out records of a recipe are evaluated beside folders, which the options are for.
    data = [make_records_spec(records, name="held-out"), f"own={folder}"]
    check_eval_data(data, EvaluationConfig(languages=("en",), ignore_fields=("url",)))


def test_records_without_images_are_errors_unless_only_captions_are_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_own_folder(tmp_path)
    records = load_records(folder, require_images=False)[:3]
    records = [replace(record, image=None) for record in records]
    monkeypatch.chdir(folder)  # a file of the same name is not the image
    with pytest.raises(DataValidationError, match="image missing: 3"):
        load_dataset(records)
    assert not load_dataset(records, require_images=False).has_images


def test_training_reads_a_captioned_dataset_by_its_name(tmp_path: Path) -> None:
    folder = write_own_folder(tmp_path)
    own = read_data(folder, require_images=True)
    assert [(r.name, r.lang) for r in own] == [(r.name, r.lang) for r in load_records(folder)]
    named = read_data(f"folder={folder}", require_images=True)
    assert {(r.name, r.lang, r.group_id) for r in named} == {
        (r.name, r.lang, r.group_id) for r in own
    }
    assert all(r.image is None for r in read_data(f"folder={folder}", require_images=False))
    with pytest.raises(ValueError, match="winoground is a choice dataset, but training needs"):
        read_data(f"winoground={folder}", require_images=True)
    for chosen in (DataConfig(ignore_fields=("url",)), DataConfig(caption_fields=("captions",))):
        assert read_data(f"folder={folder}", chosen, require_images=True)
        with pytest.raises(ValueError, match=r"coco=.* has its own fields"):
            read_data(f"coco={folder}", chosen, require_images=True)
